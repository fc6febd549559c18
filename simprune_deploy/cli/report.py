"""``report``: show a stored sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from simprune_deploy.cli.common import Json, errors, print_json
from simprune_deploy.common.errors import SimpruneError


def report(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="sweep.json, or its folder.")],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write .html, .png, .svg, .csv or .md.  [default: only the table is printed]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Print the table of a stored sweep, and write its page, plot or table again."""
    with errors():
        from rich.console import Console

        from simprune_deploy.report.sweep import check_ending, write_report
        from simprune_deploy.report.tables import print_sweep
        from simprune_deploy.tune.results import load_sweep

        if output is not None:
            check_ending(output)
            if output.exists() and not force:
                raise SimpruneError(f"{output} already exists: replace it with --force")
        result = load_sweep(sweep / "sweep.json" if sweep.is_dir() else sweep)
        if output is not None:
            write_report(result, output)
        if as_json:
            print_json(result.to_dict())
            return
        console = Console()
        print_sweep(console, result)
        if output is not None:
            console.print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)
