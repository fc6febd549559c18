"""The questions of a parity check, each a function from two runs to a :class:`Check`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from simprune_deploy.common.errors import argument, spelled
from simprune_deploy.onnx.precision import LARGEST_FLOAT16
from simprune_deploy.parity.decisions import (
    broken_structure,
    compared_similarities,
    float_noise,
    has_finite_features,
    kept_at_threshold,
    violation,
)
from simprune_deploy.parity.runs import Run
from simprune_deploy.parity.tolerance import (
    TURNED_COSINE,
    TURNED_DIFFERENCE,
    Tolerance,
    cosines,
    root_mean_square,
)
from simprune_deploy.parity.verdict import Check
from simprune_deploy.predict.answers import CUT, classes_of
from simprune_deploy.predict.records import Array, PruneRecord
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.cost import BlockShape, flops_share, spread_over_blocks, tokens_share

SAME_THRESHOLD = 1e-6
"""How near an image's threshold is to the model's own to be that one, rounded to float32."""

MAX_TURNED = 0.5
"""If float noise turned a decision in more than this share of the images, what is left is too
little to compare outputs on."""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What the checks need to know of the pruned model.

    Attributes:
        config: Its configuration.
        num_prefix_tokens: P.
        num_tokens: N before the first prune layer.
        depth: Blocks.
        block: Their widths.
        precision: Of the graph, "fp32" by default.
    """

    config: PruneConfig
    num_prefix_tokens: int
    num_tokens: int
    depth: int
    block: BlockShape
    precision: str = "fp32"

    @property
    def tolerance(self) -> Tolerance:
        return Tolerance(self.precision, self.depth)


FLOAT32 = Tolerance()


def not_finite(run: Run) -> str:
    """Return in words what holds NaN or infinity first in a run; empty: nothing does."""
    for layer, records in sorted(run.records.items()):
        bad = sum(not has_finite_features(record) for record in records)
        if bad:
            return (
                f"what is compared at block {layer} on {bad} of {len(records)} images ({run.name})"
            )
    bad = len(run.outputs) - int(finite_rows(run.outputs).sum())
    return f"the outputs of {bad} of {len(run.outputs)} images ({run.name})" if bad else ""


def finite_rows(values: Array) -> Array:
    """Return bool[n]: the rows without NaN or infinity."""
    return np.asarray(np.isfinite(values).reshape(len(values), -1).all(1))


def _way_out(reference_found: str, tolerance: Tolerance) -> str:
    """Return what to do about NaN or infinity."""
    if reference_found:
        return "PyTorch's own float32 is not finite: look at the weights and the images"
    if tolerance.precision == "fp16":
        return spelled(
            f"float16 ends at {LARGEST_FLOAT16:.0f}: use {argument('precision', 'bf16')}"
        )
    return "PyTorch's numbers are finite on the same images"


def check_outputs(reference: Run, run: Run, same: Array, tolerance: Tolerance = FLOAT32) -> Check:
    """Compare outputs by Polygraphy, over the images whose decisions agree.

    An image with a decision that noise turned has another output, rightly; those are reported
    apart and held to no tolerance here, but to the margin of the decision in
    :func:`check_decisions`. (In 16 bits, where noise turns many, to a cosine too, or of a single
    output to a difference.)
    """
    limit = tolerance.largest(reference.outputs)
    numbers: dict[str, Any] = {"tolerance": limit, "images": int(same.sum())}
    theirs, mine = not_finite(reference), not_finite(run)
    if theirs or mine:
        found = f"NaN or infinity: {theirs or mine}; {_way_out(theirs, tolerance)}"
        return Check("outputs", False, found, numbers)
    if not same.all():
        turned = np.abs(reference.outputs[~same] - run.outputs[~same])
        numbers["turned_images"] = int((~same).sum())
        numbers["largest_difference_of_turned_images"] = float(turned.max())
        if not tolerance.is_float32:
            near, text, more = _turned_outputs(reference, run, ~same)
            numbers |= more
            if not near:
                off = f"an image decided otherwise has {text}"
                return Check("outputs", False, off, numbers)
            if not same.any():
                text = f"every image was decided otherwise somewhere; {text}"
                return Check("outputs", True, text, numbers)
    if tolerance.is_float32 and same.mean() < 1 - MAX_TURNED:
        few = f"only {same.sum()} of {len(same)} images were decided alike, too few to compare"
        return Check("outputs", False, few, numbers)
    compare = SimpleCompareFunc(atol=limit, rtol=0, check_error_stat="max")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # the verdict says it all
        results = compare(
            IterationResult({"output": reference.outputs[same]}, runner_name=reference.name),
            IterationResult({"output": run.outputs[same]}, runner_name=run.name),
        )
    result = results["output"]
    numbers["largest_difference"] = float(result.max_absdiff)
    numbers["mean_difference"] = float(result.mean_absdiff)
    numbers["largest_output"] = float(np.abs(reference.outputs).max())
    passed = bool(result)
    if not tolerance.is_float32:
        return _outputs_in_16_bits(reference, run, same, tolerance, passed, numbers)
    return Check(
        "outputs",
        passed,
        f"largest output difference {result.max_absdiff:.2e}, mean {result.mean_absdiff:.2e} "
        f"({'within' if passed else 'above'} {limit:.2e})",
        numbers,
    )


