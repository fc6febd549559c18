"""The threshold, and the blocks, that meet a wish best, in few evaluations.

Accuracy falls and speed grows as the threshold falls, so each set of blocks takes a bisection and
no grid. What was evaluated is stored as in a sweep, and not evaluated again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from simprune_deploy.common.errors import (
    CheckFailedError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.requests import check_between
from simprune_deploy.evaluate.statistics import (
    CONFIDENCE,
    PAIRED_METHOD,
    Interval,
    images_for_drop,
    paired_drop,
)
from simprune_deploy.tuning.results import Measurement, Setting
from simprune_deploy.tuning.sweep import Sweep

LOWEST, HIGHEST, STEPS = 30, 99, 100
"""Thresholds from 0.30 to 0.99 are searched, in steps of 0.01."""

MAX_DROP, MIN_SPEEDUP, TARGET_LATENCY = "max-drop", "min-speedup", "target-latency"


EXAMPLES = {
    MAX_DROP: argument("max_drop", 0.005, "0.5%"),
    MIN_SPEEDUP: argument("min_speedup", 1.5),
    TARGET_LATENCY: argument("target_latency", 8, "8ms"),
}
"""What each wish looks like."""


def _name(kind: str) -> str:
    return argument(kind.replace("-", "_"))


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the user wants.

    Args:
        kind: "max-drop" (a share of accuracy), "min-speedup" or "target-latency" (milliseconds).
        value: Its limit.
        confidence: Of the interval of the drop, in (0, 1). Default 0.95.

    Raises:
        SimpruneError: a value is out of its range.
    """

    kind: str
    value: float
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        check_between("confidence", self.confidence, 0, 1, argument("confidence", 0.95, "95%"))
        ranges = {
            MAX_DROP: (0.0, 1.0),
            MIN_SPEEDUP: (1.0, math.inf),
            TARGET_LATENCY: (0.0, math.inf),
        }
        check_between(
            self.kind.replace("-", "_"), self.value, *ranges[self.kind], EXAMPLES[self.kind]
        )

    @property
    def of_accuracy(self) -> bool:
        """Whether it limits accuracy, and asks for the most pruning; else the least is wanted."""
        return self.kind == MAX_DROP

    def met(self, cell: Measurement) -> bool:
        """Tell whether a setting meets it; of a drop, whether that is sure enough."""
        if self.of_accuracy:
            return drop_of(cell, self.confidence).high <= self.value
        if self.kind == MIN_SPEEDUP:
            return (cell.speedup or 0.0) >= self.value
        return cell.milliseconds is not None and cell.milliseconds <= self.value

    def __str__(self) -> str:
        if self.of_accuracy:
            return f"a drop of at most {self.value:.2%}, with {self.confidence:.0%} confidence"
        if self.kind == MIN_SPEEDUP:
            return f"a speed-up of {self.value:g} or more"
        return f"{self.value:g} ms or less"


