"""What outputs say: the class of every row, and how far a single output moved.

Of several outputs the largest is the class. A single output has none to be larger than: it is cut
into two classes, and compared by its value too.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.requests import check_between
from simprune_deploy.predict.records import Array

CUT = 0.0
"""A single output above it says class 1, at or below it class 0: a logit's zero is the probability
of one half."""

LARGEST = 3.4e38
"""Where float32 ends, nearly."""


def classes_of(outputs: Array, cut: float | None = None) -> Array:
    """Return the class that every row of outputs says.

    Args:
        outputs: float32[n, C].
        cut: Of a single output, C == 1: above it is class 1. Default None: :data:`CUT`.

    Returns:
        int64[n]: the number of the largest output, the first of equal ones; of a single output
        the side of the cut that it is on, 0 or 1.
    """
    if outputs.shape[1] == 1:
        edge = outputs.dtype.type(CUT if cut is None else cut)  # compared as PyTorch does
        return np.asarray(outputs[:, 0] > edge, np.int64)
    return np.asarray(outputs.argmax(1), np.int64)


def check_cut(cut: float | None) -> None:
    """Refuse what is no number that float32 holds; None, nothing said, is one.

    Raises:
        InvalidArgumentError: it is not.
    """
    if cut is not None:
        check_between("cut", cut, -LARGEST, LARGEST, argument("cut", 0.5))


def cut_of(num_classes: int, cut: float | None) -> float | None:
    """Return where a model's single output is cut into classes; None for other models.

    Args:
        num_classes: Of the model.
        cut: What was asked for. None: nothing, :data:`CUT` for a single output.

    Raises:
        InvalidArgumentError: it was asked for, and the model has other than one output.
    """
    if num_classes == 1:
        return CUT if cut is None else float(cut)
    if cut is not None:
        has = f"{num_classes} classes" if num_classes else "features"
        raise InvalidArgumentError(
            f"{argument('cut', cut)} is for models with one output, and this one gives {has}: "
            "drop it",
            what="cut",
            value=cut,
        )
    return None


@dataclasses.dataclass(frozen=True)
class Movement:
    """How far a single output is from the reference's, over some images.

    Attributes:
        mean, largest: Of the absolute differences, in units of the output.
        deviation: Standard deviation of the reference's outputs, to hold them against.
    """

    mean: float
    largest: float
    deviation: float

    def __str__(self) -> str:
        if not self.deviation:
            return f"moved by {self.mean:.3g} on average, {self.largest:.3g} at most"
        mean, largest = self.mean / self.deviation, self.largest / self.deviation
        return (
            f"moved by {mean:.3f} standard deviations on average, {largest:.3f} at most (of the "
            f"{self.deviation:.4g} that it is spread over these images)"
        )


def movement(values: Array, reference: Array) -> Movement:
    """Return how far single outputs, float32[n], are from the reference's, float32[n]."""
    apart = np.abs(values.astype(np.float64) - reference.astype(np.float64))
    deviation = float(reference.astype(np.float64).std())
    return Movement(float(apart.mean()), float(apart.max()), deviation)


def one_sided(above: int, images: int, cut: float) -> str | None:
    """Say that all outputs lie on one side of the cut, where they do.

    Such outputs do not change sides when they are pruned: nothing can be told from their classes.

    Args:
        above: How many outputs are above the cut.
        images: Of how many.
        cut: The cut.

    Returns:
        The words, with the way out; None if there are outputs on both sides.
    """
    if 0 < above < images:
        return None
    side = "above" if above else "at or below"
    return (
        f"all {images:,} outputs are {side} {cut:g}, where one output is cut into two classes, so "
        f"that classes say nothing: set {argument('cut')} between them, or take images of both "
        "classes"
    )
