"""What runs the settings of a sweep: ONNX Runtime, PyTorch, or engines (engine_backend.py)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.images import as_uint8_nhwc
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.tune.results import BASELINES, OURS, Setting
from simprune_deploy.tune.subject import Subject
from simprune_deploy.tune.tallies import Executor, Runnable, by_graph

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.pruning.model import PrunedViT

BACKENDS = ("onnxruntime", "torch", "engine")


class Backend(Protocol):
    """Makes what runs a group of settings.

    Attributes:
        name: As in --backend.
        environment: What a report says of it.
        no_memory: Why the memory of a run cannot be measured. None: it can.
    """

    name: str
    environment: dict[str, Any]
    no_memory: str | None

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        """Return the settings in groups that one runnable serves."""

    def prepare(self, group: Sequence[Setting]) -> Runnable:
        """Return a runnable for a group, and for the dense model."""

    def alone(self, group: Sequence[Setting], purpose: str) -> Runnable:
        """Return one that runs nothing but the model, to measure its "time" or its "memory"."""


def backend_of(name: str, subject: Subject, batch: int, progress: Progress = silent) -> Backend:
    """Return the backend of a name.

    Args:
        name: One of :data:`BACKENDS`.
        subject: The model.
        batch: The largest batch it will be given.
        progress: Called with a word on each step where engines have to be built.

    Raises:
        SimpruneError: it is unknown, or cannot run this model here.
    """
    if name == "onnxruntime":
        if subject.metadata.precision == "bf16":
            raise SimpruneError(
                "ONNX Runtime's CPU provider has no bfloat16 kernels: sweep the checkpoint, or an "
                "export in fp32 or fp16"
            )
        return OnnxBackend(subject, batch)
    if name == "torch":
        if subject.model is None:
            raise SimpruneError(
                f"{subject.source} is an exported graph, and --backend torch runs checkpoints: "
                "give the checkpoint"
            )
        return TorchBackend(subject)
    if name == "engine":
        from simprune_deploy.tune.engine_backend import EngineBackend

        return EngineBackend(subject, progress)
    raise SimpruneError(f"backend {name!r} is unknown: use one of {', '.join(BACKENDS)}")


def _version(package: str) -> str:
    from simprune_deploy.common.versions import package_version

    return package_version(package) or "of unknown version"


class OnnxBackend:
    """ONNX Runtime on the CPU. A checkpoint is exported once for all thresholds of a group."""

    name = "onnxruntime"
    no_memory: str | None = None

    def __init__(self, subject: Subject, batch: int) -> None:
        self.subject, self.batch = subject, batch
        self.environment = {
            "backend": self.name,
            "runtime": f"ONNX Runtime {_version('onnxruntime')} (CPU)",
            "graphs": "the exported file"
            if subject.graph is not None
            else "exported for this sweep, one for all thresholds, and not verified: `export` does",
        }

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        return by_graph(settings)

    def prepare(self, group: Sequence[Setting]) -> OnnxRunnable:
        return self._runnable(dataclasses.replace(group[0], threshold=None))

    def alone(self, group: Sequence[Setting], purpose: str) -> OnnxRunnable:
        runnable = self.prepare(group)
        return dataclasses.replace(runnable, key=f"{runnable.key} {purpose}", purpose=purpose)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (a backend lives as long as its sweep)
    def _runnable(self, setting: Setting) -> OnnxRunnable:
        from simprune_deploy.onnx.exporter import ExportOptions, export_onnx
        from simprune_deploy.onnx.metadata import read_metadata
        from simprune_deploy.onnx.variants import dense

        graph, model = self.subject.graph, self.subject.model
        if graph is None:
            assert model is not None
            options = ExportOptions(batch=(1, self.batch), runtime_threshold=True)
            graph = export_onnx(configured(model, setting), options)
        metadata = read_metadata(graph)
        pruned = graph.SerializeToString()
        return OnnxRunnable(
            key=hashlib.sha256(pruned).hexdigest(),
            pruned=pruned,
            dense=dense(graph).SerializeToString(),
            layers=metadata.pruning.layers,
            prefix=metadata.num_prefix_tokens,
            normalize=None if metadata.export["normalize"] else _mean_and_std(metadata),
            batch=metadata.batch,
            takes_uint8=metadata.takes_uint8,
        )


def configured(model: PrunedViT, setting: Setting) -> PrunedViT:
    """Return the model pruned as a setting of ours says; its weights are shared."""
    from simprune_deploy.pruning.model import prune

    return prune(
        model,
        threshold=setting.threshold,
        layers=setting.layers,
        selection=setting.selection,
        reduction=setting.reduction,
        tokens="dynamic" if setting.tokens is None else setting.tokens,
    )


def ours_of(setting: Setting) -> Setting:
    """Return the setting of ours whose token counts a baseline takes."""
    return Setting(OURS, setting.threshold, setting.layers)


def compared(settings: Sequence[Setting]) -> list[Setting]:
    """Return each setting followed by the baselines at its token counts.

    Raises:
        SimpruneError: none of the settings is the operator's usual form, with counts of its own.
    """
    usual = [each for each in settings if each == ours_of(each)]
    if not usual:
        raise SimpruneError(
            "--compare takes the token counts of selection cover, reduction merge and dynamic "
            "tokens: sweep these too"
        )
    return [
        *settings,
        *(dataclasses.replace(each, method=name) for each in usual for name in BASELINES),
    ]


MeanAndStd = tuple[tuple[float, ...], tuple[float, ...]]


def _mean_and_std(metadata: ModelMetadata) -> MeanAndStd:

    wanted = preprocessing_of(metadata)
    return wanted.mean, wanted.std


def normalized(pixels: np.ndarray, normalize: MeanAndStd | None) -> np.ndarray:
    """Return (pixels - mean) / std, or the pixels where the graph normalizes them."""
    if normalize is None:
        return pixels
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in normalize)
    found: np.ndarray = (pixels - mean) / std
    return found


@dataclasses.dataclass(frozen=True)
class OnnxRunnable:
    """Graphs for ONNX Runtime, as they travel to the process that runs them.

    Attributes:
        key: Tells it from others.
        pruned: The graph, serialized.
        dense: The dense model's, serialized.
        layers: Before which it prunes.
        prefix: Number of prefix tokens.
        normalize: Mean and deviation, where the graph does not normalize.
        batch: Smallest and largest batch that the graph takes.
        takes_uint8: Whether images are uint8[B, H, W, C]. Default False.
        purpose: "count" (the graph also gives the patches kept, the default), "time", or "memory"
            (memory is freed as soon as it can be, so that its peak shows).
    """

    key: str
    pruned: bytes
    dense: bytes
    layers: tuple[int, ...]
    prefix: int
    normalize: MeanAndStd | None
    batch: tuple[int, int]
    takes_uint8: bool = False
    purpose: str = "count"

    def open(self) -> Executor:
        return _OnnxExecutor(self)


class _OnnxExecutor:
    def __init__(self, spec: OnnxRunnable) -> None:
        import onnx

        from simprune_deploy.onnx.variants import kept_name, with_kept_counts

        self.spec = spec
        pruned = spec.pruned
        self.counts: list[str] = []
        if spec.purpose == "count":
            graph = onnx.load_from_string(spec.pruned)
            pruned = with_kept_counts(graph).SerializeToString()
            self.counts = [kept_name(layer) for layer in spec.layers]
        keep_memory = spec.purpose != "memory"
        self.pruned_session = _session(pruned, keep_memory)
        self.dense_session = _session(spec.dense, keep_memory)
        self.main = self.dense_session.get_outputs()[0].name
        self.takes_threshold = "threshold" in [i.name for i in self.pruned_session.get_inputs()]

    def dense(self, pixels: np.ndarray) -> np.ndarray:
        (found,) = self._run(self.dense_session, [self.main], pixels, None)
        return found

    def pruned(self, setting: Setting, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        names = [self.main, *self.counts]
        limit = setting.threshold if self.takes_threshold else None
        outputs, *counts = self._run(self.pruned_session, names, pixels, limit)
        kept = np.stack(counts, 1) if counts else np.zeros((len(pixels), 0), np.int64)
        return outputs, kept - self.spec.prefix

    def _run(
        self, session: Any, names: list[str], pixels: np.ndarray, threshold: float | None
    ) -> list[np.ndarray]:
        count, low = len(pixels), self.spec.batch[0]
        # a graph of a fixed batch gets the last picture again, as often as one is missing
        filled = np.concatenate([pixels, np.repeat(pixels[-1:], max(0, low - count), 0)])
        images = normalized(filled, self.spec.normalize)
        feeds = {"images": as_uint8_nhwc(images) if self.spec.takes_uint8 else images}
        if threshold is not None:
            feeds["threshold"] = np.array([threshold], np.float32)
        return [array[:count] for array in session.run(names, feeds)]


def _session(model: bytes, keep_memory: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # set for the workers of a cluster, where it is one; without it, all cores
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    # an arena, or a block planned for the largest shapes, would hide what a run needs
    options.enable_cpu_mem_arena = options.enable_mem_pattern = keep_memory
    # the idle threads of one session must not spin on the cores that another runs on
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class TorchBackend:
    """PyTorch on the CPU: ours, and the methods it is compared with."""

    name = "torch"
    no_memory: str | None = None

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.environment = {"backend": self.name, "runtime": f"PyTorch {_version('torch')} (CPU)"}

    def groups(self, settings: Sequence[Setting]) -> list[list[Setting]]:
        return [list(settings)] if settings else []

    def prepare(self, group: Sequence[Setting]) -> Runnable:
        assert self.subject.model is not None
        return TorchRunnable(
            f"{self.subject.sha256} {self.subject.metadata.pruning}",
            self.subject.model,
            _mean_and_std(self.subject.metadata),
        )

    def alone(self, group: Sequence[Setting], purpose: str) -> Runnable:
        return self.prepare(group)


@dataclasses.dataclass(frozen=True)
class TorchRunnable:
    """A model for PyTorch, as it travels to the process that runs it."""

    key: str
    model: Any
    normalize: MeanAndStd

    def open(self) -> Executor:
        return _TorchExecutor(self)


class _TorchExecutor:
    def __init__(self, spec: TorchRunnable) -> None:
        self.spec = spec
        self.pixels: np.ndarray | None = None
        self.kept: dict[Setting, Any] = {}
        spec.model.eval()

    def dense(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found: np.ndarray = self.spec.model.vit(self._images(pixels)).numpy()
        return found

    def pruned(self, setting: Setting, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        import torch

        from simprune_deploy.tune.baselines import Baseline, kept_counts

        with torch.inference_mode():
            if setting.method != OURS:
                counts = self._counts_of_ours(setting, pixels)
                model = configured(self.spec.model, ours_of(setting))
                run = Baseline(setting.method).run(model, self._images(pixels), counts)
                return run.outputs.numpy(), run.kept.numpy()
            model = configured(self.spec.model, setting)
            traces: list[Any] = []
            outputs = model(self._images(pixels), traces=traces).numpy()
            kept = kept_counts(traces, model.num_prefix_tokens)
        if self.pixels is not pixels:
            self.pixels, self.kept = pixels, {}
        self.kept[setting] = kept
        return outputs, kept.numpy()

    def _counts_of_ours(self, setting: Setting, pixels: np.ndarray) -> Any:
        """Return what ours keeps of these pictures: where it just ran on them, from that run."""
        ours = ours_of(setting)
        if self.pixels is not pixels or ours not in self.kept:
            self.pruned(ours, pixels)
        return self.kept[ours]

    def _images(self, pixels: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(normalized(pixels, self.spec.normalize))
