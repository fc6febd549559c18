"""An engine on the GPU of this machine, in TensorRT or TensorRT-RTX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.engine.engine_metadata import NAMES
from simprune_deploy.engine.loaded_engine import Engine
from simprune_deploy.engine.profile import batch_of
from simprune_deploy.predict.predictor import (
    BatchAnswer,
    Form,
    Predictor,
    RuntimeInfo,
    counted,
    decisions_shown,
    graph_inputs,
)
from simprune_deploy.predict.records import Array

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Engines of one model, as they are opened in the process that runs them.

    Attributes:
        engine: The file whose outputs are given and whose runs are timed.
        metadata: Of the ONNX file it was built of.
        form: Default "pruned".
        showing: An engine of the same graph that also outputs its decisions. Default None: counts
            and decisions cannot be asked for.
        plugin: The library of the plugin that is in them. Default None: none is.
        gpu: What the GPU is called.
        cuda_graph: Replay runs as a CUDA graph. Default False.
    """

    engine: Path
    metadata: ModelMetadata
    form: Form = "pruned"
    showing: Path | None = None
    plugin: Path | None = None
    gpu: str = "GPU"
    cuda_graph: bool = False

    @property
    def key(self) -> str:
        return f"{self.engine} {self.showing} {self.plugin} {self.cuda_graph}"

    def open(self) -> Predictor:
        return EnginePredictor(self)


class EnginePredictor(Predictor):
    """An engine; its decisions, where they are asked for, are those of a second one.

    A builder fuses and orders each graph by itself, so a close call may fall otherwise in the
    engine that shows its decisions: :attr:`decides_elsewhere`.

    Args:
        spec: What to open.

    Raises:
        SimpruneError: an engine does not fit this machine, or cannot be loaded.
    """

    decides_elsewhere = True

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.engine = Engine(spec.engine, plugin=spec.plugin, cuda_graph=spec.cuda_graph)
        self._showing: Engine | None = None
        built = self.engine.metadata
        plugin = built.plugin
        runtime = RuntimeInfo(
            NAMES[built.flavour],
            built.version,
            spec.gpu,
            details={
                "engine": {"file": built.engine.file, "sha256": built.engine.sha256},
                "plugin": {"file": plugin.file, "sha256": plugin.sha256} if plugin else None,
                "decisions_from": "nothing: they are not shown"
                if spec.showing is None
                else (
                    f"{spec.showing.name}: a second engine of the same graph, with its decisions "
                    "as outputs; the outputs are the shipped engine's"
                ),
            },
        )
        layers = spec.metadata.pruning.layers if spec.form == "pruned" else ()
        super().__init__(spec.metadata, spec.form, runtime, batch_of(built.profile), layers)
        self.fixed_threshold = spec.form == "pruned" and "threshold" not in self.engine.inputs

    def prepare(self, images: Array, threshold: float | None = None) -> Any:
        return self._feed(self.engine, images, self.thresholds(threshold, 1))

    def run(self, prepared: Any) -> float | None:
        self.engine.run(prepared)
        return self.engine.milliseconds

    def close(self) -> None:
        self.engine.close()
        if self._showing is not None:
            self._showing.close()

    def _run_batch(
        self, images: Array, limits: Array | None, counts: bool, decisions: bool
    ) -> BatchAnswer:
        shows = bool(self.layers) and (counts or decisions)
        engine = self._engine_that_shows() if shows else self.engine
        found = engine.run(self._feed(engine, images, limits))
        outputs = np.asarray(found[self.metadata.output])
        if not shows:
            return BatchAnswer(outputs, traces={} if decisions else None)
        kept = None
        traces = decisions_shown(found, self.layers)
        if counts:
            assignments = [trace["assignment"] for trace in traces.values()]
            model, name = self.metadata, engine.metadata.engine.file
            kept = counted(assignments, model.num_prefix_tokens, model.num_patches, name)
        return BatchAnswer(outputs, kept, traces if decisions else None)

    def _engine_that_shows(self) -> Engine:
        if self.spec.showing == self.spec.engine:
            return self.engine
        if self._showing is None:
            if self.spec.showing is None:
                raise ArtifactError(
                    f"{self.spec.engine.name} does not show its decisions, and there is no second "
                    "engine that does"
                )
            self._showing = Engine(self.spec.showing, plugin=self.spec.plugin)
        return self._showing

    def _feed(self, engine: Engine, images: Array, limits: Array | None) -> dict[str, Array]:
        return graph_inputs(images, limits if "threshold" in engine.inputs else None)