def _turned_outputs(reference: Run, run: Run, turned: Array) -> tuple[bool, str, dict[str, float]]:
    """Return whether the images decided otherwise are near the reference, in words and numbers."""
    mine, theirs = run.outputs[turned], reference.outputs[turned]
    if reference.outputs.shape[1] == 1:
        limit = TURNED_DIFFERENCE * root_mean_square(reference.outputs)
        largest = float(np.abs(mine - theirs).max())
        near = largest <= limit
        text = (
            f"a largest difference of {largest:.4g} ({'within' if near else 'above'} {limit:.4g})"
        )
        return near, text, {"tolerance_of_turned_images": limit}
    cosine = float(cosines(theirs, mine).min())
    near = cosine >= TURNED_COSINE
    text = f"a smallest cosine of {cosine:.5f} ({'above' if near else 'below'} {TURNED_COSINE})"
    return near, text, {"smallest_cosine_of_turned_images": cosine}


def _outputs_in_16_bits(
    reference: Run,
    run: Run,
    same: Array,
    tolerance: Tolerance,
    passed: bool,
    numbers: dict[str, Any],
) -> Check:
    """Hold the root of the mean square too: a mistake everywhere hides below the largest."""
    rms = root_mean_square(run.outputs[same] - reference.outputs[same])
    limit = tolerance.rms(reference.outputs)
    numbers["rms_difference"], numbers["rms_tolerance"] = rms, limit
    if reference.outputs.shape[1] > 1:
        smallest = cosines(reference.outputs[same], run.outputs[same]).min()
        numbers["smallest_cosine"] = float(smallest)
    passed = passed and rms <= limit
    return Check(
        "outputs",
        passed,
        f"output difference {rms:.2e} (root mean square; {'within' if passed else 'not within'} "
        f"{limit:.2e}), at most {numbers['largest_difference']:.2e} (of "
        f"{numbers['tolerance']:.2e})",
        numbers,
    )


def check_top1(
    reference: Run,
    run: Run,
    same: Array,
    has_classes: bool,
    tolerance: Tolerance = FLOAT32,
) -> Check:
    """Compare the winning class of every image; of a single output the side of zero it is on."""
    if not has_classes:
        return Check("top1", None, "the model gives features, not classes")
    mine, theirs = classes_of(run.outputs), classes_of(reference.outputs)
    # where all is NaN, both have the same first place
    finite = finite_rows(run.outputs) & finite_rows(reference.outputs)
    agree = (mine == theirs) & finite
    # where the reference itself is undecided within the output tolerance, either class is right
    one, limit = reference.outputs.shape[1] == 1, tolerance.largest(reference.outputs)
    if one:
        tie = np.abs(reference.outputs[:, 0] - CUT) <= limit
        said = f"the output is on the same side of {CUT:g}"
    else:
        ordered = np.sort(reference.outputs, axis=1)
        tie = ordered[:, -1] - ordered[:, -2] <= 2 * limit
        said = "top-1 agrees"
    passed = bool((agree | tie | ~same).all() and finite.all())
    count = int(agree.sum())
    numbers = {"agree": count, "images": len(agree), "ties": int((tie & ~agree).sum())}
    if one and agree.all() and len(np.unique(theirs)) == 1:
        what = f"all outputs are on one side of {CUT:g}: only their values were compared"
        return Check("top1", None, what, numbers)
    said += f" on {count} of {len(agree)} images"
    if bad := len(finite) - int(finite.sum()):
        said += f"; the outputs of {bad} hold NaN or infinity"
    return Check("top1", passed, said, numbers)


def images_with_same_decisions(reference: Run, run: Run) -> Array:
    """Return bool[n]: the images whose every decision is the same in both runs."""
    same = np.ones(len(run.outputs), bool)
    for layer, records in run.records.items():
        pairs = zip(records, reference.records[layer], strict=True)
        same &= np.array([mine.same_decisions(other) for mine, other in pairs])
    return same


