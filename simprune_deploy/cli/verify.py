"""``verify``: prove an exported model again."""

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
from simprune_deploy.errors import SimpruneError


def verify(
    target: Annotated[Path, typer.Argument(help="Exported folder, or its model.onnx.")],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Checkpoint to compare with.  [default: the golden cases]"),
    ] = None,
    arch: Arch = None,
    images: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Pictures, with --reference.  [default: some that come along]"),
    ] = None,
    pretrained: Pretrained = False,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
) -> None:
    """Prove an exported model again: against its golden cases, or against PyTorch."""
    with errors():
        from rich.console import Console

        from simprune_deploy import bundle
        from simprune_deploy.report.terminal import print_verdict, progress

        if reference is None and (arch or trust_pickle or pretrained):
            raise SimpruneError("--arch, --pretrained and --trust-pickle belong to --reference")
        with progress(enabled=not as_json) as step:
            model = None
            if reference is not None:
                model = _reference_of(target, reference, arch, pretrained, trust_pickle)
            verdict = bundle.verify(target, reference=model, images=images, progress=step)
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
    from simprune_deploy.bundle import MODEL
    from simprune_deploy.onnx.metadata import load_graph, read_facts
    from simprune_deploy.pruning.model import PrunedViT

    facts = read_facts(load_graph(target / MODEL if target.is_dir() else target))
    height, width = facts.image_size
    size = height if height == width else (height, width)
    model = load_model(reference, arch, size, pretrained, trust_pickle).model
    return PrunedViT(getattr(model, "vit", model), facts.pruning)
