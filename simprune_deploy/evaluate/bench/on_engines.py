"""Engines, on the GPU of this machine."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress
from simprune_deploy.engine.build import EngineOptions, build_engine
from simprune_deploy.engine.builders import like
from simprune_deploy.engine.engine_metadata import TENSORRT, EngineMetadata
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.engine.gpu import find_gpu
from simprune_deploy.engine.inventory import engines_in
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.engine.runtime import Engine
from simprune_deploy.evaluate.bench.inputs import Feed, images_only
from simprune_deploy.evaluate.bench.options import BenchOptions
from simprune_deploy.evaluate.bench.subjects import DENSE, Subject, Subjects, name_of
from simprune_deploy.evaluate.timing import Runner
from simprune_deploy.onnx.exported_folder import MODEL

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata


def engine_subjects(
    stack: contextlib.ExitStack,
    folder: Path,
    metadata: ModelMetadata,
    feeds: dict[float, list[Feed]],
    options: BenchOptions,
    progress: Progress,
) -> Subjects:
    """Return the folder's engine and one of the dense model, both loaded.

    An engine of the folder that fits this machine is taken as it is; otherwise one is built, as
    ``build`` does it, tuned for the batch. The dense one is built like it, and kept beside it.

    Args:
        stack: Closes the engines.
        folder: The exported folder.
        metadata: Its model.
        feeds: By threshold, the batches to run.
        options: The user's choices.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: there is no engine and none can be built here, or it does not run.
    """
    path, built = _pruned_engine(folder, options, len(_first(feeds)["images"]), progress)
    library = find_library(folder, options.plugin) if built.plugin is not None else None
    dense = build_engine(
        folder / MODEL,
        like(built, find_gpu(), None),
        EngineOptions.like(built, options.force),
        of="dense",
        progress=progress,
    )
    fixed = bool(metadata.pruning.capacities) and all(metadata.pruning.capacities)
    graphs = {DENSE: options.cuda_graph, "pruned": options.cuda_graph and fixed}
    progress("loading the engines")
    engines = {
        DENSE: stack.enter_context(Engine(dense.path, cuda_graph=graphs[DENSE])),
        "pruned": stack.enter_context(Engine(path, plugin=library, cuda_graph=graphs["pruned"])),
    }
    plain = [images_only(feed) for feed in next(iter(feeds.values()))]
    models = [Subject(DENSE, _runner(engines[DENSE], plain), _memory(engines[DENSE]))]
    for threshold, batches in feeds.items():
        run = _runner(engines["pruned"], batches)
        name = name_of(threshold, list(feeds))
        models.append(Subject(name, run, _memory(engines["pruned"]), threshold))
    environment = {
        "backend": "engine",
        "run_by": f"{built.title}, through its Python runtime",
        "engines": [path.name, dense.path.name],
        "plugin": f"{built.plugin.file} {built.plugin.sha256[:12]}" if built.plugin else "none",
        "tuned_for": f"batch {built.profile['images']['opt'][0]}",
        "cuda_graphs": [name for name, used in graphs.items() if used] or "none",
    }
    paths = {path: built, dense.path: dense.metadata}
    lines = tuple(
        _trtexec(each, known, library, _first(feeds))
        for each, known in paths.items()
        if known.flavour == TENSORRT
    )
    return Subjects(models, environment, lines)


def _pruned_engine(
    folder: Path, options: BenchOptions, batch: int, progress: Progress
) -> tuple[Path, EngineMetadata]:
    if not options.force:
        for found in engines_in(folder, options.plugin):
            if (
                found.problem is None
                and found.metadata is not None
                and found.metadata.of == "pruned"
            ):
                return found.path, found.metadata
    wanted = EngineOptions(opt_batch=batch, force=options.force)
    try:
        built = build_here(folder, plugin=options.plugin, options=wanted, progress=progress)
    except SimpruneError as error:
        raise SimpruneError(
            f"no engine of {folder} runs here: {error}; --backend onnxruntime times the ONNX file "
            "on the CPU"
        ) from error
    return built.path, built.metadata


def _runner(engine: Engine, batches: list[Feed]) -> Runner:
    def run(index: int) -> float:
        engine.run(batches[index])
        return engine.milliseconds

    return run


def _memory(engine: Engine) -> dict[str, int]:
    memory = engine.memory
    return {
        "engine file": engine.metadata.engine.bytes,
        "scratch": memory.scratch,
        "inputs and outputs": memory.arrays,
        "taken of the GPU": memory.taken,
    }


def _first(feeds: dict[float, list[Feed]]) -> Feed:
    return next(iter(feeds.values()))[0]


def _trtexec(path: Path, metadata: EngineMetadata, library: Path | None, feed: Feed) -> str:
    """Return the line that times an engine with NVIDIA's own program, on given images.

    Without --loadInputs trtexec runs on noise, of which other counts of tokens stay.
    """
    shapes, files = [], []
    for name, profile in metadata.profile.items():
        array: Any = feed[name]
        if profile["min"] != profile["max"]:
            shapes.append(f"{name}:{'x'.join(map(str, array.shape))}")
        files.append(f"{name}:{name}.raw")
    parts = ["trtexec", f"--loadEngine={path}"]
    if metadata.plugin is not None:
        parts.append(f"--dynamicPlugins={library}")
    if shapes:
        parts.append(f"--shapes={','.join(shapes)}")
    return shlex.join([*parts, f"--loadInputs={','.join(files)}", "--warmUp=500"])
