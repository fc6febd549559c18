"""A model, ready to answer for batches of pixels, whatever runs it.

What differs between PyTorch, ONNX Runtime and engines ends here: the function put back, bfloat16,
batches and their padding, normalization and uint8, the threshold, the counts. What is done with the
answers (parity, accuracy, sweeps, timing, pictures) is a loop over predictors.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument
from simprune_deploy.common.images import as_uint8_nhwc
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.onnx.variants import DIAGNOSTICS, diagnostic_name
from simprune_deploy.predict.records import Array, PruneRecord
from simprune_deploy.pruning.config import PAD_LOG_SIZE

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata

Form = Literal["pruned", "dense"]
Provider = Literal["cpu"]
"""What ONNX Runtime computes on; another device is one more value."""


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
    device: str = "CPU"
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
            a model that prunes nowhere; None if they were not asked for.
        records: By prune layer one record an image; None if they were not asked for.
    """

    outputs: Array
    kept: Array | None = None
    records: dict[int, list[PruneRecord]] | None = None


@dataclasses.dataclass(frozen=True)
class BatchAnswer:
    """What a runtime gave for one batch of b images.

    Attributes:
        outputs: [b, ...].
        kept: int64[b, layers]; None if not asked for.
        traces: By prune layer, what it read and decided, by name: [b, ...]; None if not asked for.
    """

    outputs: Array
    kept: Array | None = None
    traces: dict[int, dict[str, Array]] | None = None


class Predictor(abc.ABC):
    """A model, opened. A context manager: leaving it closes it.

    Args:
        metadata: Input, preprocessing, pruning and classes; of a checkpoint, as an export would
            say.
        form: "pruned", or "dense": the same model without its pruning.
        runtime: What runs it.
        batch: The smallest and the largest batch that it runs at once.
        layers: The blocks before which it prunes; empty for the dense form.

    Attributes:
        metadata, form, runtime, batch, layers: As given.
        fixed_threshold: Whether it has a threshold that cannot be chosen.
        decides_elsewhere: Whether the decisions that it shows are of another build of the graph
            than its outputs (engines). Default False.
    """

    fixed_threshold = False
    decides_elsewhere = False

    def __init__(
        self,
        metadata: ModelMetadata,
        form: Form,
        runtime: RuntimeInfo,
        batch: tuple[int, int],
        layers: Sequence[int],
    ) -> None:
        self.metadata, self.form, self.runtime, self.batch = metadata, form, runtime, batch
        self.layers = tuple(layers)

    # --- what is done with a model -----------------------------------------------------------

    def predict(
        self,
        pixels: Array,
        *,
        threshold: float | Array | None = None,
        counts: bool = False,
        decisions: bool = False,
    ) -> Prediction:
        """Answer for any number of images.

        Args:
            pixels: float32[n, C, H, W] in [0, 1].
            threshold: One, or float32[n]: one an image. Default None: the model's own.
            counts: Whether to count the patches kept. Default False.
            decisions: Whether to give what every prune layer read and decided. Default False.

        Raises:
            SimpruneError: the runtime cannot run it, or the model's threshold is fixed at another.
        """
        images = self.to_inputs(pixels)
        return self.answer(images, threshold=threshold, counts=counts, decisions=decisions)

    def to_inputs(self, pixels: Array) -> Array:
        """Return float32[n, C, H, W] in [0, 1] as the model takes it: normalized, or uint8."""
        if self.metadata.takes_uint8:
            return as_uint8_nhwc(pixels)
        if self.metadata.export["normalize"]:
            return pixels
        return preprocessing_of(self.metadata).normalize(pixels)

    def answer(
        self,
        images: Array,
        *,
        threshold: float | Array | None = None,
        counts: bool = False,
        decisions: bool = False,
        batches: Sequence[Sequence[int]] | None = None,
    ) -> Prediction:
        """Answer for images that are already as the model takes them.

        Args:
            images: From :meth:`to_inputs`, or the golden cases of an export.
            threshold, counts, decisions: As in :meth:`predict`.
            batches: The numbers of the images that run together; one that comes twice fills up.
                Default: the largest batches, the last filled up with repeats of its last image.
        """
        limits = self.thresholds(threshold, len(images))
        rows: dict[int, tuple[Any, ...]] = {}
        for batch in batches if batches is not None else split(len(images), self.batch):
            chosen = None if limits is None else limits[list(batch)]
            found = self._run_batch(images[list(batch)], chosen, counts, decisions)
            for row, image in enumerate(batch):
                if image not in rows:
                    limit = None if chosen is None else chosen[row]
                    rows[image] = (
                        found.outputs[row],
                        None if found.kept is None else found.kept[row],
                        _records(found.traces, row, limit, self.metadata),
                    )
        return _joined([rows[image] for image in sorted(rows)], self.layers, counts, decisions)

    def thresholds(self, threshold: float | Array | None, count: int) -> Array | None:
        """Return float32[count], or None for a model that has no threshold to feed or tell.

        Raises:
            InvalidArgumentError: the model's threshold is fixed, and another was asked for.
        """
        own = self.metadata.pruning.threshold
        if self.form == "dense":
            return None
        wanted = np.full(count, own if threshold is None else threshold, np.float32)
        if self.fixed_threshold and (wanted != np.float32(own)).any():
            raise InvalidArgumentError(
                f"the threshold of this export is fixed at {own}: export with "
                f"{argument('runtime_threshold', True)} to choose others",
                what="threshold",
                value=threshold,
                allowed=own,
            )
        return wanted

    # --- what a timer does -------------------------------------------------------------------

    @abc.abstractmethod
    def prepare(self, images: Array, threshold: float | None = None) -> Any:
        """Return one batch's inputs as the runtime takes them, for :meth:`run`.

        Args:
            images: [b, ...] as the model takes them, b within :attr:`batch`.
            threshold: Default None: the model's own.
        """

    @abc.abstractmethod
    def run(self, prepared: Any) -> float | None:
        """Run a prepared batch to its end and give nothing back: what a timer times.

        Returns:
            How many milliseconds of it were the GPU's, if that is known.
        """

    # --- what a runtime does -----------------------------------------------------------------

    @abc.abstractmethod
    def _run_batch(
        self, images: Array, limits: Array | None, counts: bool, decisions: bool
    ) -> BatchAnswer:
        """Run one batch within :attr:`batch`; `limits` is float32[b] or None."""

    def close(self) -> None:  # noqa: B027  (a runtime may have nothing to give back)
        """Give back memory and whatever else it holds. Closing twice does no harm."""

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PredictorSpec(Protocol):
    """What becomes a predictor in whichever process it is opened; it can be pickled."""

    @property
    def key(self) -> str:
        """Tells it from others."""

    def open(self) -> Predictor:
        """Open it here."""


