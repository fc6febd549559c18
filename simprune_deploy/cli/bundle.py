"""``bundle``: what is shipped to a device that builds its own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simprune_deploy.cli.common import Json, errors, parse_targets, print_json


def bundle(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        str, typer.Option(help="Devices it is for: jetson-orin; `targets` lists them.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write.  [default: FOLDER-TARGET]"),
    ] = None,
    plugin: Annotated[
        Path | None,
        typer.Option(help="Plugin's library compiled for the targets.  [default: none]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Pack an exported folder for a device that builds its own engine: a folder and a .tar.gz."""
    with errors():
        from simprune_deploy.deploy.bundle.packing import BundleRequest
        from simprune_deploy.deploy.bundle.packing import bundle as make_bundle
        from simprune_deploy.reports.bundle import print_bundle
        from simprune_deploy.reports.terminal import progress

        request = BundleRequest(folder, parse_targets(target), output, plugin, force)
        with progress(enabled=not as_json) as step:
            made = make_bundle(request, progress=step)
        if as_json:
            print_json(made.to_dict())
        else:
            print_bundle(made)
            if made.advice:
                typer.echo(made.advice)
