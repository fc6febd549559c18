"""``build`` and ``targets``: engines of an exported folder, and the GPUs they can be for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simprune_deploy.cli.common import (
    Json,
    PerTarget,
    errors,
    parse_batch,
    parse_targets,
    print_json,
)


def build(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Build TensorRT-RTX engines for these GPUs, here or elsewhere: rtx-ada,dgx-spark; "
            "`targets` lists them.  [default: TensorRT, for the GPU of this machine]",
            show_default=False,
        ),
    ] = None,
    per_target: PerTarget = False,
    plugin: Annotated[
        Path | None,
        typer.Option(
            help="Library of the TensorRT plugin.  [default: FOLDER/plugin's, then that of "
            "SIMPRUNE_LIBRARY; compiled if there is none]",
            show_default=False,
        ),
    ] = None,
    no_plugin: Annotated[
        bool, typer.Option("--no-plugin", help="Let TensorRT compile the function in the file.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes, within those of the graph: 1..8, or one.  [default: the graph's]",
            show_default=False,
        ),
    ] = None,
    opt_batch: Annotated[
        int | None,
        typer.Option(help="Batch to tune for.  [default: the smallest]", show_default=False),
    ] = None,
    workspace: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            help="Limit on the workspace in MiB.  [default: all memory there is]",
            show_default=False,
        ),
    ] = None,
    triton: Annotated[
        bool, typer.Option("--triton", help="Write the engine into a Triton model repository too.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build again, and replace, what is there already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build engines of an exported folder: for the GPU here, or ahead of time for other GPUs."""
    with errors():
        from simprune_deploy.deploy.building import BuildRequest
        from simprune_deploy.deploy.building import build as build_engines
        from simprune_deploy.engine.build import EngineOptions
        from simprune_deploy.reports.engines import print_engines
        from simprune_deploy.reports.terminal import progress
        from simprune_deploy.reports.triton import print_model

        options = EngineOptions(
            batch=parse_batch(batch) if batch is not None else None,
            opt_batch=opt_batch,
            workspace_mib=workspace,
            force=force,
        )
        request = BuildRequest(
            folder=folder,
            targets=parse_targets(target),
            per_target=per_target,
            plugin=plugin,
            use_plugin=not no_plugin,
            options=options,
            triton=triton,
        )
        with progress(enabled=not as_json) as step:
            result = build_engines(request, progress=step)
        if as_json:
            print_json(result.to_dict())
        else:
            print_engines(list(result.engines))
            for each in result.triton or ():
                print_model(each)


def list_targets(as_json: Json = False) -> None:
    """List the edge GPUs: what each carries, and where its engine can be built."""
    with errors():
        from simprune_deploy.deploy.listing import targets
        from simprune_deploy.reports.terminal import print_targets

        known = targets()
        if as_json:
            print_json(known.to_dict())
        else:
            print_targets(known)
