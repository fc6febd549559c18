"""Is the exported model the PyTorch model? Run both, ask every question, give a verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.versions import package_version
from simprune_deploy.onnx.metadata import ModelMetadata, read_metadata
from simprune_deploy.onnx.variants import pruned_layers
from simprune_deploy.parity.backends import Backend, OnnxRuntimeBackend
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
from simprune_deploy.parity.tolerance import cosines
from simprune_deploy.parity.verdict import Check, Verdict
from simprune_deploy.predict.runners import (
    Inputs,
    Run,
    TorchRunner,
    quiet_polygraphy,
    run,
)

if TYPE_CHECKING:
    from simprune_deploy.common.images import ImageSet
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
    backend: Backend | None = None,
) -> tuple[Verdict, Golden]:
    """Compare a graph with the model it was exported from, in PyTorch.

    Args:
        graph: From :func:`simprune_deploy.onnx.exporter.export_onnx`.
        model: The reference.
        images: As the graph takes them: normalized unless the graph normalizes, or uint8.
        progress: Called with a word on what runs next.
        backend: What runs the graph. Default: ONNX Runtime.

    Returns:
        The verdict, and golden cases for other machines.
    """
    metadata = read_metadata(graph)
    if model.config != metadata.pruning and metadata.pruning.layers:
        raise SimpruneError("the reference is pruned otherwise than the exported model says it is")
    backend = backend or OnnxRuntimeBackend(graph, metadata)
    inputs = _inputs(metadata, images.pixels, backend.batch)
    layers = pruned_layers(graph)
    normalize = (metadata.mean, metadata.std) if metadata.export["normalize"] else None
    runner = TorchRunner(
        model, metadata.output, metadata.export["softmax"], normalize, metadata.takes_uint8
    )
    was_training = model.training
    model.eval()
    progress("PyTorch reference")
    try:
        with quiet_polygraphy():
            reference = run(runner, inputs, inputs.mixed(), layers)
    finally:
        model.train(was_training)
    name = f"PyTorch {package_version('torch') or 'of unknown version'} (CPU)"
    reference = Run(name, reference.outputs, reference.records)
    described = {
        "source": images.source,
        "images": list(images.names),
        "skipped": [list(pair) for pair in images.skipped],
    }
    if metadata.precision == "fp32":
        verdict, _ = _prove(graph, metadata, reference, inputs, described, progress, backend)
        return verdict, golden_of(inputs, reference)

    def told(decided: Run) -> Run:
        from simprune_deploy.parity.replay import replay

        progress("PyTorch, told the decisions")
        return replay(runner, decided, inputs, f"{name}, told the decisions")

    verdict, used = _prove(graph, metadata, reference, inputs, described, progress, backend, told)
    return verdict, golden_of(inputs, used)


def compare_with_golden(
    graph: onnx.ModelProto,
    golden: Golden,
    progress: Progress = silent,
    backend: Backend | None = None,
) -> Verdict:
    """Compare a graph with golden cases, in ONNX Runtime by default. Needs no torch."""
    metadata = read_metadata(graph)
    backend = backend or OnnxRuntimeBackend(graph, metadata)
    _check_shape(metadata, golden.images)
    _check_golden(metadata, golden)
    inputs = Inputs(
        golden.images,
        golden.thresholds,
        backend.batch,
        bool(metadata.export["runtime_threshold"]),
    )
    described = {"source": "golden cases", "images": len(golden.images), "skipped": []}
    return _prove(graph, metadata, golden.reference, inputs, described, progress, backend)[0]


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
    return Inputs(pixels, thresholds, batch, runtime)


def _check_shape(metadata: ModelMetadata, pixels: Any) -> None:
    expected = metadata.image_shape
    if pixels.shape[1:] != expected or pixels.dtype != metadata.image_dtype:
        raise SimpruneError(
            f"the images are {pixels.dtype}{list(pixels.shape[1:])}, and the model takes "
            f"{metadata.image_dtype}{list(expected)}"
        )


def _check_golden(metadata: ModelMetadata, golden: Golden) -> None:
    """Refuse golden cases of another model or another threshold."""
    width = metadata.num_classes or metadata.embed_dim
    outputs = golden.reference.outputs
    if outputs.shape != (len(golden.images), width) or outputs.dtype.kind != "f":
        raise SimpruneError(
            f"the golden outputs are {outputs.dtype}{list(outputs.shape)}, and the model gives "
            f"float32{[len(golden.images), width]}: export again"
        )
    wanted = np.float32(metadata.pruning.threshold)
    if not metadata.export["runtime_threshold"] and (golden.thresholds != wanted).any():
        raise SimpruneError(
            f"the golden cases have threshold {golden.thresholds[0]}, the model {wanted}: "
            "export again"
        )


def _prove(
    graph: onnx.ModelProto,
    metadata: ModelMetadata,
    reference: Run,
    inputs: Inputs,
    described: dict[str, Any],
    progress: Progress,
    backend: Backend,
    told: Callable[[Run], Run] | None = None,
) -> tuple[Verdict, Run]:
    """Ask every question; `told` gives the reference's answer to decisions that are not its own.

    Also returns the reference that the outputs were compared with.
    """
    layers = pruned_layers(graph)
    pruning = Pruning(
        metadata.pruning,
        metadata.num_prefix_tokens,
        metadata.num_tokens,
        metadata.depth,
        metadata.block,
        metadata.precision,
    )
    environment = _environment(reference.name, metadata.precision, backend)
    graph_check = check_graph(graph, metadata)
    if not graph_check.passed:
        # what follows reads the graph by its description: it would mean nothing
        skipped = "not asked, because the graph contradicts its description"
        names = ("outputs", "top1", "decisions", "batch_invariance", "pruning")
        checks = (graph_check, *(Check(name, None, skipped) for name in names))
        return Verdict(checks, environment, described), reference
    with quiet_polygraphy(), _explained(backend):
        progress(backend.title)
        shipped = run(backend.shipped(), inputs, inputs.mixed(), [], metadata.output)
        progress(f"{backend.title}, with its decisions shown")
        shown = backend.diagnosed()
        diagnosed = run(shown, inputs, inputs.mixed(), layers, metadata.output)
        alone = None
        if inputs.batch[1] > 1:
            progress(f"{backend.title}, every image alone")
            alone = run(shown, inputs, inputs.alone(ALONE_IMAGES), layers, metadata.output)
        compared = told(diagnosed) if told is not None else reference
        tolerance = pruning.tolerance
        extra = backend.checks(inputs, shipped, diagnosed, tolerance, progress)
        progress("comparison")
        same = images_with_same_decisions(compared, diagnosed)
        same &= backend.vouched(shipped, diagnosed, tolerance)
        invariance = (
            check_batch_invariance(alone, diagnosed, pruning)
            if alone is not None
            else Check("batch_invariance", None, "the model takes one image at a time")
        )
        outputs = check_outputs(compared, shipped, same, tolerance)
        if told is not None:
            outputs = _with_own_decisions(outputs, reference, shipped)
        checks = (
            graph_check,
            outputs,
            check_top1(compared, shipped, same, metadata.num_classes > 0, tolerance),
            check_decisions(reference, diagnosed, pruning),
            invariance,
            check_pruning(diagnosed, pruning),
            *extra,
        )
    return Verdict(checks, environment, described), compared


@contextlib.contextmanager
def _explained(backend: Backend) -> Iterator[None]:
    """Let what a runtime could not do be one line."""
    from polygraphy.exception import PolygraphyException

    try:
        yield
    except PolygraphyException as error:
        raise backend.explain(error) from error


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


def _environment(reference: str, precision: str, backend: Backend) -> dict[str, Any]:
    return {
        "reference": reference,
        "precision": precision,
        **backend.environment(),
        "polygraphy": package_version("polygraphy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
