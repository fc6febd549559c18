"""What is timed, and how much of it: the user's choices, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.timing import Plan
from simprune_deploy.pruning.config import check_threshold

BACKENDS = ("engine", "onnxruntime")
MOST_THRESHOLDS = 16


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What a user may choose.

    Attributes:
        backend: "engine" (TensorRT on the GPU, the default) or "onnxruntime" (the ONNX file on
            the CPU).
        batch: Images in a batch. Default: the smallest that the graph takes.
        thresholds: For exports with a run-time threshold. Default: the model's own.
        iterations: Timed runs of each model, at least. Default 100.
        warm_up: Runs of each model before that. Default 10.
        images: Folder of pictures. Default: the golden cases of the folder.
        threads: Of ONNX Runtime. Default: as many as there are cores to use.
        plugin: The plugin's library, for engines. Default: looked for as `build` does.
        cuda_graph: Replay engines as CUDA graphs where that can be: with fixed token counts, and
            the dense model. Default False.
        force: Build engines again that are there already. Default False.
    """

    backend: str = "engine"
    batch: int | None = None
    thresholds: tuple[float, ...] = ()
    iterations: int = 100
    warm_up: int = 10
    images: Path | None = None
    threads: int | None = None
    plugin: Path | None = None
    cuda_graph: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise SimpruneError(
                f"--backend {self.backend!r} is unknown: use {' or '.join(BACKENDS)}"
            )
        Plan(self.iterations, self.warm_up, 1)
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise SimpruneError(f"--threads {self.threads} is not between 1 and 1024")
        if len(self.thresholds) > MOST_THRESHOLDS:
            raise SimpruneError(
                f"{len(self.thresholds)} thresholds are too many: give at most {MOST_THRESHOLDS}"
            )
        for threshold in self.thresholds:
            check_threshold(threshold)
        engine_only = {"--plugin": self.plugin, "--cuda-graph": self.cuda_graph}
        engine_only["--force"] = self.force
        if self.backend != "engine":
            for option, value in engine_only.items():
                if value:
                    raise SimpruneError(f"{option} is for --backend engine: drop it")
        elif self.threads is not None:
            raise SimpruneError("--threads is for --backend onnxruntime: drop it")