def split(count: int, batch: tuple[int, int]) -> list[list[int]]:
    """Return the numbers of `count` images in batches; the last one is filled up with repeats."""
    low, high = batch
    chunks = [list(range(at, min(at + high, count))) for at in range(0, count, high)]
    if chunks:
        chunks[-1] += [count - 1] * (low - len(chunks[-1]))
    return chunks


def one_or_each(limits: Array) -> Array:
    """Return thresholds as a graph takes them: one is enough where all are the same."""
    return limits[:1] if (limits == limits[0]).all() else limits


def graph_inputs(images: Array, limits: Array | None) -> dict[str, Array]:
    """Return a graph's inputs by name; `limits` is None where it takes no threshold."""
    if limits is None:
        return {"images": images}
    return {"images": images, "threshold": one_or_each(limits)}


def decisions_shown(found: Mapping[str, Any], layers: Sequence[int]) -> dict[int, dict[str, Array]]:
    """Return by prune layer what it read and decided, of the outputs of a graph that shows it."""
    return {
        layer: {what: np.asarray(found[diagnostic_name(layer, what)]) for what in DIAGNOSTICS}
        for layer in layers
    }


def counted(
    assignments: Sequence[Array], prefix: int, patches: int, what: str = "the model"
) -> Array:
    """Return int64[b, layers], the patches kept, from where every token went.

    Kept tokens fill the first slots, and padding has none.

    Raises:
        ArtifactError: the numbers cannot be: what runs decides wrongly.
    """
    columns = [np.asarray(each).max(1) + 1 - prefix for each in assignments]
    kept = np.stack(columns, 1).astype(np.int64)
    if kept.size and not 1 <= kept.min() <= kept.max() <= patches:
        raise ArtifactError(
            f"{what} keeps {kept.min()} to {kept.max()} patches of an image of {patches}: it "
            "decides wrongly; `simprune-deploy verify` says more"
        )
    return kept


def _records(
    traces: dict[int, dict[str, Array]] | None, row: int, limit: Any, metadata: ModelMetadata
) -> dict[int, PruneRecord]:
    """Return what every prune layer read and decided for one image, and its threshold there."""
    config, prefix = metadata.pruning, metadata.num_prefix_tokens
    records = {}
    for layer, found in (traces or {}).items():
        log_size = found["log_size"][row]
        patches = int((log_size > PAD_LOG_SIZE / 2).sum()) - prefix
        threshold = float(limit)
        if layer in config.layers:  # an export that can prune nothing has no layers
            position, left = config.layers.index(layer), patches / metadata.num_patches
            threshold = config.layer_threshold(position, threshold, left)
        arrays = {what: array[row] for what, array in found.items()}
        records[layer] = PruneRecord(threshold=threshold, **arrays)
    return records


def _joined(
    rows: list[tuple[Any, ...]], layers: tuple[int, ...], counts: bool, decisions: bool
) -> Prediction:
    outputs = np.stack([row[0] for row in rows]) if rows else np.zeros((0, 0), np.float32)
    kept = None
    if counts:
        none = np.zeros((len(rows), 0), np.int64)
        kept = np.stack([row[1] for row in rows]) if layers and rows else none
    records = {layer: [row[2][layer] for row in rows] for layer in layers} if decisions else None
    return Prediction(outputs, kept, records)
