"""One way to ask for a thing: a frozen dataclass that says all of it, or keywords that make one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
