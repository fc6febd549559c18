"""Is the exported model the PyTorch model? Run both, ask every question, give a verdict."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.versions import package_version
from simprune_deploy.onnx.exported_folder import COMPANIONS
from simprune_deploy.onnx.metadata import ModelMetadata, read_metadata
from simprune_deploy.parity.checks import (
    Pruning,
    check_batch_invariance,
    check_decisions,
    check_outputs,
    check_pruning,
    check_top1,
    images_with_same_decisions,
    not_finite,
)
from simprune_deploy.parity.companion_checks import Companions
from simprune_deploy.parity.decisions import broken_structure, has_finite_features
from simprune_deploy.parity.golden import Golden, golden_of
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.parity.runs import Inputs, Run, run
from simprune_deploy.parity.runtime_checks import runtime_checks, same_outputs
from simprune_deploy.parity.tolerance import cosines
from simprune_deploy.parity.verdict import Check, Verdict
from simprune_deploy.predict.answers import classes_of
from simprune_deploy.predict.onnx_predictor import OnnxPredictor, OnnxSpec

if TYPE_CHECKING:
    from simprune_deploy.common.images import ImageSet
    from simprune_deploy.predict.predictor import Predictor
    from simprune_deploy.pruning.model import PrunedViT

ALONE_IMAGES = 4
"""How many images are also run alone, for batch invariance."""

SPREAD = (-0.15, 0.1)
"""With a runtime threshold the images run again at thresholds of their own, from this much below
the model's to this much above."""


def compare_with_torch(
    graph: onnx.ModelProto,
    model: PrunedViT,
    images: ImageSet,
    progress: Progress = silent,
    predictor: Predictor | None = None,
    forms: Mapping[str, onnx.ModelProto] | None = None,
    answered: tuple[Inputs, Run] | None = None,
) -> tuple[Verdict, Golden]:
    """Compare a graph with the model it was exported from, in PyTorch.

    Args:
        graph: From :func:`simprune_deploy.onnx.exporter.export_onnx`.
        model: The reference.
        images: As the graph takes them: normalized unless the graph normalizes, or uint8.
        progress: Called with a word on what runs next.
        predictor: What runs the graph. Default: ONNX Runtime.
        forms: Companions of the graph, by the name of their file, to compare with it in ONNX
            Runtime. Default: none.
        answered: What :func:`answers_of_torch` gave for these images. Default: it is asked now.

    Returns:
        The verdict, and golden cases for other machines.
    """
    metadata = read_metadata(graph)
    if model.config != metadata.pruning and metadata.pruning.layers:
        raise InvalidArgumentError(
            "the reference is pruned otherwise than the exported model says it is",
            what="reference",
        )
    from simprune_deploy.parity.replay import replay

    predictor = predictor or OnnxSpec(graph.SerializeToString()).open()
    inputs, reference = answered or answers_of_torch(
        model, metadata, images, progress, predictor.batch
    )
    described = {
        "source": images.source,
        "images": list(images.names),
        "skipped": [list(pair) for pair in images.skipped],
    }
    if metadata.precision == "fp32":
        verdict, _ = _compare(
            graph, metadata, reference, inputs, described, progress, predictor, forms=forms
        )
        return verdict, golden_of(inputs, reference)

    def with_decisions_of(decided: Run) -> Run:
        progress("PyTorch, with the runtime's decisions")
        name = f"{reference.name}, with the runtime's decisions"
        return replay(model, metadata, decided, inputs, name)

    verdict, used = _compare(
        graph, metadata, reference, inputs, described, progress, predictor, with_decisions_of, forms
    )
    return verdict, golden_of(inputs, used)


def answers_of_torch(
    model: PrunedViT,
    metadata: ModelMetadata,
    images: ImageSet,
    progress: Progress = silent,
    batch: tuple[int, int] | None = None,
) -> tuple[Inputs, Run]:
    """Ask the reference, in PyTorch.

    Args:
        model: The reference.
        metadata: Of the graph.
        images: As the graph takes them. They come first, at the model's own threshold; where the
            threshold is an input they come again, at thresholds of their own.
        progress: Called with a word on what runs.
        batch: The smallest and the largest batch. Default None: the graph's.
    """
    from simprune_deploy.predict.torch_predictor import TorchPredictor

    inputs = _inputs(metadata, images.pixels, batch or metadata.batch)
    was_training = model.training
    progress("PyTorch reference")
    try:
        return inputs, run(TorchPredictor(model, metadata), inputs, inputs.mixed())
    finally:
        model.train(was_training)


