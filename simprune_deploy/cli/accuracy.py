"""``verify --data``: is the model as accurate as another one was?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from simprune_deploy.cli.common import parse_share, print_json

if TYPE_CHECKING:
    from simprune_deploy.evaluate.accuracy_check import AccuracyRequest, AccuracyResult

ACCURACY_ONLY = (
    *("max_drop", "min_agreement", "sure", "against", "baseline", "retrained", "save_baseline"),
    *("force", "junit", "markdown", "limit", "classes", "class_order", "no_labels"),
    *("cut", "max_unreadable"),
)
"""The options of ``verify`` that mean nothing without --data."""


@dataclasses.dataclass(frozen=True)
class AccuracyCommand:
    """What the command line alone knows of the check: texts to parse, and where to write.

    Attributes:
        max_drop, min_agreement, max_unreadable: Shares, as they were typed.
        junit, markdown: Files to write.
        as_json: Print JSON.
    """

    max_drop: str | None
    min_agreement: str | None
    max_unreadable: str
    junit: Path | None
    markdown: Path | None
    as_json: bool

    def run(self, **fields: Any) -> None:
        """Check, print, write what was asked for; exit with 1 if a check did not pass."""
        from simprune_deploy.evaluate.accuracy_check import (
            AccuracyRequest,
            check_accuracy,
            check_folder_of,
            needs_a_limit,
        )
        from simprune_deploy.reports.terminal import progress

        request = AccuracyRequest(
            max_drop=None if self.max_drop is None else parse_share(self.max_drop),
            min_agreement=None if self.min_agreement is None else parse_share(self.min_agreement),
            max_unreadable=parse_share(self.max_unreadable),
            **fields,
        )
        for name, path in (("junit", self.junit), ("markdown", self.markdown)):
            if path is not None and request.limits is None:
                raise needs_a_limit(name)
            check_folder_of(path)
        with progress(enabled=not self.as_json) as step:
            result = check_accuracy(request, progress=step)
        self._write(result)
        if self.as_json:
            print_json(result.to_dict())
        else:
            self._print(request, result)
        if not result.passed:
            raise typer.Exit(1)

    def _write(self, result: AccuracyResult) -> None:
        from simprune_deploy.common.files import staged_file
        from simprune_deploy.reports.accuracy import to_junit, to_markdown

        if result.report is None:
            return
        if self.junit is not None:
            with staged_file(self.junit) as staging:
                staging.write_bytes(to_junit(result.report))
        if self.markdown is not None:
            with staged_file(self.markdown) as staging:
                staging.write_text(to_markdown(result.report), encoding="utf-8")

    def _print(self, request: AccuracyRequest, result: AccuracyResult) -> None:
        from rich.console import Console

        from simprune_deploy.reports.accuracy import print_accuracy

        console = Console()
        if result.report is not None:
            print_accuracy(console, result.report)
        if request.save_baseline is not None:
            saved = result.saved_baseline
            words = f"saved {saved}" if saved else "the baseline was not saved: the check says no"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
