"""Is the ONNX model the PyTorch model? Run both, ask every question, give a verdict."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from simprune_deploy.errors import SimpruneError
from simprune_deploy.onnx.metadata import Facts, read_facts
from simprune_deploy.onnx.precision import LARGEST_FLOAT16, emulated, with_ranges
from simprune_deploy.onnx.variants import pruned_layers, with_diagnostics, with_function
from simprune_deploy.parity.checks import (
    Pruning,
    check_batch_invariance,
    check_decisions,
    check_outputs,
    check_pruning,
    check_range,
    check_top1,
    images_with_same_decisions,
)
from simprune_deploy.parity.golden import Golden, golden_of
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.parity.runners import (
    Inputs,
    Run,
    TorchRunner,
    onnxruntime_runner,
    quiet_polygraphy,
    run,
)
from simprune_deploy.parity.tolerance import cosines
from simprune_deploy.parity.verdict import Check, Verdict

if TYPE_CHECKING:
    from simprune_deploy.images import ImageSet
    from simprune_deploy.pruning.model import PrunedViT

ALONE_IMAGES = 4
"""How many images are also run alone, for batch invariance."""

SPREAD = (-0.15, 0.1)
"""With a runtime threshold the images run again at thresholds of their own, from this much below
the model's to this much above."""

Progress = Callable[[str], None]


def prove_against_torch(
    graph: onnx.ModelProto,
    model: PrunedViT,
    images: ImageSet,
    progress: Progress = lambda step: None,
) -> tuple[Verdict, Golden]:
    """Compare a graph in ONNX Runtime with the model it was exported from, in PyTorch.

    Args:
        graph: From :func:`simprune_deploy.onnx.exporter.export_onnx`.
        model: The reference.
        images: As the graph takes them: normalised unless the graph normalises, or uint8.
        progress: Called with a word on what runs next.

    Returns:
        The verdict, and golden cases for other machines.
    """
    facts = read_facts(graph)
    if model.config != facts.pruning and facts.pruning.layers:
        raise SimpruneError("the reference is pruned otherwise than the exported model says it is")
    inputs = _inputs(facts, images.pixels)
    layers = pruned_layers(graph)
    normalize = (facts.mean, facts.std) if facts.export["normalize"] else None
    runner = TorchRunner(model, facts.output, facts.export["softmax"], normalize, facts.takes_uint8)
    was_training = model.training
    model.eval()
    progress("PyTorch reference")
    try:
        with quiet_polygraphy():
            reference = run(runner, inputs, inputs.mixed(), layers)
    finally:
        model.train(was_training)
    name = f"PyTorch {_version('torch')} (CPU)"
    reference = Run(name, reference.outputs, reference.records)
    described = {
        "source": images.source,
        "images": list(images.names),
        "skipped": [list(pair) for pair in images.skipped],
    }
    if facts.precision == "fp32":
        verdict, _ = _prove(graph, facts, reference, inputs, described, progress)
        return verdict, golden_of(inputs, reference)

    def told(decided: Run) -> Run:
        from simprune_deploy.parity.replay import replay

        progress("PyTorch, told the decisions")
        return replay(runner, decided, inputs, f"{name}, told the decisions")

    verdict, used = _prove(graph, facts, reference, inputs, described, progress, told)
    return verdict, golden_of(inputs, used)


def prove_against_golden(
    graph: onnx.ModelProto, golden: Golden, progress: Progress = lambda step: None
) -> Verdict:
    """Compare a graph in ONNX Runtime with golden cases. Needs no torch."""
    facts = read_facts(graph)
    _check_shape(facts, golden.images)
    _check_golden(facts, golden)
    inputs = Inputs(
        golden.images,
        golden.thresholds,
        facts.batch,
        bool(facts.export["runtime_threshold"]),
    )
    described = {"source": "golden cases", "images": len(golden.images), "skipped": []}
    return _prove(graph, facts, golden.reference, inputs, described, progress)[0]


def _inputs(facts: Facts, pixels: Any) -> Inputs:
    """Return the images, twice over if each can have a threshold of its own."""
    _check_shape(facts, pixels)
    config = facts.pruning
    thresholds = np.full(len(pixels), config.threshold, np.float32)
    runtime = bool(facts.export["runtime_threshold"])
    if runtime:
        own = config.threshold + np.linspace(*SPREAD, len(pixels), dtype=np.float32)
        thresholds = np.concatenate([thresholds, np.clip(own, -1, 2).astype(np.float32)])
        pixels = np.concatenate([pixels, pixels])
    return Inputs(pixels, thresholds, facts.batch, runtime)


def _check_shape(facts: Facts, pixels: Any) -> None:
    expected = facts.image_shape
    if pixels.shape[1:] != expected or pixels.dtype != facts.image_dtype:
        raise SimpruneError(
            f"the images are {pixels.dtype}{list(pixels.shape[1:])}, and the model takes "
            f"{facts.image_dtype}{list(expected)}"
        )


def _check_golden(facts: Facts, golden: Golden) -> None:
    """Refuse golden cases of another model or another threshold."""
    width = facts.num_classes or facts.embed_dim
    outputs = golden.reference.outputs
    if outputs.shape != (len(golden.images), width) or outputs.dtype.kind != "f":
        raise SimpruneError(
            f"the golden outputs are {outputs.dtype}{list(outputs.shape)}, and the model gives "
            f"float32{[len(golden.images), width]}: export again"
        )
    wanted = np.float32(facts.pruning.threshold)
    if not facts.export["runtime_threshold"] and (golden.thresholds != wanted).any():
        raise SimpruneError(
            f"the golden cases have threshold {golden.thresholds[0]}, the model {wanted}: "
            "export again"
        )


