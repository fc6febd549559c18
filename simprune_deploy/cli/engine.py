"""``engine`` and ``targets``: TensorRT-RTX engines, and the GPUs that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simprune_deploy.cli.common import Json, PerTarget, engine_targets, errors, print_json


def engine(
    bundle: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        str, typer.Option(help="GPUs to build for: rtx-ada,dgx-spark; `targets` lists them.")
    ],
    per_target: PerTarget = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build again what is there already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build TensorRT-RTX engines of an exported folder, on a machine with or without a GPU."""
    with errors():
        from simprune_deploy.bundle import build_engines
        from simprune_deploy.report.terminal import print_engines, progress

        targets = engine_targets(target)
        with progress(enabled=not as_json) as step:
            engines = build_engines(
                bundle, targets, per_target=per_target, force=force, progress=step
            )
        if as_json:
            print_json({"engines": [each.to_dict() for each in engines]})
        else:
            print_engines(engines)


def list_targets(as_json: Json = False) -> None:
    """List the edge GPUs: what each carries, and where its engine can be built."""
    with errors():
        from simprune_deploy.engine.targets import load_targets
        from simprune_deploy.report.terminal import print_targets

        known = load_targets()
        if as_json:
            print_json(known.to_dict())
        else:
            print_targets(known)
