"""``inspect``, ``models`` and ``doctor``: say what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint
from simprune_deploy.cli.common import Json, errors, print_json


@takes_checkpoint()
def inspect(
    target: Annotated[str, typer.Argument(help="Exported folder, ONNX file, or checkpoint.")],
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    as_json: Json = False,
) -> None:
    """Say what a file or folder is: architecture, pruning, inputs and outputs."""
    with errors():
        from rich.console import Console

        from simprune_deploy.deploy.inspection import inspect as describe
        from simprune_deploy.reports.terminal import print_facts

        described = describe(target, checkpoint)
        if as_json:
            print_json(described)
        else:
            print_facts(Console(), _with_short_curve(described))


def _with_short_curve(described: dict[str, Any]) -> dict[str, Any]:
    """Return it with a calibrated curve in words: its hundred numbers are for --json."""
    pruning = described.get("pruning")
    if not pruning or not pruning.get("curve"):
        return described
    shares = ", ".join(f"{100 * share:.3g}%" for share in pruning["curve"]["shares"])
    curve = f"calibrated for {shares} of the blocks' FLOPs"
    return {**described, "pruning": {**pruning, "curve": curve}}


def models(
    pattern: Annotated[str, typer.Argument(help="timm names, such as 'vit_small*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the timm architectures that can be pruned, with their token counts."""
    with errors():
        from simprune_deploy.deploy.listing import models as list_models
        from simprune_deploy.reports.terminal import print_models, progress

        with progress(enabled=not as_json) as step:
            found = list_models(pattern, progress=step)
        if as_json:
            print_json(found.to_dict())
        else:
            print_models(list(found.prunable), list(found.refused), named=pattern != "*")


def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Exported folder: do its plugin and engines fit this machine?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed, what is missing or does not fit, and the command that helps."""
    with errors():
        from simprune_deploy.deploy.doctor.diagnosis import doctor as diagnose
        from simprune_deploy.reports.terminal import print_findings

        found = diagnose(folder)
        if as_json:
            print_json(found.to_dict())
        else:
            print_findings(list(found.findings))
        if not found.healthy:
            raise typer.Exit(1)
