"""``inspect``, ``models`` and ``doctor``: say what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from simprune_deploy.cli.common import Arch, Json, TrustPickle, errors, print_json
from simprune_deploy.common.errors import SimpruneError


def inspect(
    target: Annotated[str, typer.Argument(help="Exported folder, ONNX file, or checkpoint.")],
    arch: Arch = None,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Say what a file or folder is: architecture, pruning, inputs and outputs."""
    with errors():
        from rich.console import Console

        from simprune_deploy.deploy.inspection import inspect_target
        from simprune_deploy.report.terminal import print_facts

        metadata = inspect_target(target, arch=arch, trust_pickle=trust_pickle)
        if as_json:
            print_json(metadata)
        else:
            print_facts(Console(), metadata)


def models(
    pattern: Annotated[str, typer.Argument(help="timm names, such as 'vit_small*'.")] = "*",
    as_json: Json = False,
) -> None:
    """List the timm architectures that can be pruned, with their token counts."""
    with errors():
        import dataclasses

        from simprune_deploy.pruning.families import describe_models, list_names
        from simprune_deploy.report.terminal import print_models, progress

        prunable, refused = list_names(pattern)
        if not prunable and not refused:
            raise SimpruneError(f"no timm architecture matches {pattern!r}: try 'vit_*'")
        with progress(enabled=not as_json) as step:
            step("building the architectures without weights")
            rows = list(describe_models(prunable))
        if as_json:
            print_json(
                {
                    "prunable": [dataclasses.asdict(row) for row in rows],
                    "refused": dict(refused),
                }
            )
        else:
            print_models(rows, refused, named=pattern != "*")


def doctor(
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="Exported folder: do its plugin and engines fit this machine?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is installed, what is missing or does not fit, and the command that helps."""
    with errors():
        import dataclasses

        from simprune_deploy.deploy.doctor import all_needed_present, examine
        from simprune_deploy.report.terminal import print_findings

        findings = examine(folder)
        healthy = all_needed_present(findings)
        if as_json:
            print_json(
                {"healthy": healthy, "findings": [dataclasses.asdict(each) for each in findings]}
            )
        else:
            print_findings(findings)
        if not healthy:
            raise typer.Exit(1)
