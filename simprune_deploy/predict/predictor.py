"""A model, ready to answer for batches of pixels, whatever runs it.

What differs between PyTorch, ONNX Runtime and engines ends here: which file it is, the function
put back, bfloat16, batches and their padding, normalization and uint8, the threshold, the counts.
What is done with the answers (parity, accuracy, sweeps, timing, pictures) is a loop over
predictors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from simprune_deploy.predict.records import Array, PruneRecord

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata

Form = Literal["pruned", "dense"]
Runtime = Literal["torch", "onnxruntime", "engine"]
Provider = Literal["cpu"]
"""Of ONNX Runtime and PyTorch; another device is one more value."""


@dataclasses.dataclass(frozen=True)
class RuntimeInfo:
    """What runs a model.

    Attributes:
        name: "PyTorch", "ONNX Runtime", "TensorRT" or "TensorRT-RTX".
        version: Its version.
        device: "CPU", or the GPU's name.
        notes: How what runs differs from the file: "emulating bfloat16", "function put back".
        details: More for a report, in JSON types: the engine's file and hash, the plugin's.
    """

    name: str
    version: str
    device: str
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """All of it in words: "ONNX Runtime 1.32.0 (CPU, emulating bfloat16)"."""
        return f"{self.name} {self.version} ({', '.join([self.device, *self.notes])})"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answers for n images.

    Attributes:
        outputs: float32[n, ...], the main output.
        kept: int64[n, layers], the patches that each prune layer kept of each image; no column for
            the dense model; None if they were not asked for.
        records: By prune layer one record an image; None if they were not asked for.
    """

    outputs: Array
    kept: Array | None = None
    records: dict[int, list[PruneRecord]] | None = None


class Predictor(Protocol):
    """A model, opened.

    Attributes:
        metadata: Input, preprocessing, pruning, classes; of a checkpoint, as an export would say.
        form: "pruned", or "dense": the same model without its pruning.
        runtime: What runs it.
        batch: The smallest and the largest batch that it runs at once. :meth:`predict` takes any
            number of images: it splits them, and fills a batch that is too small with repeats.
    """

    metadata: ModelMetadata
    form: Form
    runtime: RuntimeInfo
    batch: tuple[int, int]

    def predict(
        self,
        pixels: Array,
        *,
        threshold: float | Array | None = None,
        counts: bool = False,
        decisions: bool = False,
    ) -> Prediction:
        """Answer for images.

        Args:
            pixels: float32[n, C, H, W] in [0, 1]; what the model wants of them (normalized, uint8)
                is done here.
            threshold: One, or float32[n]: one an image. Default None: the model's own.
            counts: Whether to count the patches kept. Default False.
            decisions: Whether to give what every prune layer read and decided. Default False.

        Raises:
            SimpruneError: the runtime cannot run it, or the model's threshold is fixed at another.
        """

    def prepare(self, pixels: Array, threshold: float | None = None) -> Any:
        """Return one batch's inputs as the runtime takes them, for :meth:`run`.

        Args:
            pixels: float32[b, C, H, W] in [0, 1], b within :attr:`batch`.
            threshold: Default None: the model's own.
        """

    def run(self, prepared: Any) -> float | None:
        """Run a prepared batch to its end and give nothing back: what a timer times.

        Returns:
            How many milliseconds of it were the GPU's, if that is known.
        """

    def close(self) -> None:
        """Give back memory and whatever else it holds. Closing twice does no harm."""