def drop_of(cell: Measurement, confidence: float) -> Interval:
    """Return by how much a setting's accuracy is below the dense model's."""
    assert cell.right_only_here is not None
    assert cell.right_only_dense is not None
    return paired_drop(cell.right_only_dense, cell.right_only_here, cell.images, confidence)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        wish: What was wanted.
        cell: The setting that meets it best, with everything measured of it.
        drop: Its drop of accuracy; None without labels.
        cells: Everything that was evaluated on the way, in this order.
    """

    wish: Objective
    cell: Measurement
    drop: Interval | None
    cells: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        drop = None
        if self.drop is not None:
            drop = {**dataclasses.asdict(self.drop), "method": PAIRED_METHOD}
        return {
            "wish": {"kind": self.wish.kind, "value": self.wish.value, "text": str(self.wish)},
            "found": self.cell.to_dict(),
            "drop": drop,
            "evaluated": [cell.to_dict() for cell in self.cells],
        }


def search(sweep: Sweep, wish: Objective, bases: Sequence[Setting]) -> Found:
    """Find what meets a wish best.

    Args:
        sweep: Measures, and keeps what it measured.
        wish: What is wanted.
        bases: Settings whose thresholds are searched: one for each set of blocks.

    Raises:
        SimpruneError: the data cannot answer: it has no labels, too few images, or a single output
            on one side of the cut for all of them.
        CheckFailedError: nothing meets the wish; the message says what the best is.
    """
    if wish.of_accuracy:
        check_enough(sweep, wish)
    cells: dict[Setting, Measurement] = {}

    def measure(setting: Setting) -> Measurement:
        if setting not in cells:
            # only what the wish is about, until it is met
            if wish.of_accuracy:
                cells[setting] = sweep.measure([setting], timed=False)[1]
                _check_classes(sweep)
            else:
                (cells[setting],) = sweep.time([setting])
        return cells[setting]

    best = [_bisect(measure, wish, base) for base in bases]
    met = [cell for cell in best if wish.met(cell)]
    if not met:
        raise CheckFailedError(_cannot(wish, best))
    if wish.of_accuracy:
        chosen = min(met, key=_cost)
        _, chosen = sweep.measure([chosen.setting])
    else:
        _, *measured = sweep.measure([cell.setting for cell in met])
        chosen = max(measured, key=_quality)
    drop = None if chosen.right_only_here is None else drop_of(chosen, wish.confidence)
    return Found(wish, chosen, drop, tuple(cells.values()))


def _check_classes(sweep: Sweep) -> None:
    if (why := sweep.no_classes()) is not None:
        raise InvalidArgumentError(f"{_name(MAX_DROP)} is of classes, and {why}")


def _bisect(
    measure: Callable[[Setting], Measurement], wish: Objective, base: Setting
) -> Measurement:
    """Return the best threshold's cell: the lowest that is accurate, or the highest that is fast.

    If none meets the wish, that of the end which comes closest.
    """

    def at(step: int) -> Measurement:
        return measure(dataclasses.replace(base, threshold=step / STEPS))

    low, high = LOWEST, HIGHEST
    easiest = at(high if wish.of_accuracy else low)
    if not wish.met(easiest):
        return easiest
    found = easiest
    while low < high:
        middle = (low + high) // 2 if wish.of_accuracy else (low + high + 1) // 2
        cell = at(middle)
        met = wish.met(cell)
        if met:
            found = cell
        if met == wish.of_accuracy:
            low, high = (low, middle) if wish.of_accuracy else (low, middle - 1)
        else:
            low, high = (middle + 1, high) if wish.of_accuracy else (middle, high)
    return found


def _cost(cell: Measurement) -> float:
    return cell.flops_share if cell.flops_share is not None else cell.tokens_processed


def _quality(cell: Measurement) -> float:
    moved = None if cell.moved is None else -cell.moved
    # a single output that is the same for all images tells nothing: the least pruning then
    known = (cell.top1, cell.agreement, cell.cosine, moved, cell.tokens_processed)
    return next(value for value in known if value is not None)


def _cannot(wish: Objective, best: Sequence[Measurement]) -> str:
    """Say what the best is."""
    if not wish.of_accuracy:
        cell = max(best, key=lambda cell: cell.speedup or 0.0)
        return (
            f"{wish} cannot be had: the fastest is {cell.setting.name} with "
            f"{cell.milliseconds:.2f} ms, {cell.speedup:.2f} times as fast as the dense model's "
            f"{cell.dense_milliseconds:.2f} ms"
        )
    cell = min(best, key=lambda cell: drop_of(cell, wish.confidence).high)
    drop = drop_of(cell, wish.confidence)
    text = (
        f"{wish} cannot be shown: {cell.setting.name}, the least pruning tried, drops "
        f"{drop.estimate:.2%} ({drop.low:.2%} to {drop.high:.2%}) on {cell.images:,} images"
    )
    if drop.estimate >= wish.value:
        return text
    return f"{text}; about {images_needed(cell, wish):,} images like these would show it"


def images_needed(cell: Measurement, wish: Objective) -> int:
    """Return about how many images would show the wish, if they differed as often as these."""
    assert cell.right_only_here is not None
    assert cell.right_only_dense is not None
    count = cell.images
    while True:
        count = math.ceil(count * 1.1)
        scale = count / cell.images
        lost, won = round(cell.right_only_dense * scale), round(cell.right_only_here * scale)
        if paired_drop(lost, won, count, wish.confidence).high <= wish.value:
            return count


def check_enough(sweep: Sweep, wish: Objective) -> None:
    """Refuse a wish that no result on these images could show.

    Raises:
        SimpruneError: there are no labels, or too few images for the confidence.
    """
    if sweep.data.labels is None:
        raise InvalidArgumentError(
            f"{_name(MAX_DROP)} needs labels, and {sweep.data.path} gives none: use "
            f"{_name(MIN_SPEEDUP)} or {_name(TARGET_LATENCY)}, or data with a folder a class"
        )
    least, have = images_for_drop(wish.value, wish.confidence), len(sweep.data)
    if have < least:
        raise InvalidArgumentError(
            f"{have:,} images cannot show {wish}, even if no answer changes: take {least:,} or "
            f"more, or a lower {argument('confidence')}"
        )


def layer_candidates(depth: int, given: Sequence[int]) -> list[tuple[int, ...]]:
    """Return sets of blocks to choose from, the given one first.

    Beside the given: shifted by a twelfth of the depth to the front and to the back, its first
    two, its first alone, and one more block close to the front.
    """
    shift = max(1, round(depth / 12))
    sets = [
        tuple(given),
        tuple(layer - shift for layer in given),
        tuple(layer + shift for layer in given),
        tuple(given[:2]),
        tuple(given[:1]),
        (max(1, given[0] - shift), *given),
    ]
    fitting = [
        tuple(sorted(set(each))) for each in sets if each and min(each) >= 1 and max(each) < depth
    ]
    return list(dict.fromkeys(fitting))
