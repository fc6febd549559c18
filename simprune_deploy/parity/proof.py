"""Is the ONNX model the PyTorch model? Run both, ask every question, give a verdict."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from simprune_deploy.errors import SimpruneError
from simprune_deploy.onnx.metadata import Facts, read_facts
from simprune_deploy.onnx.variants import pruned_layers, with_diagnostics
from simprune_deploy.parity.checks import (
    Pruning,
    check_batch_invariance,
    check_decisions,
    check_outputs,
    check_pruning,
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
        images: As the graph takes them (normalised unless the graph normalises).
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
    runner = TorchRunner(model, facts.output, facts.export["softmax"], normalize)
    was_training = model.training
    model.eval()
    progress("PyTorch reference")
    try:
        with quiet_polygraphy():
            reference = run(runner, inputs, inputs.mixed(), layers)
    finally:
        model.train(was_training)
    reference = Run(f"PyTorch {_version('torch')} (CPU)", reference.outputs, reference.records)
    described = {
        "source": images.source,
        "images": list(images.names),
        "skipped": [list(pair) for pair in images.skipped],
    }
    verdict = _prove(graph, facts, reference, inputs, described, progress)
    return verdict, golden_of(inputs, reference)


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
    return _prove(graph, facts, golden.reference, inputs, described, progress)


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
    expected = (facts.channels, *facts.image_size)
    if pixels.shape[1:] != expected or pixels.dtype != np.float32:
        raise SimpruneError(
            f"the images are {pixels.dtype}{list(pixels.shape[1:])}, and the model takes "
            f"float32{list(expected)}"
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
) -> Verdict:
    layers = pruned_layers(graph)
    pruning = Pruning(
        facts.pruning, facts.num_prefix_tokens, facts.num_tokens, facts.depth, facts.block
    )
    graph_check = check_graph(graph, facts)
    if not graph_check.passed:
        # what follows reads the graph by its description: it would mean nothing
        skipped = "not asked, because the graph contradicts its description"
        names = ("outputs", "top1", "decisions", "batch_invariance", "pruning")
        checks = (graph_check, *(Check(name, None, skipped) for name in names))
        return Verdict(checks, _environment(reference.name), described)
    with quiet_polygraphy():
        progress("ONNX Runtime")
        shipped = run(
            onnxruntime_runner(graph.SerializeToString(), "onnxruntime"),
            inputs,
            inputs.mixed(),
            [],
        )
        progress("ONNX Runtime, with its decisions shown")
        shown = onnxruntime_runner(with_diagnostics(graph).SerializeToString(), "onnxruntime")
        diagnosed = run(shown, inputs, inputs.mixed(), layers)
        alone = None
        if inputs.batch[1] > 1:
            progress("ONNX Runtime, every image alone")
            alone = run(shown, inputs, inputs.alone(ALONE_IMAGES), layers)
        progress("comparison")
        same = images_with_same_decisions(reference, diagnosed)
        invariance = (
            check_batch_invariance(alone, diagnosed, pruning)
            if alone is not None
            else Check("batch_invariance", None, "the model takes one image at a time")
        )
        checks = (
            graph_check,
            check_outputs(reference, shipped, same),
            check_top1(reference, shipped, same, facts.num_classes > 0),
            check_decisions(reference, diagnosed, pruning),
            invariance,
            check_pruning(diagnosed, pruning),
        )
    return Verdict(checks, _environment(reference.name), described)


def _environment(reference: str) -> dict[str, Any]:
    return {
        "reference": reference,
        "runtime": f"ONNX Runtime {_version('onnxruntime')} (CPU)",
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
