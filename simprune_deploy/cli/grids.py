"""Settings of a sweep as one types them: 0.95:0.6:0.05, 3,6,9;2,5,8, dynamic;64."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from simprune_deploy.common.errors import InvalidArgumentError

EXAMPLE = "0.95:0.6:0.05"
MOST_THRESHOLDS = 1000


def parse_thresholds(text: str) -> tuple[float, ...]:
    """Return the thresholds of "0.95:0.6:0.05" or "0.95,0.9,0.8", in this order.

    Raises:
        InvalidArgumentError: it is not understood.
    """
    try:
        numbers = [Decimal(part) for part in re.split("[:,]", text)]
        if not all(number.is_finite() for number in numbers):
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidArgumentError(
            f"--thresholds {text!r} is not understood: write first:last:step, such as "
            f"{EXAMPLE}, or a list such as 0.9,0.8"
        ) from None
    if ":" in text:
        if len(numbers) != 3 or "," in text:
            raise InvalidArgumentError(f"--thresholds {text!r} is not first:last:step: {EXAMPLE}")
        first, last, step = numbers
        if not step:
            raise InvalidArgumentError(f"--thresholds {text!r} has a step of 0: {EXAMPLE}")
        count = int(abs(last - first) / abs(step)) + 1
        if count > MOST_THRESHOLDS:
            raise InvalidArgumentError(
                f"--thresholds {text!r} are {count:,}: {MOST_THRESHOLDS} at most"
            )
        sign = -1 if last < first else 1
        numbers = [first + sign * abs(step) * i for i in range(count)]
    thresholds = list(dict.fromkeys(float(number) for number in numbers))
    return tuple(thresholds)


def parse_layer_sets(text: str) -> tuple[str | tuple[int, ...], ...]:
    """Return the sets of blocks of "3,6,9;2,5,8", or "auto".

    Raises:
        InvalidArgumentError: it is not understood.
    """
    example = "'auto', 3,6,9, or sets: 3,6,9;2,5,8"
    return tuple(
        "auto" if part.strip() == "auto" else tuple(_numbers(part, "--layers", text, example))
        for part in text.split(";")
    )


def parse_token_sets(text: str) -> tuple[int | tuple[int, ...] | None, ...]:
    """Return the counts of "dynamic;64;150,110,80"; None is dynamic.

    Raises:
        InvalidArgumentError: it is not understood.
    """
    example = "'dynamic', 64, or one per layer: 150,110,80"
    sets: list[int | tuple[int, ...] | None] = []
    for part in text.split(";"):
        if part.strip() == "dynamic":
            sets.append(None)
            continue
        counts = _numbers(part, "--tokens", text, example)
        sets.append(counts[0] if len(counts) == 1 else tuple(counts))
    return tuple(sets)


def _numbers(part: str, option: str, text: str, example: str) -> list[int]:
    try:
        return [int(number) for number in part.split(",")]
    except ValueError:
        raise InvalidArgumentError(
            f"{option} {text!r} is not understood: write {example}"
        ) from None
