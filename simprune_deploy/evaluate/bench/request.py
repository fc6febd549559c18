"""What is timed, and how much of it: the user's choices, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.requests import check_listed, check_whole
from simprune_deploy.evaluate.timing import Plan
from simprune_deploy.pruning.config import check_threshold

Backend = Literal["engine", "onnxruntime"]
BACKENDS = ("engine", "onnxruntime")
MOST_THRESHOLDS = 16


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What is timed, and how much of it.

    Args:
        model: An exported folder, or an ONNX file of one.
        backend: "engine" (TensorRT on the GPU, the default) or "onnxruntime" (the ONNX file on
            the CPU).
        batch: Images in a batch. Default None: the smallest that the graph takes.
        thresholds: For exports with a run-time threshold. Default (): the model's own.
        iterations: Timed runs of each model, at least. Default 100.
        warm_up: Runs of each model before that. Default 10.
        images: Folder of pictures. Default None: the golden cases of the folder.
        threads: Of ONNX Runtime. Default None: as many as there are cores to use.
        plugin: The plugin's library, for engines. Default None: looked for as ``build`` does.
        cuda_graph: Replay engines as CUDA graphs where that can be: with fixed token counts, and
            the dense model. Default False.
        force: Build engines again that are there already. Default False.
        fused_attention: Time both models with their attention as ONNX Runtime's
            MultiHeadAttention, as ``export`` writes it to model-fused.onnx. Default False.

    Raises:
        InvalidArgumentError: a value is out of its range, or belongs to the other backend.
    """

    model: str | Path
    backend: Backend = "engine"
    batch: int | None = None
    thresholds: Sequence[float] = ()
    iterations: int = 100
    warm_up: int = 10
    images: str | Path | None = None
    threads: int | None = None
    plugin: str | Path | None = None
    cuda_graph: bool = False
    force: bool = False
    fused_attention: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidArgumentError(
                f"{argument('backend')} {self.backend!r} is unknown: use {' or '.join(BACKENDS)}",
                what="backend",
                value=self.backend,
                allowed=BACKENDS,
            )
        Plan(self.iterations, self.warm_up, 1)
        if self.threads is not None:
            check_whole("threads", self.threads, 1, 1024)
        if self.batch is not None:
            check_whole("batch", self.batch, 1)
        check_listed("thresholds", self.thresholds)
        if len(self.thresholds) > MOST_THRESHOLDS:
            raise InvalidArgumentError(
                f"{len(self.thresholds)} thresholds are too many: give at most {MOST_THRESHOLDS}"
            )
        for threshold in self.thresholds:
            check_threshold(threshold)
        engine_only = {"plugin": self.plugin, "cuda_graph": self.cuda_graph, "force": self.force}
        if self.backend != "engine":
            for name, value in engine_only.items():
                if value:
                    raise _is_for(name, "engine")
        else:
            for name in ("threads", "fused_attention"):
                if getattr(self, name):
                    raise _is_for(name, "onnxruntime")


def _is_for(name: str, backend: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{argument(name)} is for {argument('backend', backend)}: drop it", what=name
    )
