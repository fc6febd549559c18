"""What a user asks a sweep for, as text, turned into settings."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.pruning.config import (
    PruneConfig,
    check_threshold,
    resolve_capacities,
    resolve_layers,
)
from simprune_deploy.tune.results import OURS, Setting

THRESHOLDS = "0.95:0.6:0.05"
MOST_THRESHOLDS = 1000


@dataclasses.dataclass(frozen=True)
class Grid:
    """The settings of a sweep: all combinations.

    Args:
        thresholds: "0.95:0.6:0.05" (first, last, step) or "0.9,0.8".
        layers: "auto", or sets of blocks: "3,6,9;2,5,8".
        selections: "cover", "redundancy" or both, "cover,redundancy".
        reductions: "merge", "drop" or both.
        tokens: "dynamic", or counts as in export, sets of them with ";": "dynamic;64;150,110,80".
    """

    thresholds: str = THRESHOLDS
    layers: str = "auto"
    selections: str = "cover"
    reductions: str = "merge"
    tokens: str = "dynamic"

    def settings(self, depth: int, num_patches: int) -> list[Setting]:
        """Return the settings for a model of this depth and number of patches.

        Raises:
            SimpruneError: a part is not understood, or does not fit the model.
        """
        thresholds = parse_thresholds(self.thresholds)
        layer_sets = [resolve_layers(each, depth) for each in parse_layer_sets(self.layers)]
        selections, reductions = self.selections.split(","), self.reductions.split(",")
        found = []
        for layers, selection, reduction, tokens in itertools.product(
            layer_sets, selections, reductions, _token_sets(self.tokens)
        ):
            capacities = resolve_capacities(tokens, len(layers), num_patches)
            # checks the names, the order of the layers and the number of counts
            PruneConfig(
                layers=layers,
                selection=selection,  # type: ignore[arg-type]
                reduction=reduction,  # type: ignore[arg-type]
                capacities=capacities,
            )
            counts = capacities or None
            found += [
                Setting(OURS, threshold, layers, selection, reduction, counts)
                for threshold in thresholds
            ]
        return list(dict.fromkeys(found))


def parse_thresholds(text: str) -> list[float]:
    """Return the thresholds of "0.95:0.6:0.05" or "0.95,0.9,0.8", in this order.

    Raises:
        SimpruneError: it is not understood, or one is outside [-1, 2].
    """
    try:
        numbers = [Decimal(part) for part in re.split("[:,]", text)]
        if not all(number.is_finite() for number in numbers):
            raise InvalidOperation
    except InvalidOperation:
        raise SimpruneError(
            f"--thresholds {text!r} is not understood: write first:last:step, such as "
            f"{THRESHOLDS}, or a list such as 0.9,0.8"
        ) from None
    if ":" in text:
        if len(numbers) != 3 or "," in text:
            raise SimpruneError(f"--thresholds {text!r} is not first:last:step: {THRESHOLDS}")
        first, last, step = numbers
        if not step:
            raise SimpruneError(f"--thresholds {text!r} has a step of 0: {THRESHOLDS}")
        count = int(abs(last - first) / abs(step)) + 1
        if count > MOST_THRESHOLDS:
            raise SimpruneError(f"--thresholds {text!r} are {count:,}: {MOST_THRESHOLDS} at most")
        sign = -1 if last < first else 1
        numbers = [first + sign * abs(step) * i for i in range(count)]
    thresholds = list(dict.fromkeys(float(number) for number in numbers))
    for each in thresholds:
        check_threshold(each)
    return thresholds


def parse_layer_sets(text: str) -> list[str | list[int]]:
    """Return the sets of blocks of "3,6,9;2,5,8", or "auto".

    Raises:
        SimpruneError: it is not understood.
    """
    sets: list[str | list[int]] = []
    for part in text.split(";"):
        if part.strip() == "auto":
            sets.append("auto")
            continue
        sets.append(_numbers(part, "--layers", text, "'auto', 3,6,9, or sets: 3,6,9;2,5,8"))
    return sets


def _token_sets(text: str) -> list[int | Sequence[int] | None]:
    sets: list[int | Sequence[int] | None] = []
    for part in text.split(";"):
        if part.strip() == "dynamic":
            sets.append(None)
            continue
        counts = _numbers(part, "--tokens", text, "'dynamic', 64, or one per layer: 150,110,80")
        sets.append(counts[0] if len(counts) == 1 else counts)
    return sets


def _numbers(part: str, option: str, text: str, example: str) -> list[int]:
    try:
        return [int(number) for number in part.split(",")]
    except ValueError:
        raise SimpruneError(f"{option} {text!r} is not understood: write {example}") from None
