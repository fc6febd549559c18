"""How many patches a static engine must have room for, from what images kept; and size hints."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument

SHARES = (0.1, 0.05, 0.01, 0.0)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Token counts for a static engine.

    Attributes:
        share: Of the images, the most that overflow at a layer.
        tokens: Patches for each prune layer.
        overflow: The share of the images that keep more, at each layer.
    """

    share: float
    tokens: tuple[int, ...]
    overflow: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "share": self.share,
            "tokens": list(self.tokens),
            "overflow": list(self.overflow),
        }


def capacity_for(kept: Sequence[Counter[int]], share: float) -> Capacity:
    """Return the fewest patches for each layer with which at most `share` of the images overflow.

    Args:
        kept: For each prune layer, how many images kept how many patches.
        share: In [0, 1).

    Raises:
        SimpruneError: the share is out of its range.
    """
    if not 0 <= share < 1:
        raise InvalidArgumentError(
            f"{argument('overflow')} {share:g} must be a share below 1, such as 1%"
        )
    tokens = [_smallest(counts, share) for counts in kept]
    # a later layer never reads more than the one before gives it
    for layer in range(1, len(tokens)):
        tokens[layer] = min(tokens[layer], tokens[layer - 1])
    above = [
        sum(images for patches, images in counts.items() if patches > most) / sum(counts.values())
        for counts, most in zip(kept, tokens, strict=True)
    ]
    return Capacity(share, tuple(tokens), tuple(above))


def _smallest(counts: Counter[int], share: float) -> int:
    allowed = share * sum(counts.values())
    above = 0
    ordered = sorted(counts, reverse=True)
    for patches, fewer in zip(ordered, [*ordered[1:], 1], strict=True):
        above += counts[patches]
        if above > allowed:
            return patches
        smallest = fewer
    return smallest


def size_hints(kept: Sequence[Counter[int]], prefix: int, patches: int) -> list[dict[str, int]]:
    """Return for each prune layer the median token count, and the most there can be.

    They are what the operator's attributes ``opt_tokens`` and ``max_tokens`` are for.
    """
    return [
        {"opt_tokens": prefix + _smallest(counts, 0.5), "max_tokens": prefix + patches}
        for counts in kept
    ]
