"""``visualize``: pictures of what was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from simprune_deploy.cli.common import (
    Arch,
    Json,
    Pretrained,
    TrustPickle,
    errors,
    load_model,
    parse_numbers,
    print_json,
)
from simprune_deploy.common.errors import SimpruneError


def visualize(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, folders, .csv or .npz.")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder to write.  [default: NAME-pictures]"
        ),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Cosine threshold.  [default: the model's, or 0.85]"),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Prune a checkpoint before these blocks: 'auto' or 3,6,9.  [default: its own, "
            "or auto]"
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(help="The most pictures of one folder or file, spread evenly.")
    ] = 24,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    arch: Arch = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Draw which patches survive each prune layer, and which were folded into which."""
    with errors():
        from rich.console import Console

        from simprune_deploy.common.files import check_destination
        from simprune_deploy.report.terminal import progress
        from simprune_deploy.report.visualize import NUMBERS, open_sources, write_pictures

        name = Path(model.rstrip("/")).name.split(":")[-1].split(".")[0] or "model"
        folder = output or Path(f"{name}-pictures")
        check_destination(folder, force, NUMBERS)
        sources = open_sources(images, limit)
        with progress(enabled=not as_json) as step:
            step("loading the model")
            pictured = _pictured(model, threshold, layers, arch, pretrained, trust_pickle)
            numbers = write_pictures(pictured, sources, folder, force, step)
        if as_json:
            print_json({"output": str(folder), **numbers})
        else:
            _print(Console(), folder, numbers)


def _pictured(
    model: str,
    threshold: float | None,
    layers: str | None,
    arch: str | None,
    pretrained: bool,
    trust_pickle: bool,
) -> Any:
    from simprune_deploy.onnx.exported_folder import MANIFEST
    from simprune_deploy.report.visualize import of_export, of_model

    path = Path(model)
    if not pretrained and ((path / MANIFEST).is_file() or path.suffix == ".onnx"):
        if layers is not None:
            raise SimpruneError(
                f"the prune layers of {model} are fixed in the graph: leave --layers out, or give "
                "the checkpoint"
            )
        if arch or trust_pickle:
            raise SimpruneError(f"--arch and --trust-pickle are for checkpoints: {model} is none")
        if threshold is not None:
            from simprune_deploy.pruning.config import check_threshold

            check_threshold(threshold)
        return of_export(path, threshold)
    from simprune_deploy.pruning.model import prune

    loaded = load_model(model, arch, None, pretrained, trust_pickle).model
    wanted = layers
    blocks = (
        wanted
        if wanted in (None, "auto")
        else parse_numbers(str(wanted), "--layers", "3,6,9 or auto")
    )
    pruned = prune(loaded, threshold=threshold, layers=blocks)
    if not pruned.config.layers:
        raise SimpruneError(f"{model} prunes nowhere: say where with --layers")
    return of_model(model, pruned)


def _print(console: Any, folder: Path, numbers: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("picture", overflow="fold")
    for layer in numbers["prune_layers"]:
        table.add_column(f"kept before block {layer}", justify="right")
    table.add_column("largest group", justify="right")
    rows, columns = numbers["grid"]
    for each in numbers["pictures"]:
        kept = [f"{layer['kept']} ({layer['kept'] / (rows * columns):.0%})"
                for layer in each["layers"]]  # fmt: skip
        table.add_row(escape(each["name"]), *kept, str(max(each["layers"][-1]["sizes"])))
    console.print(table)
    for name, reason in numbers["skipped"]:
        console.print(escape(f"skipped {name}: {reason}"), style="yellow", highlight=False)
    count = len(numbers["pictures"])
    sheet = f" and {numbers['contact_sheet']}" if numbers["contact_sheet"] else ""
    console.print(
        f"{count} picture{'s' if count > 1 else ''}{sheet} in {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