def check_decisions(reference: Run, run: Run, pruning: Pruning) -> Check:
    """Judge every decision of `run` in float64, and explain every one that differs.

    Right means: what the definition says, if similarities may move by the float noise. Where an
    image first differs from the reference, the margin is how far the similarities must move to
    give the other outcome; after that layer the two see different tokens and are only judged
    each on its own.
    """
    config, prefix = pruning.config, pruning.num_prefix_tokens
    noise = float_noise(_feature_width(run) or pruning.block.embed_dim)
    broken: list[str] = []
    worst, margins, unexplained, decisions = 0.0, [], 0, 0
    turned = np.zeros(len(run.outputs), bool)
    for position, layer in enumerate(config.layers):
        capacity = config.capacity_of(position)
        for image, record in enumerate(run.records[layer]):
            other = reference.records[layer][image]
            decisions += len(record.valid_assignment()) - prefix
            if reason := broken_structure(record, prefix, config.selection):
                broken.append(f"image {image}, layer {layer}: {reason}")
                continue
            for name, each in ((run.name, record), (reference.name, other)):
                if not has_finite_features(each):
                    broken.append(
                        f"image {image}, layer {layer}: the features hold NaN or infinity ({name})"
                    )
            if not (has_finite_features(record) and has_finite_features(other)):
                continue
            worst = max(worst, violation(record, config, capacity, prefix))
            if not turned[image] and not record.same_decisions(other):
                turned[image] = True
                margin, allowed = _explain(record, other, pruning, capacity, noise)
                margins.append(margin)
                unexplained += margin > allowed
    passed = not broken and worst <= noise and not unexplained
    numbers = {
        "decisions": decisions,
        "images": len(turned),
        "images_that_differ": int(turned.sum()),
        "margins_of_differences": margins,
        "unexplained_differences": int(unexplained),
        "largest_violation": worst,
        "float_noise": noise,
        "broken": broken[:5],
    }
    return Check("decisions", passed, _decisions_summary(numbers, worst, margins), numbers)


def _feature_width(run: Run) -> int | None:
    """Return F, the width of what the layers compare, where it is known."""
    known = (each for records in run.records.values() for each in records)
    return next((each.features.shape[1] for each in known if each.features is not None), None)


def _decisions_summary(numbers: dict[str, Any], worst: float, margins: list[float]) -> str:
    if numbers["broken"]:
        return f"decisions cannot be right: {numbers['broken'][0]}"
    text = (
        f"{numbers['decisions']} decisions, wrong by at most {worst:.1e} in similarity "
        f"(float noise {numbers['float_noise']:.1e})"
    )
    if not margins:
        return f"{text}; all images decided alike"
    return (
        f"{text}; {len(margins)} of {numbers['images']} images decided otherwise, "
        f"at a margin of {max(margins):.1e}"
    )


def _explain(
    record: PruneRecord,
    other: PruneRecord,
    pruning: Pruning,
    capacity: int,
    noise: float,
) -> tuple[float, float]:
    """Return the margin of a difference and the largest that rounding can explain.

    The two runtimes' similarities also differ because their features do: where both features are
    at hand by as much as is measured, but at most by what the tolerance allows, and by that much
    against golden cases, which hold no features.
    """
    config, prefix = pruning.config, pruning.num_prefix_tokens
    most = pruning.tolerance.similarity(noise)
    seen = dataclasses.replace(
        record, kept_index=other.kept_index, assignment=_fit(other, len(record.assignment))
    )
    margin = violation(seen, config, capacity, prefix)
    if other.features is None:
        return margin, noise + most
    count = min(len(record.features), len(other.features))
    mine, theirs = (
        compared_similarities(each.features[:count], prefix, config.selection)
        for each in (record, other)
    )
    return margin, noise + min(float(np.abs(mine - theirs).max(initial=0.0)), most)


def _fit(other: PruneRecord, length: int) -> Array:
    """Return the other's assignment with as much padding as this batch has."""
    valid = other.valid_assignment()
    return np.concatenate([valid, np.full(max(0, length - len(valid)), -1, valid.dtype)])


def check_range(largest: dict[str, float], limit: float) -> Check:
    """Compare the largest magnitude of every 16-bit tensor with the end of float16."""
    name = max(largest, key=lambda each: (not math.isfinite(largest[each]), largest[each]))
    value = largest[name]
    passed = math.isfinite(value) and value <= limit
    numbers = {"largest": value, "tensor": name, "limit": limit, "tensors": len(largest)}
    if passed:
        text = (
            f"the largest of {len(largest)} float16 tensors is {value:.4g} of {limit:.0f}: {name}"
        )
    else:
        first = next(each for each, size in largest.items() if not size <= limit)
        numbers["tensor"] = first
        text = spelled(
            f"{first} leaves float16, which ends at {limit:.0f}: use "
            f"{argument('precision', 'bf16')}"
        )
    return Check("range", passed, text, numbers)


