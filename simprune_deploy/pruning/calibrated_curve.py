"""What calibration found: how tolerant each prune layer is, by the share of FLOPs that is wanted.

One threshold for all layers treats them alike, and all images too: those that fold easily lose the
most of their patches, and nearly all of the accuracy. A calibrated model has a *tolerance* for each
layer, and an image's tolerance falls with its patches, to next to nothing at a *floor*, which is
0.8 of what images have left on average in the end:

    left of image i = (patches of i that are left) / (all)
    threshold of layer l for image i = 1 - tolerance_l * max((left - floor) / (1 - floor), 0.01)

so the fewer an image has left, the more alike patches must be to be merged. Tolerances and floor
are known for several shares of the FLOPs; between them they are interpolated linearly, and from 1
on nothing is pruned. So one number, the share, moves along the whole curve. It has the counts for
static engines, too.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument

IDENTITY = -0.01
"""The tolerance at which nothing is pruned: a threshold above 1 by more than any rounding, whatever
is left of an image's patches."""

LEAST_PART = 0.01
"""Of a tolerance, for an image at the floor or below it."""

FLOOR = 0.8
"""Of the patches that are left on average behind the last layer: where tolerances end."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """A point of the curve.

    Args:
        floor: The share of an image's patches, in [0, 0.8], at which its tolerance ends.
        layers: A tolerance for each prune layer: 1 minus the threshold for an image that has all
            of its patches.
    """

    floor: float
    layers: tuple[float, ...]

    def part(self, left: float) -> float:
        """Return the part of a tolerance that goes to an image with that share of its patches."""
        return max((left - self.floor) / (1 - self.floor), LEAST_PART)

    def threshold(self, position: int, left: float) -> float:
        """Return the threshold of a prune layer for such an image."""
        return 1 - self.layers[position] * self.part(left)


@dataclasses.dataclass(frozen=True)
class CalibratedCurve:
    """Tolerances by the share of FLOPs.

    Args:
        shares: Of the dense blocks' FLOPs, ascending, in (0, 1).
        tolerances: For every share, one number a prune layer.
        left: For every share, the share of the patches left behind each prune layer, in (0, 1],
            that is that share of the FLOPs: of each image with fixed counts, on average else.

    Raises:
        SimpruneError: a number is out of its range, or their numbers disagree.
    """

    shares: tuple[float, ...]
    tolerances: tuple[tuple[float, ...], ...]
    left: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        bounds = (0.0, *self.shares, 1.0)
        if not self.shares or any(not a < b for a, b in itertools.pairwise(bounds)):
            raise InvalidArgumentError(
                f"the calibrated shares {', '.join(map(str, self.shares))} must ascend between 0 "
                "and 1"
            )
        widths = {len(each) for each in (*self.tolerances, *self.left)}
        rows = {len(self.tolerances), len(self.left)}
        if rows != {len(self.shares)} or len(widths) != 1 or 0 in widths:
            raise InvalidArgumentError(
                f"{len(self.shares)} calibrated shares need as many rows of tolerances, and of "
                "what is left, each with one number a prune layer"
            )
        if not all(math.isfinite(each) for row in self.tolerances for each in row):
            raise InvalidArgumentError("a calibrated tolerance is not a finite number")
        if not all(1 >= a >= b > 0 for row in self.left for a, b in itertools.pairwise((1, *row))):
            raise InvalidArgumentError(
                "the calibrated shares of the patches that are left must descend in (0, 1]"
            )

    @property
    def num_layers(self) -> int:
        """Prune layers."""
        return len(self.tolerances[0])

    def check_share(self, share: float) -> None:
        """Refuse a share that was not calibrated.

        Raises:
            SimpruneError: it is below the smallest, or no number.
        """
        if not share >= self.shares[0]:
            raise InvalidArgumentError(
                f"{argument('flops', share)} is below {self.shares[0]:g}, the least that was "
                f"calibrated: take more, or calibrate anew with `simprune-deploy tune`"
            )

    def at(self, share: float) -> Tolerances:
        """Return floor and tolerances at a share; not a number prunes nothing."""
        floor, *layers = self._between(share, self._rows())
        return Tolerances(floor, tuple(layers))

    def counts(self, share: float, num_patches: int) -> tuple[int, ...]:
        """Return how many patches fixed counts leave behind each prune layer, at a share."""
        available, found = num_patches, []
        for left in self._between(share, [*self.left, (1.0,) * self.num_layers]):
            available = min(available, max(round(left * num_patches), available // 2, 1))
            found.append(available)
        return tuple(found)

    def _between(self, share: float, rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
        """Interpolate rows, one for every share and one for 1."""
        knots = [*self.shares, 1.0]
        if not share < 1.0:
            return rows[-1]
        if share <= knots[0]:
            return rows[0]
        behind = bisect.bisect_right(knots, share)
        part = (share - knots[behind - 1]) / (knots[behind] - knots[behind - 1])
        pairs = zip(rows[behind - 1], rows[behind], strict=True)
        return tuple(low + part * (high - low) for low, high in pairs)

    def _rows(self) -> list[tuple[float, ...]]:
        """Return the floor and the tolerances, for every share and for 1."""
        known = zip(self.left, self.tolerances, strict=True)
        rows = [(FLOOR * left[-1], *tolerances) for left, tolerances in known]
        return [*rows, (FLOOR, *[IDENTITY] * self.num_layers)]

    def ramps(self) -> tuple[list[float], list[float], list[list[float]]]:
        """Return the interpolation as sums of ramps: ``at(x) = row 0 + sum ramp_k(x) slope_k``.

        ``ramp_k(x)`` is ``x - start_k``, held between 0 and ``width_k``: an interpolation without
        a search. A row is the floor and the tolerances. Returns starts [S], widths [S], slopes
        [S][1 + layers].
        """
        knots, rows = [*self.shares, 1.0], self._rows()
        widths = [high - low for low, high in itertools.pairwise(knots)]
        slopes = [
            [(b - a) / width for a, b in zip(low, high, strict=True)]
            for (low, high), width in zip(itertools.pairwise(rows), widths, strict=True)
        ]
        return knots[:-1], widths, slopes

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "shares": list(self.shares),
            "tolerances": [list(row) for row in self.tolerances],
            "left": [list(row) for row in self.left],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CalibratedCurve:
        """Build it from :meth:`to_dict`'s result.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            return cls(
                tuple(float(share) for share in values["shares"]),
                tuple(tuple(float(each) for each in row) for row in values["tolerances"]),
                tuple(tuple(float(each) for each in row) for row in values["left"]),
            )
        except (TypeError, ValueError, KeyError) as error:
            raise ArtifactError(f"the calibrated curve is damaged: {error!r}") from error


