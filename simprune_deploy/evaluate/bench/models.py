"""The models that are timed, opened: in engines on the GPU, or in ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import RequirementError, SimpruneError, argument, spelled
from simprune_deploy.common.progress import Progress
from simprune_deploy.common.requests import as_path
from simprune_deploy.engine.build import EngineOptions, build_engine
from simprune_deploy.engine.builders import like
from simprune_deploy.engine.engine_metadata import TENSORRT, EngineMetadata
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.engine.gpu import find_gpu
from simprune_deploy.engine.inventory import pruned_engine_in
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.engine.profile import free_inputs
from simprune_deploy.evaluate.bench.machine import usable_cores
from simprune_deploy.evaluate.memory import MemoryRun, probe
from simprune_deploy.evaluate.timing import Runner
from simprune_deploy.onnx.exported_folder import MODEL
from simprune_deploy.predict.engine_predictor import EnginePredictor, EngineSpec
from simprune_deploy.predict.predictor import Predictor
from simprune_deploy.predict.records import Array
from simprune_deploy.predict.source import ModelSource

if TYPE_CHECKING:
    from simprune_deploy.evaluate.bench.request import BenchRequest

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """One model that is timed.

    Attributes:
        name: "dense", "pruned", "pruned at 0.9".
        predictor: What runs it.
        memory: What it takes, by name, in bytes.
        threshold: None for the dense model.
    """

    name: str
    predictor: Predictor
    memory: dict[str, int]
    threshold: float | None = None

    def runner(self, batches: Sequence[Array]) -> Runner:
        """Return what runs batch i."""
        prepared = [self.predictor.prepare(batch, self.threshold) for batch in batches]
        return lambda index: self.predictor.run(prepared[index])


@dataclasses.dataclass(frozen=True)
class TimedModels:
    """All that is timed in one run, and what runs it.

    Attributes:
        models: The dense model first.
        environment: What runs them: versions and settings.
        trtexec: The lines that time the same with NVIDIA's own program.
    """

    models: list[TimedModel]
    environment: dict[str, Any]
    trtexec: tuple[str, ...] = ()


def open_models(
    stack: contextlib.ExitStack,
    source: ModelSource,
    request: BenchRequest,
    thresholds: Sequence[float],
    batches: Sequence[Array],
    progress: Progress,
) -> TimedModels:
    """Open the dense model, and the pruned one at every threshold.

    Args:
        stack: Closes them.
        source: The export.
        request: What was asked for.
        thresholds: To time.
        batches: As the graph takes them.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: they cannot be run here.
    """
    if request.backend == "onnxruntime":
        return _in_onnxruntime(stack, source, request, thresholds, batches, progress)
    return _in_engines(stack, source, request, thresholds, batches, progress)


def _name(threshold: float, thresholds: Sequence[float]) -> str:
    return "pruned" if len(thresholds) == 1 else f"pruned at {threshold}"


def _in_onnxruntime(
    stack: contextlib.ExitStack,
    source: ModelSource,
    request: BenchRequest,
    thresholds: Sequence[float],
    batches: Sequence[Array],
    progress: Progress,
) -> TimedModels:
    threads = request.threads or usable_cores()
    fused = request.fused_attention
    dense, pruned = (
        source.spec(form, threads=threads, fused=fused) for form in ("dense", "pruned")
    )
    unpruned, opened = (stack.enter_context(spec.open()) for spec in (dense, pruned))
    models = []
    chosen: list[tuple[str, float | None]] = [(DENSE, None)]
    chosen += [(_name(each, thresholds), each) for each in thresholds]
    for name, threshold in chosen:
        progress(f"memory: {name}")
        spec = dense if threshold is None else pruned
        found = probe([MemoryRun(spec, batch, threshold) for batch in batches], repeats=1)
        memory = {"process at most": found.peak, "process before the model": found.before}
        known = {what: size for what, size in memory.items() if size is not None}
        models.append(TimedModel(name, unpruned if threshold is None else opened, known, threshold))
    environment: dict[str, Any] = {
        "backend": "onnxruntime",
        "run_by": f"the ONNX file in ONNX Runtime {opened.runtime.version}, on the CPU",
        "threads": threads,
    }
    notes = []
    if fused:
        environment["attention"] = "fused: com.microsoft.MultiHeadAttention"
        wanted = argument("fused_attention", True)
        notes.append(
            spelled(
                "the attention was fused for this run, and the result compared with nothing: "
                f"export with {wanted}, which does, before you ship it"
            )
        )
    if source.metadata.precision == "fp16":
        notes.append(
            "on a CPU, ONNX Runtime casts much of a float16 model to float32 and back: this says "
            "nothing about a GPU"
        )
    elif source.metadata.precision == "bf16":
        notes.append(
            "ONNX Runtime has no bfloat16 on the CPU: what was timed emulates it by rounding "
            "float32, and says nothing about bfloat16"
        )
    if notes:
        environment["note"] = "; ".join(notes)
    return TimedModels(models, environment)


def _in_engines(
    stack: contextlib.ExitStack,
    source: ModelSource,
    request: BenchRequest,
    thresholds: Sequence[float],
    batches: Sequence[Array],
    progress: Progress,
) -> TimedModels:
    """Open the folder's engine and one of the dense model.

    An engine of the folder that fits this machine is taken as it is; otherwise one is built, as
    ``build`` does it, tuned for the batch. The dense one is built like it, and kept beside it.
    """
    folder, metadata = source.folder, source.metadata
    assert folder is not None
    assert source.graph is not None
    path, built = _pruned_engine(folder, request, len(batches[0]), progress)
    library = find_library(folder, as_path(request.plugin)) if built.plugin is not None else None
    dense = build_engine(
        folder / MODEL,
        like(built, find_gpu(), None),
        EngineOptions.like(built, request.force),
        of="dense",
        progress=progress,
    )
    fixed = bool(metadata.pruning.capacities) and all(metadata.pruning.capacities)
    graphs = {DENSE: request.cuda_graph, "pruned": request.cuda_graph and fixed}
    progress("loading the engines")
    unpruned = EngineSpec(dense.path, metadata, "dense", cuda_graph=graphs[DENSE])
    pruned = EngineSpec(path, metadata, plugin=library, cuda_graph=graphs["pruned"])
    predictors = []
    for spec in (unpruned, pruned):
        predictors.append(EnginePredictor(spec))
        stack.enter_context(predictors[-1])
    models = [TimedModel(DENSE, predictors[0], _memory(predictors[0]))]
    models += [
        TimedModel(_name(each, thresholds), predictors[1], _memory(predictors[1]), each)
        for each in thresholds
    ]
    environment = {
        "backend": "engine",
        "run_by": f"{built.title}, through its Python runtime",
        "engines": [path.name, dense.path.name],
        "plugin": f"{built.plugin.file} {built.plugin.sha256[:12]}" if built.plugin else "none",
        "plugin_layers": built.counted,
        "tuned_for": f"batch {built.profile['images']['opt'][0]}",
        "cuda_graphs": [name for name, used in graphs.items() if used] or "none",
    }
    feed = predictors[1].prepare(batches[0], thresholds[0])
    free = free_inputs(source.graph)
    lines = tuple(
        _trtexec(each, known, library, feed, free)
        for each, known in {path: built, dense.path: dense.metadata}.items()
        if known.flavour == TENSORRT
    )
    return TimedModels(models, environment, lines)


def _pruned_engine(
    folder: Path, request: BenchRequest, batch: int, progress: Progress
) -> tuple[Path, EngineMetadata]:
    if not request.force:
        found = pruned_engine_in(folder, as_path(request.plugin))
        if found is not None:
            return found
    wanted = EngineOptions(opt_batch=batch, force=request.force)
    try:
        built = build_here(
            folder, plugin=as_path(request.plugin), options=wanted, progress=progress
        )
    except SimpruneError as error:
        raise RequirementError(
            f"no engine of {folder} runs here: {error.marked}; "
            f"{argument('backend', 'onnxruntime')} times the ONNX file on the CPU"
        ) from error
    return built.path, built.metadata


def _memory(predictor: EnginePredictor) -> dict[str, int]:
    memory = predictor.engine.memory
    return {
        "engine file": predictor.engine.metadata.engine.bytes,
        "scratch": memory.scratch,
        "inputs and outputs": memory.arrays,
        "taken of the GPU": memory.taken,
    }


def _trtexec(
    path: Path,
    metadata: EngineMetadata,
    library: Path | None,
    feed: dict[str, Array],
    free: set[str],
) -> str:
    """Return the line that times an engine with NVIDIA's own program, on given images.

    Without --loadInputs trtexec runs on noise, of which other counts of tokens stay.
    """
    shapes, files = [], []
    for name in metadata.profile:
        array: Any = feed[name]
        if name in free:  # also where the engine takes one batch of several that the graph takes
            shapes.append(f"{name}:{'x'.join(map(str, array.shape))}")
        files.append(f"{name}:{name}.raw")
    parts = ["trtexec", f"--loadEngine={path}"]
    if metadata.plugin is not None:
        parts.append(f"--dynamicPlugins={library}")
    if shapes:
        parts.append(f"--shapes={','.join(shapes)}")
    return shlex.join([*parts, f"--loadInputs={','.join(files)}", "--warmUp=500"])
