"""A pruned model, or its dense form, in PyTorch on the CPU."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.versions import package_version
from simprune_deploy.onnx.variants import DIAGNOSTICS
from simprune_deploy.predict.predictor import (
    BatchAnswer,
    Form,
    Predictor,
    RuntimeInfo,
    counted,
)
from simprune_deploy.predict.records import Array

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.pruning.model import PrunedViT

MOST_AT_ONCE = 1024


class TorchPredictor(Predictor):
    """A model in PyTorch, with images as an export of it takes them.

    Args:
        model: In float32, on the CPU; it is put into eval mode.
        metadata: How images come (uint8, normalized or not) and what the output is (softmax).
        form: Default "pruned".
        batch: Default: 1 to :data:`MOST_AT_ONCE`.
    """

    def __init__(
        self,
        model: PrunedViT,
        metadata: ModelMetadata,
        form: Form = "pruned",
        batch: tuple[int, int] = (1, MOST_AT_ONCE),
    ) -> None:
        runtime = RuntimeInfo("PyTorch", package_version("torch") or "of unknown version")
        layers = model.config.layers if form == "pruned" else ()
        super().__init__(metadata, form, runtime, batch, layers)
        self.model = model.eval()

    def prepare(self, images: Array, threshold: float | None = None) -> Any:
        import torch

        limits = self.thresholds(threshold, 1)
        return torch.from_numpy(images), None if limits is None else torch.from_numpy(limits)

    def run(self, prepared: Any) -> float | None:
        images, limits = prepared
        self._forward(images, limits, None)
        return None

    def _run_batch(
        self, images: Array, limits: Array | None, counts: bool, decisions: bool
    ) -> BatchAnswer:
        import torch

        traces: list[Any] | None = [] if counts or decisions else None
        limit = None if limits is None else torch.from_numpy(limits)
        outputs = self._forward(torch.from_numpy(images), limit, traces).numpy()
        kept = shown = None
        if counts and traces:
            assignments = [trace.assignment.numpy() for trace in traces]
            kept = counted(assignments, self.model.num_prefix_tokens, self.model.num_patches)
        if decisions:
            shown = {trace.layer: trace_arrays(trace) for trace in traces or ()}
        return BatchAnswer(outputs, kept, shown)

    def _forward(self, images: Any, limits: Any, traces: list[Any] | None) -> Any:
        import torch

        with torch.inference_mode():
            if self.metadata.takes_uint8:
                images = images.to(torch.float32).permute(0, 3, 1, 2) / 255
            if self.metadata.export["normalize"]:
                values = (self.metadata.mean, self.metadata.std)
                mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in values)
                images = (images - mean) / std
            if self.form == "dense":
                result = self.model.vit(images)
            else:
                result = self.model(images, threshold=limits, traces=traces)
            return result.softmax(-1) if self.metadata.export["softmax"] else result


def trace_arrays(trace: Any) -> dict[str, Array]:
    """Return what a prune layer read and decided as arrays, by name."""
    return {what: getattr(trace, what).numpy() for what in DIAGNOSTICS}


@dataclasses.dataclass(frozen=True)
class TorchSpec:
    """A model for PyTorch, as it travels to the process that runs it.

    Attributes:
        model: The pruned model.
        metadata: As in :class:`TorchPredictor`.
        form: Default "pruned".
        identity: Tells the weights from others. Default: their hash.
    """

    model: Any
    metadata: ModelMetadata
    form: Form = "pruned"
    identity: str = ""

    @property
    def key(self) -> str:
        identity = self.identity or sha256_of_weights(self.model)
        return f"{identity} {self.model.config} {self.form}"

    def open(self) -> Predictor:
        return TorchPredictor(self.model, self.metadata, self.form)


def sha256_of_weights(model: PrunedViT) -> str:
    """Return the SHA-256 of a model's names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vit.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return digest.hexdigest()
