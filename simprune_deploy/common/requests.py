"""One way to ask for a thing: a frozen dataclass that says all of it, or keywords that make one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, TypeVar

from simprune_deploy.common.errors import InvalidArgumentError, argument

Request = TypeVar("Request")


def request_of(
    kind: type[Request], first: Any, fields: dict[str, Any], **positional: Any
) -> Request:
    """Return a request that was given, or the one that its fields make.

    ``bench(BenchRequest("out", batch=4))`` and ``bench("out", batch=4)`` ask for the same.

    Args:
        kind: The dataclass.
        first: A request, or its first field.
        fields: The other fields, by name.
        positional: Fields that may be given by position too; None: not given.

    Raises:
        TypeError: a request was given and fields beside it, or a field is unknown.
    """
    fields = {**{name: one for name, one in positional.items() if one is not None}, **fields}
    if not isinstance(first, kind):
        make: Callable[..., Request] = kind
        return make(first, **fields)
    if fields:
        raise TypeError(f"{kind.__name__} is given: say {', '.join(fields)} in it")
    return first


def as_path(place: str | Path | None) -> Path | None:
    """Return a path that may have been left out, or given as text."""
    return None if place is None else Path(place)


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse what is no whole number in [low, high]; `high` None: no limit.

    Raises:
        InvalidArgumentError: it is not; the message names the argument and the limits.
    """
    limits = f"{low} or more" if high is None else f"{low} to {high}"
    if not isinstance(value, numbers.Integral):
        what = f"is no whole number: give one, {limits}"
    elif int(value) < low or (high is not None and int(value) > high):
        what = f"must be {limits}" if high is None else f"is not between {low} and {high}"
    else:
        return
    raise InvalidArgumentError(
        f"{argument(name)} {value!r} {what}", what=name, value=value, allowed=(low, high)
    )


def check_between(name: str, value: Any, low: float, high: float, example: str) -> None:
    """Refuse what is no number above `low` and below `high`; a share where `high` is 1.

    Args:
        name: The argument.
        value: What was given.
        low, high: Neither is allowed itself; `high` may be infinite.
        example: What would do, from :func:`argument`.

    Raises:
        InvalidArgumentError: it is not; the message names the argument and the limits.
    """
    share = high == 1
    limits = (
        f"above {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}, ends excluded"
    )
    if not isinstance(value, numbers.Real):
        shown, what = f"{argument(name)} {value!r}", f"is no number {limits}"
    elif not low < float(value) < high:
        number = float(value)
        shown = argument(name, number, f"{number * 100:g}%" if share else f"{number:g}")
        what = f"must be {limits}" if math.isinf(high) else f"must lie {limits}"
    else:
        return
    raise InvalidArgumentError(
        f"{shown} {what}: give one such as {example}", what=name, value=value, allowed=(low, high)
    )


def check_listed(name: str, values: Any, least: int = 0) -> None:
    """Refuse what is no list of at least so many: a text, or a single number.

    Raises:
        InvalidArgumentError: it is not.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidArgumentError(
            f"{argument(name)} {values!r} is no list: give {name}=[{values!r}]", what=name
        )
    if not isinstance(values, Sized) or len(values) < least:
        raise InvalidArgumentError(
            f"{argument(name)} {values!r} must hold {least} or more", what=name, value=values
        )


def batch_range(batch: Any) -> tuple[int, int]:
    """Return the smallest and the largest batch of a pair, or of one number.

    Raises:
        InvalidArgumentError: it is neither, or no range.
    """
    if isinstance(batch, numbers.Integral):
        batch = (batch, batch)
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if pair and all(isinstance(each, numbers.Integral) for each in batch):
        low, high = map(int, batch)
        if 1 <= low <= high:
            return low, high
        batch = f"{low}..{high}"
    raise InvalidArgumentError(
        f"{argument('batch')} {batch} is not a range: give {argument('batch', (1, 8), '1..8')}, or "
        "one number for a fixed batch",
        what="batch",
        value=batch,
    )
