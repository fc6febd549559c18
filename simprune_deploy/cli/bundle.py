"""``bundle``: what is shipped to a device that builds its own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from simprune_deploy.cli.common import Json, errors, print_json


def bundle(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        str, typer.Option(help="Devices it is for: jetson-orin; `targets` lists them.")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--output", help="Folder to write.  [default: FOLDER-TARGET]"),
    ] = None,
    plugin: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Plugin's library compiled for the targets.  [default: none]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Pack an exported folder for a device that builds its own engine: a folder and a .tar.gz."""
    with errors():
        from simprune_deploy.deploy.bundle import make_bundle
        from simprune_deploy.engine.targets import find_targets
        from simprune_deploy.report.bundle import print_bundle
        from simprune_deploy.report.terminal import progress

        targets = find_targets(target)
        with progress(enabled=not as_json) as step:
            made = make_bundle(
                folder, targets, output=output, plugin=plugin, force=force, progress=step
            )
        if as_json:
            print_json(made.to_dict())
        else:
            print_bundle(made)
