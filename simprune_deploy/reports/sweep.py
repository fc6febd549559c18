"""The files that show a sweep, made from its stored result alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from simprune_deploy.common.errors import DestinationError, InvalidArgumentError, argument
from simprune_deploy.common.files import staged_file
from simprune_deploy.tuning.results import SweepResult, load_sweep

FILES = ("report.html", "pareto.png", "pareto.svg", "sweep.csv", "sweep.md")
"""What :func:`write_reports` writes."""


def write_reports(result: SweepResult, folder: Path) -> list[Path]:
    """Write the page, the plots and the tables into a folder that is there; return their paths.

    Each file appears whole or not at all, in place of an earlier one. The page and the plots are
    left out where what draws them (matplotlib, jinja2) is not installed.
    """
    drawn = all(importlib.util.find_spec(name) for name in ("matplotlib", "jinja2"))
    names = FILES if drawn else [name for name in FILES if name.endswith((".csv", ".md"))]
    paths = [folder / name for name in names]
    for path in paths:
        write_report(result, path)
    return paths


def write_report(result: SweepResult, path: Path) -> None:
    """Write one of the files; the path's ending says which: .html, .png, .svg, .csv or .md.

    Raises:
        SimpruneError: another ending, or the file cannot be written.
    """
    write = _writer(path)
    with staged_file(path) as staging:
        staging.write_bytes(write(result))


def report(
    sweep: str | Path | SweepResult, output: str | Path | None = None, force: bool = False
) -> SweepResult:
    """Read a stored sweep, and write its page, plot or table again.

    Args:
        sweep: ``sweep.json``, its folder, or a result.
        output: A file ending in .html, .png, .svg, .csv or .md. Default None: nothing is written.
        force: Replace a file that is there. Default False.

    Raises:
        SimpruneError: there is no sweep, another ending, or the file may not be written.
    """
    if output is not None:
        check_ending(Path(output))
        if Path(output).exists() and not force:
            raise DestinationError(
                f"{output} already exists: replace it with {argument('force', True)}"
            )
    if isinstance(sweep, SweepResult):
        result = sweep
    else:
        place = Path(sweep)
        result = load_sweep(place / "sweep.json" if place.is_dir() else place)
    if output is not None:
        write_report(result, Path(output))
    return result


def check_ending(path: Path) -> None:
    """Refuse a path of another ending, before any work.

    Raises:
        SimpruneError: the ending is none of those that :func:`write_report` knows.
    """
    _writer(path)


def _writer(path: Path) -> Callable[[SweepResult], bytes]:
    writers: dict[str, Callable[[SweepResult], bytes]] = {
        ".html": _html,
        ".png": lambda result: _plot(result, "png"),
        ".svg": lambda result: _plot(result, "svg"),
        ".csv": _csv,
        ".md": _markdown,
    }
    try:
        return writers[path.suffix.lower()]
    except KeyError:
        raise InvalidArgumentError(
            f"{path} ends with none of {', '.join(writers)}: the ending says what to write"
        ) from None


def _html(result: SweepResult) -> bytes:
    from simprune_deploy.reports.html import render_html

    return render_html(result).encode("utf-8")


def _plot(result: SweepResult, kind: str) -> bytes:
    from simprune_deploy.reports.plots import render_pareto

    return render_pareto(result, kind)


def _csv(result: SweepResult) -> bytes:
    from simprune_deploy.reports.tables import to_csv

    return to_csv(result).encode("utf-8")


def _markdown(result: SweepResult) -> bytes:
    from simprune_deploy.reports.tables import to_markdown

    return to_markdown(result).encode("utf-8")
