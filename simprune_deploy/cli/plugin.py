"""``plugin build`` and ``plugin info``: the TensorRT plugin and its CUDA kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simprune_deploy.cli.common import Json, errors, print_json

plugin_app = typer.Typer(
    help="Build the TensorRT plugin and its CUDA kernels, and read what a built one is.",
    no_args_is_help=True,
)


@plugin_app.command("build")
def build_plugin(
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures: 87,110, or 'native', or 'all'.  [default: native where there "
            "is a GPU, else all]",
            show_default=False,
        ),
    ] = None,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(help="Folder of TensorRT's headers.  [default: looked for]"),
    ] = None,
    nvcc: Annotated[
        Path | None,
        typer.Option(help="CUDA compiler.  [default: looked for]"),
    ] = None,
    kernels_only: Annotated[
        bool,
        typer.Option("--kernels-only", help="Leave the TensorRT plugin out; needs no headers."),
    ] = False,
    cross: Annotated[
        str | None,
        typer.Option(
            help="Compile for another processor: aarch64, for Jetson.  [default: this machine's]",
            show_default=False,
        ),
    ] = None,
    cuda_lib: Annotated[
        Path | None,
        typer.Option(help="With --cross: folder of libcudart_static.a.  [default: looked for]"),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the library.")] = Path(
        "simprune-plugin"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier library.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the library for the GPUs of this machine, or for those that are named."""
    with errors():
        from rich.console import Console

        from simprune_deploy.engine.plugin.build import BuildOptions, build
        from simprune_deploy.reports.terminal import library_facts, print_facts, progress

        options = BuildOptions(
            arch=arch,
            output=output,
            kernels_only=kernels_only,
            nvcc=nvcc,
            tensorrt_include=tensorrt_include,
            force=force,
            cross=cross,
            cuda_lib=cuda_lib,
        )
        with progress(enabled=not as_json) as step:
            built = build(options, step)
        if as_json:
            print_json(built.to_dict())
        else:
            metadata = {
                **library_facts(built.info),
                "compiled with": built.nvcc.path,
                "headers from": built.tensorrt.folder if built.tensorrt else "none needed",
                "seconds": f"{built.seconds:.0f}",
            }
            print_facts(Console(), metadata)


@plugin_app.command("info")
def show_plugin(
    library: Annotated[Path, typer.Argument(metavar="LIB", help="A built library.")],
    as_json: Json = False,
) -> None:
    """Say what a built library is and which GPUs it has code for, without loading it."""
    with errors():
        from rich.console import Console

        from simprune_deploy.pruning.kernel_library import read_info
        from simprune_deploy.reports.terminal import library_facts, print_facts

        info = read_info(library)
        if as_json:
            print_json(info.to_dict())
        else:
            print_facts(Console(), library_facts(info))
