"""``build`` and ``targets``: engines, and the GPUs that are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from simprune_deploy.cli.common import (
    Json,
    PerTarget,
    engine_targets,
    errors,
    parse_batch,
    print_json,
)
from simprune_deploy.common.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.deploy.triton import TritonModel


def build(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder.")],
    target: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Build TensorRT-RTX engines for these GPUs, here or elsewhere: rtx-ada,dgx-spark; "
            "`targets` lists them.  [default: TensorRT, for the GPU of this machine]",
            show_default=False,
        ),
    ] = None,
    per_target: PerTarget = False,
    plugin: Annotated[
        Optional[Path],  # noqa: UP045
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
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Batch sizes, within those of the graph: 1..8, or one.  [default: the graph's]",
            show_default=False,
        ),
    ] = None,
    opt_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Batch to tune for.  [default: the smallest]", show_default=False),
    ] = None,
    workspace: Annotated[
        Optional[int],  # noqa: UP045
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
        from simprune_deploy.deploy.triton import serve_engine
        from simprune_deploy.engine.build import EngineOptions
        from simprune_deploy.engine.folder_engines import build_ahead, build_here
        from simprune_deploy.report.engines import print_engines
        from simprune_deploy.report.terminal import progress

        options = EngineOptions(
            batch=parse_batch(batch) if batch is not None else None,
            opt_batch=opt_batch,
            workspace_mib=workspace,
            force=force,
        )
        if target is None and per_target:
            raise SimpruneError("--per-target says how to build for --target: name the targets")
        if no_plugin and plugin is not None:
            raise SimpruneError("--no-plugin and --plugin contradict each other: drop one")
        if target is not None and (no_plugin or plugin is not None):
            raise SimpruneError(
                "--plugin and --no-plugin are for TensorRT, and --target builds with TensorRT-RTX, "
                "which takes no plugins: drop one"
            )
        if triton and target is not None:
            raise SimpruneError(
                "--triton serves TensorRT's engines, and --target builds TensorRT-RTX's, which "
                "Triton cannot load: leave --target out on the machine that serves"
            )
        targets = engine_targets(target) if target is not None else []
        served: list[TritonModel] = []
        with progress(enabled=not as_json) as step:
            if targets:
                engines = build_ahead(
                    folder, targets, per_target=per_target, options=options, progress=step
                )
            else:
                engines = [
                    build_here(
                        folder,
                        plugin=plugin,
                        use_plugin=not no_plugin,
                        options=options,
                        progress=step,
                    )
                ]
                if triton:
                    step("writing the Triton repository")
                    served.append(serve_engine(folder, engines[0], plugin=plugin, force=force))
        if as_json:
            answer: dict[str, Any] = {"engines": [each.to_dict() for each in engines]}
            if triton:
                answer["triton"] = [each.to_dict() for each in served]
            print_json(answer)
        else:
            print_engines(engines)
            for each in served:
                from simprune_deploy.report.triton import print_model

                print_model(each)


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
