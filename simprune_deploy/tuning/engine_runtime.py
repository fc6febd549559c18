"""Runs the settings of a sweep on engines: TensorRT on the GPU of this machine.

An exported folder gets three engines, kept in its ``engines``: the one that ships, which is timed;
the dense model's; and one of the same graph that also shows its decisions, from which the answers
and the patches kept come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simprune_deploy.common.errors import (
    ArtifactError,
    InvalidArgumentError,
    RequirementError,
    SimpruneError,
    argument,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.engine import cuda
from simprune_deploy.engine.build import BuiltEngine, EngineOptions
from simprune_deploy.engine.builders import Builder, for_this_gpu
from simprune_deploy.engine.engine_metadata import TENSORRT
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.engine.inventory import pruned_engine_in
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.onnx.exported_folder import MANIFEST, MODEL
from simprune_deploy.predict.engine_predictor import EngineSpec
from simprune_deploy.predict.source import ModelSource
from simprune_deploy.tuning.results import Setting
from simprune_deploy.tuning.tallies import Models, by_graph

KINDS = ("pruned", "dense", "diagnosis")
ON_THE_CPU = f"{argument('backend', 'onnxruntime')} runs on the CPU"


def check_engines_can_run(model: Path, ray: bool) -> None:
    """Refuse before any work what :class:`EngineRuntime` could not run.

    Args:
        model: What the user gave.
        ray: Whether a cluster is to run it.

    Raises:
        SimpruneError: it is no exported folder, or TensorRT, a GPU or cuda-bindings is missing.
    """
    if ray:
        raise InvalidArgumentError(
            f"{argument('backend', 'engine')} runs on the GPU of this machine alone: leave "
            f"{argument('ray')} out"
        )
    if not (_folder_of(model) / MANIFEST).is_file():
        raise _not_a_folder(str(model))
    _machine()


def _folder_of(model: Path) -> Path:
    """Return the exported folder that is meant by itself or by its model."""
    return model.parent if model.name == MODEL else model


def _not_a_folder(source: str) -> SimpruneError:
    return InvalidArgumentError(
        f"{argument('backend', 'engine')} runs exported folders, and {source} is none: export it "
        f"first, with {argument('runtime_threshold', True)} to choose among thresholds"
    )


def _machine() -> Builder:
    try:
        builder = for_this_gpu(None, use_plugin=False)
        cuda.check_bindings()
    except SimpruneError as error:
        raise RequirementError(f"no engine can run here: {error.marked}; {ON_THE_CPU}") from error
    return builder


class EngineRuntime:
    """TensorRT on the GPU of this machine.

    A folder's engine that fits this machine is taken with its batches, workspace and plugin;
    without one it is built as ``build`` does. The other two are built like it.

    Args:
        source: An exported folder.
        progress: Called with a word on each step of the builds.

    Raises:
        SimpruneError: it is no exported folder, no engine can be built here, or the folder's
            engine does not take the batch that is timed.
    """

    name = "engine"
    no_memory: str | None = (
        "an engine takes its memory once, for the largest batch it was built for, whatever the "
        "threshold: `simprune-deploy bench` says how much"
    )

    def __init__(self, source: ModelSource, progress: Progress = silent) -> None:
        folder = source.folder
        if folder is None or not (folder / MANIFEST).is_file():
            raise _not_a_folder(source.name)
        gpu = _machine().gpu
        assert gpu is not None
        options, use_plugin = _like_the_one_there(folder)
        low = source.metadata.batch[0]
        if options.batch is not None and options.batch[0] > low:
            raise ArtifactError(
                f"the engine of {folder} takes {options.batch[0]} images or more, and batches of "
                f"{low} are timed: `simprune-deploy build {folder}` makes one for all batches"
            )
        built = {
            of: build_here(folder, use_plugin=use_plugin, options=options, of=of, progress=progress)
            for of in KINDS
        }
        self.source, self.engines = source, {of: each.path for of, each in built.items()}
        stamp = built["pruned"].metadata.plugin
        self.plugin = find_library(folder, None) if stamp is not None else None
        metadata = built["pruned"].metadata
        self.gpu = f"{gpu.name} (SM {metadata.compute_capabilities[0]})"
        names = {of: _named(each) for of, each in built.items()}
        self.environment = {
            "backend": self.name,
            "runtime": f"{metadata.title} on {self.gpu}",
            # the cells of engines that were built anew do not belong with the old ones'
            "set of engines": " ".join(_digest(each) for each in built.values()),
            "plugin": f"{stamp.file} {stamp.sha256[:12]}" if stamp else "none",
            "answers": f"of {names['diagnosis']}, built of the same graph with its decisions as "
            f"outputs, and of {names['dense']}; that the shipped engine gives the same is for "
            "`simprune-deploy verify FOLDER --engine` to show",
            "times": f"of the shipped engine, {names['pruned']}, and of {names['dense']}, tuned "
            f"for batch {metadata.profile['images']['opt'][0]}: from arrays in the processor's "
            "memory to arrays there, copies included",
        }

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        return by_graph(settings)

    def models(self, group: Sequence[Setting]) -> Models:
        return self._models(group, self.engines["diagnosis"], self.engines["diagnosis"])

    def alone(self, group: Sequence[Setting], keep_memory: bool) -> Models:
        return self._models(group, self.engines["pruned"], None)

    def _models(self, group: Sequence[Setting], engine: Path, showing: Path | None) -> Models:
        metadata, gpu = self.source.metadata, self.gpu
        pruned = EngineSpec(engine, metadata, showing=showing, plugin=self.plugin, gpu=gpu)
        dense = EngineSpec(self.engines["dense"], metadata, "dense", gpu=gpu)
        return Models(dense, dict.fromkeys(group, pruned))


def _like_the_one_there(folder: Path) -> tuple[EngineOptions, bool]:
    """Return how the folder's engine for this machine was built, so that it is not replaced."""
    found = pruned_engine_in(folder, flavours=(TENSORRT,))
    if found is None:
        return EngineOptions(), True
    _, metadata = found
    return EngineOptions.like(metadata), metadata.plugin is not None


def _named(engine: BuiltEngine) -> str:
    return f"{engine.path.name} {_digest(engine)}"


def _digest(engine: BuiltEngine) -> str:
    return engine.metadata.engine.sha256[:8]
