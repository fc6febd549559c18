"""The accuracy check for people and for CI: terminal, Markdown for a comment, JUnit XML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simprune_deploy.evaluate.accuracy import FAILED, PASSED, TOO_FEW, AccuracyCheck, AccuracyReport
from simprune_deploy.reports.tables import markdown_table, markdown_text, percent, points

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {PASSED: "green", FAILED: "red", TOO_FEW: "yellow"}
MOST_CLASSES, MOST_SKIPPED = 5, 10


def print_accuracy(console: Console, report: AccuracyReport) -> None:
    """Print the checks as a table, what was compared, and the status."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("check", "limit", "status", "what was found"):
        table.add_column(title, overflow="fold")
    for check in report.checks:
        status = f"[{COLOURS[check.status]}]{check.status}[/]"
        table.add_row(check.name, limit_text(check), status, escape(check.summary))
    console.print(table)
    for line in _lines(report):
        console.print(escape(line), style="dim", highlight=False, soft_wrap=True)
    for name, reason in report.data["skipped"][:MOST_SKIPPED]:
        console.print(escape(f"skipped {name}: {reason}"), style="yellow", highlight=False)
    console.print(f"accuracy check: [bold {COLOURS[report.status]}]{report.status}[/]",
                  highlight=False)  # fmt: skip


def limit_text(check: AccuracyCheck) -> str:
    """Return what a check lets pass, in words."""
    if check.name == "agreement":
        return f"at least {100 * check.limit:g}%"
    return f"at most {100 * check.limit:g} points lost"


def _lines(report: AccuracyReport) -> list[str]:
    lines = [f"model: {report.candidate}", f"compared with: {report.reference}"]
    if report.accuracy is not None and report.reference_accuracy is not None:
        lines.append(
            f"top-1: {percent(report.accuracy)}, compared with {percent(report.reference_accuracy)}"
        )
    if report.cut is not None:
        lines.append(f"classes: the output above {report.cut:g} is class 1, else class 0")
    if report.moved is not None:
        lines.append(f"output: {report.moved}")
    lines.append(f"images: {report.data['images']:,}, {report.data['source']}")
    skipped = len(report.data["skipped"])
    if skipped:
        lines.append(f"skipped: {skipped:,} that could not be read")
    return [*lines, *report.notes]


def to_markdown(report: AccuracyReport) -> str:
    """Return a summary for a comment on a pull request."""
    rows = [[c.name, limit_text(c), c.status, c.summary] for c in report.checks]
    parts = [
        f"### Accuracy check: {report.status}\n\n",
        markdown_table(["check", "limit", "status", "found"], rows, ":--"),
        "\n",
        *(f"- {markdown_text(line)}\n" for line in _lines(report)),
    ]
    changed = sorted(
        (each for each in report.classes if each.images and each.right != each.dense_right),
        key=lambda each: (each.right - each.dense_right) / each.images,
    )
    if changed:
        rows = [
            [
                each.name,
                f"{each.images:,}",
                percent(each.dense_right / each.images),
                percent(each.right / each.images),
                points((each.right - each.dense_right) / each.images),
            ]
            for each in changed[:MOST_CLASSES]
        ]
        more = f"{len(changed)} classes changed"
        if len(changed) > MOST_CLASSES:
            more += f", the {MOST_CLASSES} that lost most"
        parts.append(f"\n<details><summary>{more}</summary>\n\n")
        parts.append(markdown_table(["class", "images", "before", "now", "points"], rows))
        parts.append("\n</details>\n")
    return "".join(parts)


def to_junit(report: AccuracyReport) -> bytes:
    """Return JUnit XML: a test case for each check; one on too few images counts as failed."""
    from junitparser import Failure, TestCase, TestSuite

    suite = TestSuite("simprune-deploy accuracy")
    for check in report.checks:
        case = TestCase(check.name, classname="simprune_deploy.accuracy", time=0.0)
        if check.status != PASSED:
            case.result = [Failure(_xml(f"{check.status}: {check.summary}"), check.status)]
        case.system_out = _xml("\n".join([f"limit: {limit_text(check)}", check.summary]))
        suite.add_testcase(case)
    for name, value in (
        ("status", report.status),
        ("images", str(report.data["images"])),
        ("data sha256", report.data["sha256"]),
        *((line.partition(": ")[0], line.partition(": ")[2]) for line in _lines(report)[:2]),
    ):
        suite.add_property(name, _xml(value))
    suite.update_statistics()
    # the suite alone: Jenkins' schema knows no attribute for what a list of suites skipped
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + suite.tostring() + b"\n"


def _xml(text: str) -> str:
    """Return text without the characters that XML cannot hold, which file names can."""
    return "".join(c if c in "\t\n\r" or c.isprintable() else "\N{REPLACEMENT CHARACTER}"
                   for c in text)  # fmt: skip
