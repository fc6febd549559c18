"""``verify``: verify an exported model again, or hold its accuracy against another's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.cli.accuracy import ACCURACY_ONLY, AccuracyCommand
from simprune_deploy.cli.checkpoints import FROM_THE_FILE, takes_checkpoint
from simprune_deploy.cli.common import (
    Json,
    errors,
    print_json,
    was_typed,
)
from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.evaluate.class_order import ClassOrder

Against = Literal["dense", "pruned"]
ACCURACY = "Accuracy check, with --data"


@takes_checkpoint("img_size")
def verify(
    context: typer.Context,
    target: Annotated[
        Path,
        typer.Argument(
            help="Exported folder, its model.onnx, or one of its engines; with --data also a "
            "checkpoint."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Checkpoint to compare with.  [default: the golden cases]"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Pictures, with --reference.  [default: some that come along]"),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Run the folder's engine, on the GPU here, not ONNX Runtime."
        ),
    ] = False,
    plugin: Annotated[
        Path | None,
        typer.Option(
            help="Library of the plugin in the engine.  [default: as in build]", show_default=False
        ),
    ] = None,
    checkpoint: CheckpointOptions = FROM_THE_FILE,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Check the accuracy on these images: a folder with a folder a class, or of "
            "pictures; .csv, .npz; Hugging Face.",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Top-1 accuracy that may be lost: 0.5%.", rich_help_panel=ACCURACY),
    ] = None,
    min_agreement: Annotated[
        str | None,
        typer.Option(
            help="Share of images that must keep their class: 99%.", rich_help_panel=ACCURACY
        ),
    ] = None,
    sure: Annotated[
        bool,
        typer.Option(
            "--sure",
            help="Ask it of the whole 95% confidence interval.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    against: Annotated[
        Against,
        typer.Option(
            help="How --reference is asked: dense, or pruned as TARGET says.",
            rich_help_panel=ACCURACY,
        ),
    ] = "dense",
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Compare with these stored answers.  [default: TARGET without its pruning]",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    retrained: Annotated[
        bool,
        typer.Option(
            "--retrained",
            help="The baseline may be of other weights of this architecture.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    save_baseline: Annotated[
        Path | None,
        typer.Option(
            help="Store TARGET's answers, unless the check fails.", rich_help_panel=ACCURACY
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a stored baseline.", rich_help_panel=ACCURACY),
    ] = False,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write JUnit XML.", rich_help_panel=ACCURACY),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(help="Write a summary for a pull request.", rich_help_panel=ACCURACY),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Take this many pictures, spread evenly.  [default: all]",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File that maps the data's classes to the model's.", rich_help_panel=ACCURACY
        ),
    ] = None,
    class_order: Annotated[
        ClassOrder | None,
        typer.Option(
            help="Whose order numbers class names that the model does not know.  [default: what "
            "its checkpoint says, or torchvision]",
            show_default=False,
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Leave labels aside.", rich_help_panel=ACCURACY)
    ] = False,
    cut: Annotated[
        float | None,
        typer.Option(
            help="Of a model with one output: above it is class 1, else class 0.  [default: 0]",
            show_default=False,
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    max_unreadable: Annotated[
        str,
        typer.Option(
            help="Share of unreadable pictures beyond which it stops.", rich_help_panel=ACCURACY
        ),
    ] = "1%",
    as_json: Json = False,
) -> None:
    """Verify an exported model again, or with --data hold its accuracy against another's."""
    with errors():
        if data is not None:
            if images is not None:
                raise InvalidArgumentError(
                    "--images is for the parity check, --data for the accuracy: drop one"
                )
            AccuracyCommand(max_drop, min_agreement, max_unreadable, junit, markdown, as_json).run(
                model=str(target),
                data=data,
                sure=sure,
                reference=reference,
                against=against,
                baseline=baseline,
                retrained=retrained,
                save_baseline=save_baseline,
                force=force,
                engine=engine,
                plugin=plugin,
                checkpoint=checkpoint,
                limit=limit,
                labels=not no_labels,
                cut=cut,
                classes=classes,
                class_order=class_order,
            )
            return
        stray = [name for name in ACCURACY_ONLY if was_typed(context, name)]
        if stray:
            option = stray[0].replace("_", "-")
            raise InvalidArgumentError(f"--{option} belongs to --data: give images")
        if reference is None and checkpoint.given:
            raise InvalidArgumentError(f"{argument(checkpoint.given[0])} belongs to --reference")
        from rich.console import Console

        from simprune_deploy.deploy.verification import VerifyRequest, verify
        from simprune_deploy.reports.terminal import print_verdict, progress

        with progress(enabled=not as_json) as step:
            verdict = verify(
                VerifyRequest(target, reference, images, engine, plugin, checkpoint),
                progress=step,
            )
        if as_json:
            print_json(verdict.to_dict())
        else:
            print_verdict(Console(), verdict)
        if not verdict.accepted:
            raise typer.Exit(1)