def compare_with_golden(
    graph: onnx.ModelProto,
    golden: Golden,
    progress: Progress = silent,
    predictor: Predictor | None = None,
    forms: Mapping[str, onnx.ModelProto] | None = None,
) -> Verdict:
    """Compare a graph with golden cases, in ONNX Runtime by default. Needs no torch.

    Args:
        graph: As it ships.
        golden: Beside it.
        progress: Called with a word on what runs next.
        predictor: What runs the graph. Default: ONNX Runtime.
        forms: As :func:`compare_with_torch` takes them. Default: none.
    """
    metadata = read_metadata(graph)
    predictor = predictor or OnnxSpec(graph.SerializeToString()).open()
    _check_shape(metadata, golden.images)
    _check_golden(metadata, golden)
    inputs = Inputs(golden.images, golden.thresholds, predictor.batch)
    described = {"source": "golden cases", "images": len(golden.images), "skipped": []}
    return _compare(
        graph, metadata, golden.reference, inputs, described, progress, predictor, forms=forms
    )[0]


def _inputs(metadata: ModelMetadata, pixels: Any, batch: tuple[int, int]) -> Inputs:
    """Return the images, twice over if each can have a threshold of its own."""
    _check_shape(metadata, pixels)
    config = metadata.pruning
    thresholds = np.full(len(pixels), config.threshold, np.float32)
    runtime = bool(metadata.export["runtime_threshold"])
    if runtime:
        own = config.threshold + np.linspace(*SPREAD, len(pixels), dtype=np.float32)
        thresholds = np.concatenate([thresholds, np.clip(own, -1, 2).astype(np.float32)])
        pixels = np.concatenate([pixels, pixels])
    return Inputs(pixels, thresholds, batch)


def _check_shape(metadata: ModelMetadata, pixels: Any) -> None:
    expected = metadata.image_shape
    if pixels.shape[1:] != expected or pixels.dtype != metadata.image_dtype:
        raise InvalidArgumentError(
            f"the images are {pixels.dtype}{list(pixels.shape[1:])}, and the model takes "
            f"{metadata.image_dtype}{list(expected)}"
        )


def _check_golden(metadata: ModelMetadata, golden: Golden) -> None:
    """Refuse golden cases of another model or another threshold."""
    width = metadata.num_classes or metadata.embed_dim
    outputs = golden.reference.outputs
    if outputs.shape != (len(golden.images), width) or outputs.dtype.kind != "f":
        raise ArtifactError(
            f"the golden outputs are {outputs.dtype}{list(outputs.shape)}, and the model gives "
            f"float32{[len(golden.images), width]}: export again"
        )
    wanted = np.float32(metadata.pruning.threshold)
    if not metadata.export["runtime_threshold"] and (golden.thresholds != wanted).any():
        raise ArtifactError(
            f"the golden cases have threshold {golden.thresholds[0]}, the model {wanted}: "
            "export again"
        )


