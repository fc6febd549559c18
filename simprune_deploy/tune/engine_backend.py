"""Runs the settings of a sweep on engines: TensorRT on the GPU of this machine.

An exported folder gets three engines, kept in its ``engines``: the one that ships, which is timed;
the dense model's; and one of the same graph that also shows its decisions, from which the answers
and the patches kept come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.images import as_uint8_nhwc
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.engine import cuda
from simprune_deploy.engine.build import BuiltEngine, EngineOptions
from simprune_deploy.engine.builders import Builder, for_this_gpu
from simprune_deploy.engine.engine_metadata import TENSORRT
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.engine.inventory import engines_in
from simprune_deploy.engine.libraries import find_library
from simprune_deploy.engine.runtime import Engine
from simprune_deploy.onnx.exported_folder import MANIFEST
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.onnx.variants import diagnostic_name
from simprune_deploy.tune.backends import MeanAndStd, normalized
from simprune_deploy.tune.results import Setting
from simprune_deploy.tune.subject import Subject
from simprune_deploy.tune.tallies import Executor, by_graph

KINDS = ("pruned", "dense", "diagnosis")
ON_THE_CPU = "--backend onnxruntime runs on the CPU"


def check_engines_can_run(model: Path, ray: bool) -> None:
    """Refuse before any work what :class:`EngineBackend` could not run.

    Args:
        model: What the user gave.
        ray: Whether a cluster is to run it.

    Raises:
        SimpruneError: it is no exported folder, or TensorRT, a GPU or cuda-bindings is missing.
    """
    if ray:
        raise SimpruneError(
            "--backend engine runs on the GPU of this machine alone: leave --ray out"
        )
    if not (model / MANIFEST).is_file():
        raise _not_a_folder(str(model))
    _machine()


def _not_a_folder(source: str) -> SimpruneError:
    return SimpruneError(
        f"--backend engine runs exported folders, and {source} is none: export it first, with "
        "--runtime-threshold to choose among thresholds"
    )


def _machine() -> Builder:
    try:
        builder = for_this_gpu(None, use_plugin=False)
        cuda.check_bindings()
    except SimpruneError as error:
        raise SimpruneError(f"no engine can run here: {error}; {ON_THE_CPU}") from error
    return builder


class EngineBackend:
    """TensorRT on the GPU of this machine.

    A folder's engine that fits this machine is taken with its batches, workspace and plugin;
    without one it is built as ``build`` does. The other two are built like it.

    Args:
        subject: An exported folder.
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

    def __init__(self, subject: Subject, progress: Progress = silent) -> None:
        folder = Path(subject.source)
        if subject.graph is None or not folder.is_dir():
            raise _not_a_folder(subject.source)
        gpu = _machine().gpu
        assert gpu is not None
        options, use_plugin = _like_the_one_there(folder)
        low = subject.metadata.batch[0]
        if options.batch is not None and options.batch[0] > low:
            raise SimpruneError(
                f"the engine of {folder} takes {options.batch[0]} images or more, and batches of "
                f"{low} are timed: `simprune-deploy build {folder}` makes one for all batches"
            )
        built = {
            of: build_here(folder, use_plugin=use_plugin, options=options, of=of, progress=progress)
            for of in KINDS
        }
        self.subject, self.engines = subject, {of: each.path for of, each in built.items()}
        stamp = built["pruned"].metadata.plugin
        self.plugin = find_library(folder, None) if stamp is not None else None
        metadata = built["pruned"].metadata
        names = {of: _named(each) for of, each in built.items()}
        self.environment = {
            "backend": self.name,
            "runtime": f"{metadata.title} on {gpu.name} (SM {metadata.compute_capabilities[0]})",
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

    def prepare(self, group: Sequence[Setting]) -> EngineRunnable:
        return self._runnable("diagnosis")

    def alone(self, group: Sequence[Setting], purpose: str) -> EngineRunnable:
        return self._runnable("pruned")

    def _runnable(self, of: str) -> EngineRunnable:
        metadata, graph = self.subject.metadata, self.subject.graph
        assert graph is not None
        wanted = preprocessing_of(metadata)
        return EngineRunnable(
            key=f"{self.environment['set of engines']} {of}",
            pruned=self.engines[of],
            dense=self.engines["dense"],
            plugin=self.plugin,
            main=graph.graph.output[0].name,
            decisions=metadata.pruning.layers if of == "diagnosis" else (),
            prefix=metadata.num_prefix_tokens,
            patches=metadata.num_patches,
            normalize=None if metadata.export["normalize"] else (wanted.mean, wanted.std),
            takes_uint8=metadata.takes_uint8,
        )


def _like_the_one_there(folder: Path) -> tuple[EngineOptions, bool]:
    """Return how the folder's engine for this machine was built, so that it is not replaced."""
    for found in engines_in(folder):
        metadata = found.metadata
        if (
            found.problem is None
            and metadata is not None
            and (metadata.of, metadata.flavour) == ("pruned", TENSORRT)
        ):
            return EngineOptions.like(metadata), metadata.plugin is not None
    return EngineOptions(), True


def _named(engine: BuiltEngine) -> str:
    return f"{engine.path.name} {_digest(engine)}"


def _digest(engine: BuiltEngine) -> str:
    return engine.metadata.engine.sha256[:8]


@dataclasses.dataclass(frozen=True)
class EngineRunnable:
    """Engines, as they are opened in the process that runs them.

    Attributes:
        key: Tells it from others.
        pruned: The engine file.
        dense: The dense model's.
        plugin: The library of the plugin that is in the first; None: none is.
        main: The output with the model's answer.
        decisions: The prune layers whose decisions the engine shows; empty: it shows none.
        prefix: Number of prefix tokens.
        patches: Number of patches of an image.
        normalize: Mean and deviation, where the graph does not normalize.
        takes_uint8: Whether images are uint8[B, H, W, C].
    """

    key: str
    pruned: Path
    dense: Path
    plugin: Path | None
    main: str
    decisions: tuple[int, ...]
    prefix: int
    patches: int
    normalize: MeanAndStd | None
    takes_uint8: bool

    def open(self) -> Executor:
        return _EngineExecutor(self)


class _EngineExecutor:
    def __init__(self, spec: EngineRunnable) -> None:
        self.spec = spec
        self.pruned_engine = Engine(spec.pruned, plugin=spec.plugin)
        self.dense_engine = Engine(spec.dense)

    def dense(self, pixels: np.ndarray) -> np.ndarray:
        return self._run(self.dense_engine, (), pixels, None)[0]

    def pruned(self, setting: Setting, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._run(self.pruned_engine, self.spec.decisions, pixels, setting.threshold)

    def _run(
        self, engine: Engine, layers: Sequence[int], pixels: np.ndarray, threshold: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run as many batches as it takes, each within those that the engine was built for."""
        images = engine.inputs["images"]
        low, high = images.smallest[0], images.largest[0]
        outputs, kept = [], []
        for start in range(0, len(pixels), high):
            chunk = pixels[start : start + high]
            # a batch that is too small gets the last picture again, as often as one is missing
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], max(0, low - len(chunk)), 0)])
            found = engine.run(self._feed(engine, filled, threshold))
            outputs.append(found[self.spec.main][: len(chunk)])
            kept.append(self._kept(found, layers, len(chunk)))
        return np.concatenate(outputs), np.concatenate(kept)

    def _feed(
        self, engine: Engine, pixels: np.ndarray, threshold: float | None
    ) -> dict[str, np.ndarray]:
        images = normalized(pixels, self.spec.normalize)
        feed = {"images": as_uint8_nhwc(images) if self.spec.takes_uint8 else images}
        if "threshold" in engine.inputs:
            feed["threshold"] = np.array([threshold], np.float32)
        return feed

    def _kept(self, found: dict[str, Any], layers: Sequence[int], count: int) -> np.ndarray:
        """Return int64[count, layers]: kept tokens fill the first slots, padding has none."""
        kept = np.zeros((count, len(layers)), np.int64)
        for column, layer in enumerate(layers):
            assignment = found[diagnostic_name(layer, "assignment")][:count]
            kept[:, column] = assignment.max(1) + 1 - self.spec.prefix
        if kept.size and not 1 <= kept.min() <= kept.max() <= self.spec.patches:
            raise SimpruneError(
                f"{self.spec.pruned.name} keeps {kept.min()} to {kept.max()} patches of an image "
                f"of {self.spec.patches}: it decides wrongly; `simprune-deploy verify --engine` "
                "says more"
            )
        return kept
