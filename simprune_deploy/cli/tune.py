"""``tune``: the threshold, and the blocks, that meet a wish."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint, typed
from simprune_deploy.cli.common import (
    Json,
    errors,
    parse_share,
    print_json,
)
from simprune_deploy.cli.export import FeaturesChoice, PlaceChoice, Reduction, Selection
from simprune_deploy.cli.grids import parse_layer_sets
from simprune_deploy.cli.sweep import (
    BackendName,
    Classes,
    ClassOrder,
    Cut,
    Data,
    Limit,
    MaxUnreadable,
    NoLabels,
    Ray,
    Timing,
    command_line,
)
from simprune_deploy.common.errors import InvalidArgumentError

if TYPE_CHECKING:
    from simprune_deploy.tuning.calibrating import CalibratedModel
    from simprune_deploy.tuning.tuned import Tuned


@takes_checkpoint()
def tune(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    data: Data,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Least loss at this share of the blocks' FLOPs: 60%. Finds what is compared, in "
            "which blocks, and a threshold for each; needs no labels."
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Most pruning whose accuracy surely drops by no more: 0.5%."),
    ] = None,
    min_speedup: Annotated[
        float | None,
        typer.Option(help="Least pruning that is so many times as fast as the dense model."),
    ] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(help="Least pruning that takes no longer for one picture: 8ms."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="'auto' tries several sets of blocks; or name them: 3,6,9;2,5,8.  [default: the "
            "model's, or five at the sixths of the depth]",
            show_default=False,
        ),
    ] = None,
    place: PlaceChoice = None,
    features: FeaturesChoice = None,
    tokens: Annotated[
        Literal["dynamic", "fixed"] | None,
        typer.Option(
            help="With --flops: thresholds, or fixed counts.  [default: thresholds for single "
            "pictures, for batches whichever loses less]",
            show_default=False,
        ),
    ] = None,
    layer_cost: Annotated[
        str | None,
        typer.Option(
            help="With --flops: what a prune layer costs, as a share of the dense model's time; "
            "`bench` says it.  [default: 0.4% and its products]",
            show_default=False,
        ),
    ] = None,
    selection: Annotated[Selection, typer.Option(help="How patches are chosen.")] = "pairs",
    reduction: Annotated[Reduction, typer.Option(help="What becomes of them.")] = "merge",
    confidence: Annotated[str, typer.Option(help="Of the interval of the drop.")] = "95%",
    overflow: Annotated[
        str | None,
        typer.Option(help="Fix token counts that this share of the pictures exceeds: 1%."),
    ] = None,
    backend: BackendName = "onnxruntime",
    limit: Limit = None,
    classes: Classes = None,
    class_order: ClassOrder = None,
    no_labels: NoLabels = False,
    cut: Cut = None,
    max_unreadable: MaxUnreadable = "1%",
    batch: Annotated[
        int | None,
        typer.Option(
            help="Pictures a run; timing is of one. With --flops: the batch that is served, whose "
            "padding the share counts.  [default: 32; with --flops 1]",
            show_default=False,
        ),
    ] = None,
    timing: Timing = 200,
    cells: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps what was measured; a sweep's will do."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File for `export --config`. [default: NAME-tuned.json]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    ray: Ray = None,
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    as_json: Json = False,
) -> None:
    """Find the threshold that meets a wish, and write it for `export --config`."""
    with errors():
        from simprune_deploy.reports.bars import progress_bar
        from simprune_deploy.tuning.commands import TuneRequest
        from simprune_deploy.tuning.commands import tune as find

        request = TuneRequest(
            model=model,
            data=data,
            flops=None if flops is None else parse_share(flops),
            tokens=tokens,
            served=None if flops is None else batch,
            layer_cost=None if layer_cost is None else parse_share(layer_cost),
            max_drop=None if max_drop is None else parse_share(max_drop),
            min_speedup=min_speedup,
            target_latency=None if target_latency is None else _milliseconds(target_latency),
            layers=None if layers is None else parse_layer_sets(layers),
            selection=selection,
            reduction=reduction,
            place=place,
            features=features,
            confidence=parse_share(confidence),
            overflow=None if overflow is None else parse_share(overflow),
            backend=backend,
            limit=limit,
            classes=classes,
            class_order=class_order,
            labels=not no_labels,
            cut=cut,
            max_unreadable=parse_share(max_unreadable),
            batch=32 if batch is None or flops is not None else batch,
            timing=timing,
            cells=cells,
            output=output,
            force=force,
            ray=ray,
            checkpoint=checkpoint,
            command=command_line(),
        )
        with progress_bar(enabled=not as_json) as bar:
            result = find(request, bar=bar)
        if as_json:
            print_json({"output": str(request.file), **result.to_dict()})
        else:
            _print(result, request.file, f"{model}{typed(checkpoint)}")


def _milliseconds(text: str) -> float:
    try:
        return float(text.strip().removesuffix("ms"))
    except ValueError:
        raise InvalidArgumentError(
            f"--target-latency {text!r} is not understood: write milliseconds, 8ms"
        ) from None


def _print(result: Tuned | CalibratedModel, file: Path, model: str) -> None:
    from rich.console import Console

    from simprune_deploy.reports.terminal import print_facts

    console = Console()
    print_facts(console, result.shown())
    for note in result.data["notes"]:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print(f"wrote {file}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"simprune-deploy export {model} --config {file}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
