"""What a prune layer read and decided, image by image, as arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class PruneRecord:
    """What one prune layer read and decided for one image.

    Attributes:
        features: [N, F] as the layer compared them; None in golden cases, which do not hold them.
        log_size: [N].
        threshold: The layer's for this image.
        kept_index: [K].
        assignment: [N].
    """

    features: Any
    log_size: Array
    threshold: float
    kept_index: Array
    assignment: Array

    def same_decisions(self, other: PruneRecord) -> bool:
        """Compare decisions, without the padding behind them, which depends on the batch."""
        mine, theirs = self.valid_assignment(), other.valid_assignment()
        return np.array_equal(mine, theirs) and np.array_equal(self.heads(), other.heads())

    def valid_assignment(self) -> Array:
        """Return the slots of the tokens that are not padding."""
        return np.asarray(self.assignment[self.assignment >= 0])

    def heads(self) -> Array:
        """Return the positions of the kept tokens, prefix included, without padding slots."""
        slots = self.assignment.max() + 1 if self.assignment.size else 0
        return np.asarray(self.kept_index[:slots])