def _compare(
    graph: onnx.ModelProto,
    metadata: ModelMetadata,
    reference: Run,
    inputs: Inputs,
    described: dict[str, Any],
    progress: Progress,
    predictor: Predictor,
    with_decisions_of: Callable[[Run], Run] | None = None,
    forms: Mapping[str, onnx.ModelProto] | None = None,
) -> tuple[Verdict, Run]:
    """Ask every question.

    `with_decisions_of` gives the reference's answer to decisions that are not its own. Also returns
    the reference that the outputs were compared with.
    """
    pruning = Pruning(
        metadata.pruning,
        metadata.num_prefix_tokens,
        metadata.num_tokens,
        metadata.depth,
        metadata.block,
        metadata.precision,
    )
    environment = _environment(reference.name, metadata.precision, predictor)
    graph_check = check_graph(graph, metadata)
    if not graph_check.passed:
        # what follows reads the graph by its description: it would mean nothing
        skipped = "not asked, because the graph contradicts its description"
        names = ["outputs", "top1", "decisions", "batch_invariance", "pruning"]
        names += [COMPANIONS[name] for name in forms or ()]
        checks = (graph_check, *(Check(name, None, skipped) for name in names))
        return Verdict(checks, environment, described), reference
    title = predictor.runtime.name
    progress(title)
    shipped = run(predictor, inputs, inputs.mixed(), decisions=False)
    progress(f"{title}, with its decisions shown")
    shown = run(predictor, inputs, inputs.mixed())
    alone = None
    if inputs.batch[1] > 1:
        progress(f"{title}, every image alone")
        alone = run(predictor, inputs, inputs.alone(ALONE_IMAGES))
    compared = reference
    if with_decisions_of is not None and _can_be_followed(shown, pruning.num_prefix_tokens):
        compared = with_decisions_of(shown)
    tolerance = pruning.tolerance
    extra = runtime_checks(predictor, inputs, shipped, shown, tolerance, progress)
    if forms and isinstance(predictor, OnnxPredictor):
        extra += Companions(predictor, inputs, shipped, shown, pruning).check(forms, progress)
    progress("comparison")
    same = images_with_same_decisions(compared, shown)
    same &= same_outputs(predictor, shown, shipped, tolerance)
    invariance = (
        check_batch_invariance(alone, shown, pruning)
        if alone is not None
        else Check("batch_invariance", None, "the model takes one image at a time")
    )
    # with the tokens of the run that shows them, to name what is not finite first
    outputs = check_outputs(
        compared, dataclasses.replace(shipped, records=shown.records), same, tolerance
    )
    if with_decisions_of is not None and not (not_finite(reference) or not_finite(shipped)):
        outputs = _with_own_decisions(outputs, reference, shipped)
    checks = (
        graph_check,
        outputs,
        check_top1(compared, shipped, same, metadata.num_classes > 0, tolerance),
        check_decisions(reference, shown, pruning),
        invariance,
        check_pruning(shown, pruning),
        *extra,
    )
    return Verdict(checks, environment, described), compared


def _can_be_followed(run_: Run, prefix: int) -> bool:
    """Whether PyTorch can be told a run's decisions: not those taken on NaN, or that contradict
    each other, which the check of decisions reports."""
    return not any(
        broken_structure(record, prefix) or not has_finite_features(record)
        for records in run_.records.values()
        for record in records
    )


def _with_own_decisions(check: Check, reference: Run, run_: Run) -> Check:
    """Add how far the outputs are from the float32 reference with decisions of its own."""
    apart = float(np.abs(reference.outputs - run_.outputs).max())
    agree = int((classes_of(reference.outputs) == classes_of(run_.outputs)).sum())
    numbers: dict[str, Any] = {
        "largest_difference_with_own_decisions": apart,
        "top1_agrees_with_own_decisions": agree,
    }
    if reference.outputs.shape[1] == 1:
        near = f"at most {apart:.2e} from PyTorch with its own"
    else:
        cosine = float(cosines(reference.outputs, run_.outputs).min())
        numbers["smallest_cosine_with_own_decisions"] = cosine
        near = f"cosine {cosine:.5f} or more to PyTorch with its own"
    text = f"{check.summary}, PyTorch with the same decisions; {near}"
    return dataclasses.replace(check, summary=text, numbers={**check.numbers, **numbers})


def _environment(reference: str, precision: str, predictor: Predictor) -> dict[str, Any]:
    runtime = predictor.runtime
    ran: dict[str, Any] = {"runtime": runtime.title, "gpu": "none used"}
    if runtime.details:  # an engine
        file = runtime.details["engine"]["file"]
        title = f"{runtime.name} {runtime.version} on {runtime.device}, {file}"
        ran = {"runtime": title, "gpu": runtime.device, **runtime.details}
    return {
        "reference": reference,
        "precision": precision,
        **ran,
        "polygraphy": package_version("polygraphy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
