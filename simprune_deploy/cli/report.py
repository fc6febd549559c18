"""``report``: show a stored sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simprune_deploy.cli.common import Json, errors, print_json


def report(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="sweep.json, or its folder.")],
    output: Annotated[
        Path | None,
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

        from simprune_deploy.reports.sweep import report as read_and_write
        from simprune_deploy.reports.tables import print_sweep

        result = read_and_write(sweep, output, force)
        if as_json:
            print_json(result.to_dict())
            return
        console = Console()
        print_sweep(console, result)
        if output is not None:
            console.print(f"wrote {output}", highlight=False, markup=False, soft_wrap=True)
