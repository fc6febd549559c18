"""``sweep``: what each setting gives and costs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint
from simprune_deploy.cli.common import (
    Json,
    errors,
    parse_share,
    print_json,
)
from simprune_deploy.cli.export import FeaturesChoice, PlaceChoice
from simprune_deploy.cli.grids import parse_layer_sets, parse_thresholds, parse_token_sets
from simprune_deploy.evaluate import class_order

if TYPE_CHECKING:
    from simprune_deploy.tuning.results import SweepResult

Backend = Literal["onnxruntime", "torch", "engine"]
Data = Annotated[
    Path,
    typer.Option(help="Folder with a folder a class, or of pictures; .csv, .npz; Hugging Face."),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Take this many pictures, spread evenly.  [default: all]"),
]
Classes = Annotated[
    Path | None,
    typer.Option(help="File that maps the data's classes to the model's."),
]
ClassOrder = Annotated[
    class_order.ClassOrder | None,
    typer.Option(
        help="Whose order numbers class names that the model does not know.  [default: what its "
        "checkpoint says, or torchvision]",
        show_default=False,
    ),
]
NoLabels = Annotated[bool, typer.Option("--no-labels", help="Leave labels aside.")]
MaxUnreadable = Annotated[
    str, typer.Option(help="Share of unreadable pictures beyond which it stops.")
]
Cut = Annotated[
    float | None,
    typer.Option(
        help="Of a model with one output: above it is class 1, else class 0.  [default: 0]",
        show_default=False,
    ),
]
BackendName = Annotated[Backend, typer.Option(help="What runs the model.")]
BatchSize = Annotated[int, typer.Option(help="Pictures a run; timing is of one.")]
Ray = Annotated[
    str | None,
    typer.Option(help="Run on a Ray cluster: host:port, auto, or local.", metavar="ADDRESS"),
]
Timing = Annotated[int, typer.Option(help="Runs that each latency is of; 0: no timing.")]


@takes_checkpoint()
def sweep(
    model: Annotated[str, typer.Argument(help="Checkpoint, hub folder, or exported folder.")],
    data: Data,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="first:last:step, or a list: 0.9,0.8.  [default: 0.95:0.6:0.05]",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="'auto', or sets of blocks: 3,6,9;2,5,8.  [default: the model's, or auto]"
        ),
    ] = None,
    place: PlaceChoice = None,
    features: FeaturesChoice = None,
    selection: Annotated[
        str | None,
        typer.Option(help="pairs, redundancy, or both: pairs,redundancy.  [default: pairs]"),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option(help="merge, drop, or both.  [default: merge]"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="'dynamic', or counts as in export: dynamic;64.  [default: dynamic]"),
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="What runs the model.  [default: onnxruntime, with --compare torch]",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Baselines too, at the same token counts, in PyTorch."),
    ] = False,
    limit: Limit = None,
    classes: Classes = None,
    class_order: ClassOrder = None,
    no_labels: NoLabels = False,
    cut: Cut = None,
    max_unreadable: MaxUnreadable = "1%",
    batch: BatchSize = 32,
    timing: Timing = 200,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write.  [default: NAME-sweep]"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier sweep.")] = False,
    ray: Ray = None,
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    as_json: Json = False,
) -> None:
    """Measure accuracy, tokens, time and memory at many settings, beside the dense model."""
    with errors():
        from simprune_deploy.reports.bars import progress_bar
        from simprune_deploy.reports.sweep import write_reports
        from simprune_deploy.tuning.commands import SweepRequest
        from simprune_deploy.tuning.commands import sweep as measure

        request = SweepRequest(
            model=model,
            data=data,
            thresholds=None if thresholds is None else parse_thresholds(thresholds),
            layers=None if layers is None else parse_layer_sets(layers),
            selections=None if selection is None else tuple(selection.split(",")),
            reductions=None if reduction is None else tuple(reduction.split(",")),
            tokens=None if tokens is None else parse_token_sets(tokens),
            backend=backend,
            place=place,
            features=features,
            compare=compare,
            limit=limit,
            classes=classes,
            class_order=class_order,
            labels=not no_labels,
            cut=cut,
            max_unreadable=parse_share(max_unreadable),
            batch=batch,
            timing=timing,
            output=output,
            resume=resume,
            force=force,
            ray=ray,
            checkpoint=checkpoint,
            command=command_line(),
        )
        with progress_bar(enabled=not as_json) as bar:
            result = measure(request, bar=bar)
            reports = write_reports(result, request.folder)
        written = [request.folder / "sweep.json", *reports]
        if as_json:
            files = [path.name for path in written]
            print_json({"output": str(request.folder), "files": files, **result.to_dict()})
        else:
            _print_sweep(result, written)


def _print_sweep(result: SweepResult, written: list[Path]) -> None:
    from rich.console import Console

    from simprune_deploy.reports.tables import print_sweep

    console = Console()
    print_sweep(console, result)
    for note in result.data["notes"]:
        console.print(note, style="dim", highlight=False, markup=False)
    for path in written:
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if not any(path.suffix == ".html" for path in written):
        console.print(
            'no page and no plots: pip install "simprune-deploy[report]", then '
            f"`simprune-deploy report {written[0].parent} -o report.html`",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def command_line() -> str:
    """Return the command that runs, as one would type it."""
    return shlex.join(["simprune-deploy", *sys.argv[1:]])
