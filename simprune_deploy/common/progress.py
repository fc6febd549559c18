"""How long work says what it does, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Progress = Callable[[str], None]
"""Called with a word on each step."""


def silent(step: str) -> None:
    """Ignore progress."""


class ProgressBar(Protocol):
    """Shows how far work of many pieces is."""

    def begin(self, what: str, total: int) -> None:
        """Begin with `total` pieces."""

    def advance(self, done: int) -> None:
        """Count `done` more pieces as finished."""


class _NoBar:
    def begin(self, what: str, total: int) -> None: ...

    def advance(self, done: int) -> None: ...


NO_BAR: ProgressBar = _NoBar()
"""Shows nothing."""