def check_flops(share: float) -> None:
    """Refuse a share of the FLOPs to calibrate for that is outside (0, 1).

    Raises:
        SimpruneError: it is.
    """
    if not 0 < share < 1:
        raise InvalidArgumentError(
            f"{argument('flops', share)} is outside (0, 1): give a share of the dense blocks' "
            "FLOPs, 0.6 or 60%"
        )


def check_layer_cost(layer_cost: float) -> None:
    """Refuse a cost of a prune layer that cannot be one.

    Raises:
        SimpruneError: it is outside [0, 0.1).
    """
    if isinstance(layer_cost, numbers.Real) and 0 <= layer_cost < 0.1:
        return
    typed = f"{100 * float(layer_cost):g}%" if isinstance(layer_cost, numbers.Real) else ""
    raise InvalidArgumentError(
        f"{argument('layer_cost', layer_cost, typed)} is outside [0, 0.1): give the share of the "
        f"dense model's time that a prune layer takes, {argument('layer_cost', 0.004, '0.4%')}"
    )


def check_fits(curve: CalibratedCurve, layers: Sequence[int]) -> None:
    """Refuse a curve of other layers.

    Raises:
        SimpruneError: it has not one tolerance for each layer.
    """
    if curve.num_layers != len(layers):
        raise InvalidArgumentError(
            f"the calibrated curve has tolerances for {curve.num_layers} layers, and the model "
            f"prunes at {len(layers)}: calibrate it for them with `simprune-deploy tune`"
        )
