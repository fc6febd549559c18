"""How long work says what it does."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with a word on each step."""


def silent(step: str) -> None:
    """Ignore progress."""