def check_batch_invariance(alone: Run, mixed: Run, pruning: Pruning) -> Check:
    """Compare every image alone with itself among others."""
    count = len(alone.outputs)
    head = Run(
        mixed.name,
        mixed.outputs[:count],
        {layer: records[:count] for layer, records in mixed.records.items()},
    )
    if found := not_finite(alone) or not_finite(head):
        return Check("batch_invariance", False, f"NaN or infinity: {found}", {"images": count})
    decided = check_decisions(head, alone, pruning)
    same = images_with_same_decisions(head, alone)
    outputs = check_outputs(head, alone, same, pruning.tolerance)
    passed = bool(decided.passed and outputs.passed)
    return Check(
        "batch_invariance",
        passed,
        f"{count} images alone and in a batch: {outputs.summary}; "
        f"{int(same.sum())} of {count} decided alike",
        {"outputs": outputs.numbers, "decisions": decided.numbers},
    )


def check_pruning(run: Run, pruning: Pruning) -> Check:
    """Say how many tokens went. Nothing pruned shows nothing."""
    config, prefix = pruning.config, pruning.num_prefix_tokens
    if not config.layers:
        return Check(
            "pruning", False, "the model has no prune layers, so nothing about pruning was checked"
        )
    kept = np.array([[len(r.heads()) for r in run.records[layer]] for layer in config.layers])
    read = np.array(
        [[len(r.valid_assignment()) for r in run.records[layer]] for layer in config.layers]
    )
    pruned = int((read - kept).sum())
    by_image = [
        spread_over_blocks(
            pruning.num_tokens, config.layers, row.tolist(), pruning.depth, config.place
        )
        for row in kept.T
    ]
    processed = float(np.mean([tokens_share(pruning.num_tokens, row) for row in by_image]))
    flops = float(
        np.mean([flops_share(pruning.block, pruning.num_tokens, row) for row in by_image])
    )
    numbers = {
        "pruned_patches": pruned,
        "patches": pruning.num_tokens - prefix,
        "kept_by_layer": {
            str(layer): {
                "mean": float(row.mean() - prefix),
                "smallest": int(row.min()) - prefix,
                "largest": int(row.max()) - prefix,
            }
            for layer, row in zip(config.layers, kept, strict=True)
        },
        "tokens_processed": processed,
        "flops": flops,
    }
    if not pruned:
        return Check(
            "pruning",
            False,
            spelled(
                "nothing was pruned on these images, which shows nothing: lower "
                f"{argument('threshold')}, or give pictures of your own with {argument('images')}"
            ),
            numbers,
        )
    chain = " -> ".join(f"{row.mean() - prefix:.0f}" for row in kept)
    text = (
        f"patches {pruning.num_tokens - prefix} -> {chain} on average; "
        f"{processed:.1%} of the tokens and {flops:.1%} of the blocks' FLOPs remain"
    )
    if config.capacities:
        overruled = _overruled(run, pruning)
        numbers["overruled"] = overruled
        text += f"; {_overruled_in_words(overruled, config)}"
    return Check("pruning", True, text, numbers)


def _overruled(run: Run, pruning: Pruning) -> dict[str, Any]:
    """Return in how many images fixed counts overrule the threshold, layer by layer.

    Of the images at the model's own threshold: those that would keep more patches at it than the
    layer's fixed count, of what the layer read.
    """
    config, prefix = pruning.config, pruning.num_prefix_tokens
    patches = pruning.num_tokens - prefix
    reached = [patches, *config.capacities]
    records = {}
    for position, layer in enumerate(config.layers):
        own = config.layer_threshold(position, config.threshold, reached[position] / patches)
        found = run.records[layer]
        records[layer] = [each for each in found if abs(each.threshold - own) < SAME_THRESHOLD]
    return {
        "threshold": config.threshold,
        "images": len(records[config.layers[0]]),
        "by_layer": {
            str(layer): sum(
                kept_at_threshold(record, config, prefix) > config.capacity_of(position)
                for record in records[layer]
            )
            for position, layer in enumerate(config.layers)
        },
    }


def _overruled_in_words(overruled: dict[str, Any], config: PruneConfig) -> str:
    count, number = overruled["images"], config.threshold
    threshold = f"the threshold of {number}"
    if config.curve is not None:
        threshold = f"the calibrated thresholds for {number:.0%} of the FLOPs"
    what = f"the fixed counts remove patches less alike than {threshold}"
    if not any(overruled["by_layer"].values()):
        return f"{what} in none of {count} images"
    where = [f"{found} of {count} at block {at}" for at, found in overruled["by_layer"].items()]
    return f"{what} in so many images: {', '.join(where)}"
