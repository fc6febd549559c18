"""What a parity check runs on, and what a predictor gave for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from simprune_deploy.predict.predictor import Predictor
from simprune_deploy.predict.records import Array, PruneRecord


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images, their thresholds, and the batches that they run in.

    Attributes:
        images: As the graph takes them: float32[n, C, H, W] or uint8[n, H, W, C].
        thresholds: float32[n].
        batch: Smallest and largest batch.
    """

    images: Array
    thresholds: Array
    batch: tuple[int, int]

    def mixed(self) -> list[list[int]]:
        """Return the images in batches as large as allowed; the last is filled up with repeats."""
        low, high = self.batch
        low = max(low, min(2, high))  # a batch of one would show nothing about batches
        count = len(self.images)
        chunks = [list(range(i, min(i + high, count))) for i in range(0, count, high)]
        while len(chunks[-1]) < low:
            chunks[-1].append((chunks[-1][-1] + 1) % count)
        return chunks

    def alone(self, count: int) -> list[list[int]]:
        """Return the first images in batches of their own (copies, if one is too few)."""
        return [[i] * self.batch[0] for i in range(min(count, len(self.images)))]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one runtime gave for n images.

    Attributes:
        name: The runtime.
        outputs: [n, ...].
        records: By prune layer, one record an image. Empty if decisions were not asked for.
    """

    name: str
    outputs: Array
    records: dict[int, list[PruneRecord]]


def run(
    predictor: Predictor,
    inputs: Inputs,
    batches: Sequence[Sequence[int]],
    *,
    decisions: bool = True,
    name: str = "",
) -> Run:
    """Run batches of images.

    Args:
        predictor: What runs them.
        inputs: The images.
        batches: Their numbers, by batch.
        decisions: Whether to keep what every prune layer read and decided. Default True.
        name: Of the run. Default: the runtime's.
    """
    found = predictor.answer(
        inputs.images, threshold=inputs.thresholds, decisions=decisions, batches=batches
    )
    return Run(name or predictor.runtime.title, found.outputs, found.records or {})
