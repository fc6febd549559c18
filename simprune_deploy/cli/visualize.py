"""``visualize``: pictures of what was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint
from simprune_deploy.cli.common import (
    Json,
    errors,
    parse_layers,
    print_json,
)
from simprune_deploy.cli.export import FeaturesChoice, PlaceChoice


@takes_checkpoint()
def visualize(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, folders, .csv or .npz.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder to write.  [default: NAME-pictures]"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Cosine threshold.  [default: the model's, or 0.85]"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Prune a checkpoint at these blocks: 'auto' or 3,6,9.  [default: its own, or auto]"
        ),
    ] = None,
    place: PlaceChoice = None,
    features: FeaturesChoice = None,
    limit: Annotated[
        int, typer.Option(help="The most pictures of one folder or file, spread evenly.")
    ] = 24,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    as_json: Json = False,
) -> None:
    """Draw which patches survive each prune layer, and which were folded into which."""
    with errors():
        from rich.console import Console

        from simprune_deploy.reports.terminal import progress
        from simprune_deploy.reports.visualize import VisualizeRequest, visualize

        request = VisualizeRequest(
            model=model,
            images=images,
            output=output,
            threshold=threshold,
            layers=parse_layers(layers),
            place=place,
            features=features,
            limit=limit,
            force=force,
            checkpoint=checkpoint,
        )
        with progress(enabled=not as_json) as step:
            result = visualize(request, progress=step)
        if as_json:
            print_json(result.to_dict())
        else:
            _print(Console(), result.folder, result.numbers)


def _print(console: Any, folder: Path, numbers: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("picture", overflow="fold")
    for layer in numbers["prune_layers"]:
        table.add_column(f"kept {numbers['place']} block {layer}", justify="right")
    table.add_column("largest group", justify="right")
    rows, columns = numbers["grid"]
    for each in numbers["pictures"]:
        kept = [f"{layer['kept']} ({layer['kept'] / (rows * columns):.0%})"
                for layer in each["layers"]]  # fmt: skip
        table.add_row(escape(each["name"]), *kept, str(max(each["layers"][-1]["sizes"])))
    console.print(table)
    for each in numbers["assumed"]:
        console.print(each, style="yellow", highlight=False, markup=False)
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