def _prove(
    graph: onnx.ModelProto,
    facts: Facts,
    reference: Run,
    inputs: Inputs,
    described: dict[str, Any],
    progress: Progress,
    told: Callable[[Run], Run] | None = None,
) -> tuple[Verdict, Run]:
    """Ask every question; `told` gives the reference's answer to decisions that are not its own.

    Also returns the reference that the outputs were compared with.
    """
    layers = pruned_layers(graph)
    precision = facts.precision
    pruning = Pruning(
        facts.pruning,
        facts.num_prefix_tokens,
        facts.num_tokens,
        facts.depth,
        facts.block,
        precision,
    )
    environment = _environment(reference.name, facts)
    graph_check = check_graph(graph, facts)
    if not graph_check.passed:
        # what follows reads the graph by its description: it would mean nothing
        skipped = "not asked, because the graph contradicts its description"
        names = ("outputs", "top1", "decisions", "batch_invariance", "pruning")
        checks = (graph_check, *(Check(name, None, skipped) for name in names))
        return Verdict(checks, environment, described), reference
    # ONNX Runtime has no plugin for a file that leaves the operator to one
    runnable = with_function(graph)
    # and its CPU provider no bfloat16 kernels
    if precision == "bf16":
        runnable = emulated(runnable, precision)
    with quiet_polygraphy():
        progress("ONNX Runtime")
        shipped = run(
            onnxruntime_runner(runnable.SerializeToString(), "onnxruntime"),
            inputs,
            inputs.mixed(),
            [],
        )
        progress("ONNX Runtime, with its decisions shown")
        shown = onnxruntime_runner(with_diagnostics(runnable).SerializeToString(), "onnxruntime")
        diagnosed = run(shown, inputs, inputs.mixed(), layers)
        alone = None
        if inputs.batch[1] > 1:
            progress("ONNX Runtime, every image alone")
            alone = run(shown, inputs, inputs.alone(ALONE_IMAGES), layers)
        compared = told(diagnosed) if told is not None else reference
        extra: tuple[Check, ...] = ()
        if precision == "fp16":
            progress("ONNX Runtime, every float16 tensor measured")
            extra = (check_range(_ranges(runnable, precision, inputs), LARGEST_FLOAT16),)
        elif precision == "bf16":
            extra = (Check("run", None, NOT_RUN),)
        if not facts.has_function:
            extra = (*extra, Check("plugin", None, NO_PLUGIN))
        progress("comparison")
        same = images_with_same_decisions(compared, diagnosed)
        invariance = (
            check_batch_invariance(alone, diagnosed, pruning)
            if alone is not None
            else Check("batch_invariance", None, "the model takes one image at a time")
        )
        tolerance = pruning.tolerance
        outputs = check_outputs(compared, shipped, same, tolerance)
        if told is not None:
            outputs = _with_own_decisions(outputs, reference, shipped)
        checks = (
            graph_check,
            outputs,
            check_top1(compared, shipped, same, facts.num_classes > 0, tolerance),
            check_decisions(reference, diagnosed, pruning),
            invariance,
            check_pruning(diagnosed, pruning),
            *extra,
        )
    return Verdict(checks, environment, described), compared


NOT_RUN = (
    "the bfloat16 file itself was not run: ONNX Runtime's CPU provider has no bfloat16 kernels. "
    "What ran is the same graph with every bfloat16 tensor held in float32 and rounded"
)

NO_PLUGIN = (
    "the file leaves the operator to a plugin, and none was run here: what ran is the same graph "
    "with the operator's function put back"
)


def _ranges(graph: onnx.ModelProto, precision: str, inputs: Inputs) -> dict[str, float]:
    """Return the largest magnitude over all images of every narrow tensor.

    Runtimes may widen float16 to float32 between operators, and so hide what leaves it; here
    every tensor is rounded.
    """
    measured, names = with_ranges(graph, precision)
    largest = np.zeros(len(names), np.float32)
    with onnxruntime_runner(measured.SerializeToString(), "ranges") as runner:
        for chunk in inputs.mixed():
            found = runner.infer(inputs.feed(chunk, inputs.runtime_threshold))["ranges"]
            largest = np.maximum(largest, np.array(found))
    return dict(zip(names, largest.tolist(), strict=True))


def _with_own_decisions(check: Check, reference: Run, run_: Run) -> Check:
    """Add how far the outputs are from the float32 reference with decisions of its own."""
    cosine = float(cosines(reference.outputs, run_.outputs).min())
    apart = float(np.abs(reference.outputs - run_.outputs).max())
    agree = int((reference.outputs.argmax(1) == run_.outputs.argmax(1)).sum())
    numbers = {
        "largest_difference_with_own_decisions": apart,
        "smallest_cosine_with_own_decisions": cosine,
        "top1_agrees_with_own_decisions": agree,
    }
    text = (
        f"{check.summary}, PyTorch told the decisions; cosine {cosine:.5f} or more to PyTorch "
        "with its own"
    )
    return dataclasses.replace(check, summary=text, numbers={**check.numbers, **numbers})


def _environment(reference: str, facts: Facts) -> dict[str, Any]:
    how = ["CPU"]
    if facts.precision == "bf16":
        how.append("emulating bfloat16")
    if not facts.has_function:
        how.append("function put back")
    return {
        "reference": reference,
        "precision": facts.precision,
        "runtime": f"ONNX Runtime {_version('onnxruntime')} ({', '.join(how)})",
        "polygraphy": _version("polygraphy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": "none used",
    }


def _version(package: str) -> str:
    return package_version(package) or "of unknown version"


def package_version(package: str) -> str | None:
    """Return the installed version of a package or of its ``-gpu`` twin, or None."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
