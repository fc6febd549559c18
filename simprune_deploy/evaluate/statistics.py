"""How sure a measured difference is. Standard library only.

No Python library that the project could use has the paired interval; it is short, and the tests
hold it to published examples.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

from simprune_deploy.common.errors import InvalidArgumentError

CONFIDENCE = 0.95
PAIRED_METHOD = "Tango's score interval for paired proportions (Statistics in Medicine 17, 1998)"
SHARE_METHOD = "Wilson's score interval (JASA 22, 1927)"


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; all three are shares, or differences of shares.

    Attributes:
        estimate: What was measured.
        low, high: The bounds.
        confidence: How often such an interval holds the true value. Default 0.95.
    """

    estimate: float
    low: float
    high: float
    confidence: float = CONFIDENCE


def paired_drop(
    right_only_before: int, right_only_after: int, images: int, confidence: float = CONFIDENCE
) -> Interval:
    """Return by how much the accuracy drops, with Tango's score interval.

    Both models saw the same images, so only those on which they differ count: the drop is
    ``(right_only_before - right_only_after) / images``. The interval holds for few images and for
    no difference at all, where the usual one has no width.

    Args:
        right_only_before: Images that only the model before the change classifies rightly.
        right_only_after: Images that only the model after it classifies rightly.
        images: All images that both saw.
        confidence: Of the two-sided interval, in (0, 1). Default 0.95.

    Raises:
        SimpruneError: the counts do not fit together.
    """
    counts = (right_only_before, right_only_after)
    if images < 1 or min(counts) < 0 or sum(counts) > images:
        raise InvalidArgumentError(
            f"{right_only_before} and {right_only_after} images of {images} cannot differ: "
            "the counts do not fit together"
        )
    z = _z(confidence)
    estimate = (right_only_before - right_only_after) / images
    low = -_score_bound(right_only_after, right_only_before, images, z)
    high = _score_bound(right_only_before, right_only_after, images, z)
    return Interval(estimate, low, high, confidence)


def _score_bound(b: int, c: int, n: int, z: float) -> float:
    """Return the largest difference (b - c) / n that the score test at `z` does not reject."""

    def rejected(difference: float) -> bool:
        # the likeliest share of the c cell, given the difference (Tango's equation 9)
        linear = (2 * n - b + c) * difference - b - c
        constant = -c * difference * (1 - difference)
        root = math.sqrt(max(linear**2 - 8 * n * constant, 0.0))
        share = (root - linear) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        distance = n * difference - (b - c)
        return distance > z * math.sqrt(max(variance, 0.0))

    low, high = (b - c) / n, 1.0
    for _ in range(60):  # halving 2 down to below the resolution of a float
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return low


def share(hits: int, images: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the share ``hits / images`` with Wilson's score interval.

    Raises:
        SimpruneError: the counts do not fit together.
    """
    if images < 1 or not 0 <= hits <= images:
        raise InvalidArgumentError(f"{hits} of {images} images is no share")
    square = _z(confidence) ** 2
    estimate = hits / images
    centre = (hits + square / 2) / (images + square)
    spread = math.sqrt(square * (estimate * (1 - estimate) * images + square / 4))
    half = spread / (images + square)
    return Interval(estimate, max(0.0, centre - half), min(1.0, centre + half), confidence)


def images_for_drop(limit: float, confidence: float = CONFIDENCE) -> int:
    """Return how few images can show a drop of at most `limit`, if the two models never differ.

    With fewer no result, however good, has an interval that stays below the limit.
    """
    if not 0 < limit < 1:
        raise InvalidArgumentError(f"a drop of {limit:.2%} must lie between 0 and 100 %")
    square = _z(confidence) ** 2
    return max(1, math.ceil(square * (1 - limit) / limit))


def images_for_share(limit: float, confidence: float = CONFIDENCE) -> int:
    """Return how few images can show a share of at least `limit`, if all of them are hits."""
    if not 0 < limit < 1:
        raise InvalidArgumentError(f"a share of {limit:.2%} must lie between 0 and 100 %")
    square = _z(confidence) ** 2
    return max(1, math.ceil(square * limit / (1 - limit)))


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InvalidArgumentError(f"a confidence of {confidence} must lie between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
