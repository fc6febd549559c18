"""What models predict for a data set: a class for every picture, and of a single output its value.

Models are asked batch by batch in one pass over the pictures, so that memory does not grow with
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import DataError, InvalidArgumentError, ToolFailedError
from simprune_deploy.predict.answers import classes_of, cut_of
from simprune_deploy.predict.predictor import Predictor

if TYPE_CHECKING:
    from simprune_deploy.evaluate.datasets import DataSet
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.predict.source import ModelSource

BATCH = 32


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """A model that takes part in a comparison.

    Attributes:
        title: What it is and what runs it, for people.
        predictor: Opened.
        weights: Norm of every tensor that keeps its name and values from checkpoint to graph.
    """

    title: str
    predictor: Predictor
    weights: dict[str, float]

    @property
    def metadata(self) -> ModelMetadata:
        return self.predictor.metadata


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What one model predicted.

    Attributes:
        title: Of the model.
        identity: What tells models apart; see :func:`identity_of`.
        weights: As in :class:`ComparedModel`.
        classes: int64[n], the class for every readable picture: that with the largest output, or
            of a single output the side of `cut` that it is on.
        values: float32[n], the single outputs; None of models with more.
        cut: Where these are cut into classes; None of models with more.
    """

    title: str
    identity: dict[str, Any]
    weights: dict[str, float]
    classes: np.ndarray
    values: np.ndarray | None = None
    cut: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The predictions of one or two models for the same pictures.

    Attributes:
        predictions: One for each model, in order.
        labels: int64[n]; None without labels.
        skipped: (name, reason) of the pictures that could not be read.
    """

    predictions: tuple[Predictions, ...]
    labels: np.ndarray | None
    skipped: list[tuple[str, str]]


def identity_of(metadata: ModelMetadata) -> dict[str, Any]:
    """Return what two models have in common that answer the same question in the same form."""
    return {
        "architecture": metadata.architecture,
        "model_args": metadata.model_args,
        "image_size": list(metadata.image_size),
        "channels": metadata.channels,
        "num_classes": metadata.num_classes,
    }


def open_model(source: ModelSource, dense: bool = False) -> ComparedModel:
    """Open a model where it is at home: a checkpoint in PyTorch, an export in ONNX Runtime.

    Args:
        source: The model.
        dense: Without its pruning. Default False.
    """
    predictor = source.spec("dense" if dense else "pruned").open()
    pruning, runtime = source.metadata.pruning, predictor.runtime
    ran = [f"{runtime.name} {runtime.version}", runtime.device, *runtime.notes]
    if source.model is not None:
        pruned = bool(pruning.layers) and not dense
        what = f"{source.name}, {f'pruned at {pruning.point()}' if pruned else 'dense'}"
    else:
        ran.append(source.metadata.precision)
        pruned = bool(pruning.layers)
        how = "without its pruning" if dense else f"pruned at {pruning.point()}"
        what = f"{source.name}, {how}" if pruned or dense else source.name
    return ComparedModel(f"{what} ({', '.join(ran)})", predictor, weight_norms(source))


def predict_classes(
    models: Sequence[ComparedModel],
    data: DataSet,
    advance: Callable[[int], None],
    cut: float | None = None,
) -> Comparison:
    """Return every model's predictions for the pictures, which are read once.

    Args:
        models: Their inputs must be alike.
        data: The pictures, prepared as the first model wants them.
        advance: Called with the number of pictures done.
        cut: Of models with one output: above it is class 1. Default None: 0.

    Raises:
        SimpruneError: a model gives no classes or no numbers, or too many pictures are unreadable.
    """
    for each in models:
        if not each.metadata.num_classes:
            raise InvalidArgumentError(
                f"{each.title} gives features, not classes: compare features with `sweep`"
            )
        _check_inputs(each, data)
        _check_outputs(each, models[0])
    edges = [cut_of(each.metadata.num_classes, cut) for each in models]
    kept: list[list[np.ndarray]] = [[] for _ in models]
    labels: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    for batch in data.batches(0, len(data), BATCH, skipped):
        for each, edge, found in zip(models, edges, kept, strict=True):
            outputs = _outputs(each, batch.pixels)
            found.append(classes_of(outputs) if edge is None else outputs)
        if batch.labels is not None:
            labels.append(batch.labels)
        advance(len(batch.pixels))
    data.check_skipped(skipped)
    return Comparison(
        predictions=tuple(
            _predictions(each, edge, np.concatenate(found))
            for each, edge, found in zip(models, edges, kept, strict=True)
        ),
        labels=np.concatenate(labels) if labels else None,
        skipped=skipped,
    )


def _check_inputs(model: ComparedModel, data: DataSet) -> None:
    wanted, metadata = data.preprocessing, model.metadata
    height, width = metadata.image_size
    if (metadata.channels, height, width) != (wanted.channels, wanted.height, wanted.width):
        raise DataError(
            f"{model.title} takes {metadata.channels} channels of {height} x {width} pixels, and "
            f"the other model {wanted.channels} of {wanted.height} x {wanted.width}: they cannot "
            "be compared"
        )


def _check_outputs(model: ComparedModel, first: ComparedModel) -> None:
    mine, other = model.metadata.num_classes, first.metadata.num_classes
    if (mine == 1) != (other == 1):
        raise DataError(
            f"{model.title} has {mine} outputs and {first.title} {other}: one output is compared "
            "by its value, and they cannot be"
        )


def _predictions(model: ComparedModel, cut: float | None, found: np.ndarray) -> Predictions:
    """Make predictions of classes, int64[n], or of single outputs, float32[n, 1], and their cut."""
    identity = identity_of(model.metadata)
    if cut is None:
        return Predictions(model.title, identity, model.weights, found)
    classes, values = classes_of(found, cut), found[:, 0]
    return Predictions(model.title, identity, model.weights, classes, values, cut)


def _outputs(model: ComparedModel, pixels: np.ndarray) -> np.ndarray:
    outputs = model.predictor.predict(pixels).outputs
    if not np.isfinite(outputs).all():
        raise ToolFailedError(
            f"the outputs of {model.title} hold NaN or infinity: nothing can be said of it"
        )
    return outputs


def weight_norms(source: ModelSource) -> dict[str, float]:
    """Return the norm of every weight that a checkpoint and its exports both name."""
    if source.model is not None:
        state = source.model.vit.state_dict()
        return {name: float(tensor.double().norm()) for name, tensor in state.items()}
    from onnx import numpy_helper

    assert source.graph is not None
    norms = {}
    for tensor in source.graph.graph.initializer:
        # constants have names without a module in them; weights are floats
        if "." in tensor.name or tensor.name in ("pos_embed", "cls_token", "reg_token"):
            values = numpy_helper.to_array(tensor)
            norms[tensor.name] = float(np.linalg.norm(values.astype(np.float64)))
    return norms
