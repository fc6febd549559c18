"""A progress bar with the remaining time, on stderr; nothing where that is not a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class TerminalBar:
    """Shows one kind of work at a time."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("starting", total=None)

    def begin(self, what: str, total: int) -> None:
        """Begin with work of `total` pieces."""
        self.progress.reset(self.task, description=what, total=total)

    def advance(self, done: int) -> None:
        """Say that `done` more pieces are finished."""
        self.progress.advance(self.task, done)


@contextlib.contextmanager
def progress_bar(enabled: bool = True) -> Iterator[TerminalBar]:
    """Show a bar while the block runs."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    shown = enabled and console.is_terminal
    with Progress(*columns, console=console, disable=not shown, transient=True) as progress:
        yield TerminalBar(progress)
