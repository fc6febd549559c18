"""``verify``: verify an exported model again, or hold its accuracy against another's."""

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
    print_json,
)
from simprune_deploy.common.errors import SimpruneError

ACCURACY = "Accuracy check, with --data"


def verify(
    target: Annotated[
        Path,
        typer.Argument(
            help="Exported folder, its model.onnx, or one of its engines; with --data also a "
            "checkpoint."
        ),
    ],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Checkpoint to compare with.  [default: the golden cases]"),
    ] = None,
    arch: Arch = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pictures, with --reference.  [default: some that come along]"),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Run the folder's engine, on the GPU here, not ONNX Runtime."
        ),
    ] = False,
    plugin: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Library of the plugin in the engine.  [default: as in build]", show_default=False
        ),
    ] = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Check the accuracy on these images: a folder with a folder a class, or of "
            "pictures; .csv, .npz; Hugging Face.",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    max_drop: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Top-1 accuracy that may be lost: 0.5%.", rich_help_panel=ACCURACY),
    ] = None,
    min_agreement: Annotated[
        Optional[str],  # noqa: UP045
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
        str,
        typer.Option(
            help="How --reference is asked: dense, or pruned as TARGET says.",
            rich_help_panel=ACCURACY,
        ),
    ] = "dense",
    baseline: Annotated[
        Optional[Path],  # noqa: UP045
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
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Store TARGET's answers, unless the check fails.", rich_help_panel=ACCURACY
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a stored baseline.", rich_help_panel=ACCURACY),
    ] = False,
    junit: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write JUnit XML.", rich_help_panel=ACCURACY),
    ] = None,
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Write a summary for a pull request.", rich_help_panel=ACCURACY),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Take this many pictures, spread evenly.  [default: all]",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    classes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="File that maps the data's classes to the model's.", rich_help_panel=ACCURACY
        ),
    ] = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Leave labels aside.", rich_help_panel=ACCURACY)
    ] = False,
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
        from simprune_deploy.cli.accuracy import Request, check_accuracy

        of_accuracy = {
            "max_drop": max_drop,
            "min_agreement": min_agreement,
            "sure": sure,
            "against": against,
            "baseline": baseline,
            "retrained": retrained,
            "save_baseline": save_baseline,
            "force": force,
            "junit": junit,
            "markdown": markdown,
            "limit": limit,
            "classes": classes,
            "no_labels": no_labels,
            "max_unreadable": max_unreadable,
        }
        if data is not None:
            if images is not None:
                raise SimpruneError(
                    "--images is for the parity check, --data for the accuracy: drop one"
                )
            common = (
                *(target, reference, arch, pretrained, trust_pickle, as_json),
                *(engine, plugin, data),
            )
            check_accuracy(Request(*common, **of_accuracy))  # type: ignore[arg-type]
            return
        changed = of_accuracy | {"against": against != "dense"}
        changed["max_unreadable"] = max_unreadable != "1%"
        if stray := [name for name, value in changed.items() if value not in (None, False)]:
            raise SimpruneError(f"--{stray[0].replace('_', '-')} belongs to --data: give images")
        from rich.console import Console

        from simprune_deploy.deploy import verification
        from simprune_deploy.engine import ENGINE_SUFFIX
        from simprune_deploy.engine.inventory import engine_to_verify
        from simprune_deploy.report.terminal import print_verdict, progress

        if reference is None and (arch or trust_pickle or pretrained):
            raise SimpruneError("--arch, --pretrained and --trust-pickle belong to --reference")
        with progress(enabled=not as_json) as step:
            model = None
            if reference is not None:
                if engine or target.suffix == ENGINE_SUFFIX:
                    engine_to_verify(target, plugin)  # before the checkpoint is loaded
                model = _reference_of(target, reference, arch, pretrained, trust_pickle)
            verdict = verification.verify(
                target,
                reference=model,
                images=images,
                engine=engine,
                plugin=plugin,
                progress=step,
            )
        if as_json:
            print_json(verdict.to_dict())
        else:
            print_verdict(Console(), verdict)
        if not verdict.accepted:
            raise typer.Exit(1)


def _reference_of(
    target: Path, reference: str, arch: str | None, pretrained: bool, trust_pickle: bool
) -> Any:
    """Load the PyTorch model and prune it as the exported file says it was pruned."""
    from simprune_deploy.engine import ENGINE_SUFFIX
    from simprune_deploy.onnx.exported_folder import MODEL
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.pruning.model import PrunedViT

    if target.suffix == ENGINE_SUFFIX:
        target = target.absolute().parent.parent
    metadata = read_metadata(load_graph(target / MODEL if target.is_dir() else target))
    height, width = metadata.image_size
    size = height if height == width else (height, width)
    model = load_model(reference, arch, size, pretrained, trust_pickle).model
    return PrunedViT(getattr(model, "vit", model), metadata.pruning)
