"""``verify --data``: is the model as accurate as another one was?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from simprune_deploy.cli.common import load_model, print_json
from simprune_deploy.cli.sweep import parse_share
from simprune_deploy.common.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.evaluate.accuracy import Limits
    from simprune_deploy.evaluate.answers import Contestant

AGAINST = ("dense", "pruned")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the options of ``verify`` say of the check; :mod:`simprune_deploy.cli.verify` has help.

    The first nine are of every verification, the rest of the accuracy check.
    """

    target: Path
    reference: str | None
    arch: str | None
    pretrained: bool
    trust_pickle: bool
    as_json: bool
    engine: bool
    plugin: Path | None
    data: Path
    max_drop: str | None
    min_agreement: str | None
    sure: bool
    against: str
    baseline: Path | None
    retrained: bool
    save_baseline: Path | None
    force: bool
    junit: Path | None
    markdown: Path | None
    limit: int | None
    classes: Path | None
    no_labels: bool
    max_unreadable: str


def check_accuracy(request: Request) -> None:
    """Compare, print, write what was asked for; exit with 1 if a check did not pass."""
    from rich.console import Console

    from simprune_deploy.common.files import staged_file
    from simprune_deploy.evaluate.accuracy import compare, load_baseline, save_baseline
    from simprune_deploy.evaluate.answers import ask
    from simprune_deploy.evaluate.datasets import DataOptions, open_data
    from simprune_deploy.report.accuracy import print_accuracy, to_junit, to_markdown
    from simprune_deploy.report.terminal import progress

    limits = _limits(request)
    _check_request(request, limits)
    options = DataOptions(
        request.limit,
        not request.no_labels,
        request.classes,
        parse_share(request.max_unreadable),
    )
    with progress(enabled=not request.as_json) as step:
        step("loading")
        contestants = _contestants(request, compared=limits is not None)
        pictures = open_data(request.data, contestants[0].metadata, options)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            step(f"{done:,} of {len(pictures):,} images")

        asked = ask(contestants, pictures, advance)
    data = pictures.to_dict()
    data["images"] = len(asked.answers[0].winners)
    data["skipped"] = [list(pair) for pair in asked.skipped]
    candidate = asked.answers[0]
    report = None
    if limits is not None:
        notes = list(pictures.notes)
        if request.baseline is not None:
            reference = load_baseline(request.baseline, candidate, data, request.retrained)
            title = f"baseline {request.baseline}: {reference.title}"
            reference = dataclasses.replace(reference, title=title)
        else:
            reference = asked.answers[1]
        report = compare(
            candidate, reference, asked.labels, limits, data, pictures.classes, tuple(notes)
        )
        for path, write in ((request.junit, to_junit), (request.markdown, to_markdown)):
            if path is not None:
                content = write(report)
                with staged_file(path) as staging:
                    staging.write_bytes(content if isinstance(content, bytes) else content.encode())
    saved = request.save_baseline if report is None or report.passed else None
    if saved is not None:
        save_baseline(saved, candidate, data)
    if request.as_json:
        found: dict[str, Any] = {} if report is None else report.to_dict()
        print_json({**found, "saved_baseline": None if saved is None else str(saved)})
    else:
        console = Console()
        if report is not None:
            print_accuracy(console, report)
        if request.save_baseline is not None:
            words = f"saved {saved}" if saved else "the baseline was not saved: the check says no"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
    if report is not None and not report.passed:
        raise typer.Exit(1)


def _limits(request: Request) -> Limits | None:
    """Return what is let pass; None if a baseline is saved and nothing compared."""
    from simprune_deploy.evaluate.accuracy import Limits

    drop, agreement = request.max_drop, request.min_agreement
    if drop is None and agreement is None and request.save_baseline is not None:
        return None
    return Limits(
        None if drop is None else parse_share(drop),
        None if agreement is None else parse_share(agreement),
        request.sure,
    )


def _check_request(request: Request, limits: Limits | None) -> None:
    """Refuse what cannot be done before anything is loaded."""
    if request.against not in AGAINST:
        raise SimpruneError(f"--against {request.against!r} is unknown: use dense or pruned")
    if request.baseline is not None and request.reference is not None:
        raise SimpruneError("--baseline and --reference each name what to compare with: give one")
    if request.against == "pruned" and request.reference is None:
        raise SimpruneError("--against pruned prunes the --reference: give one")
    if request.retrained and request.baseline is None:
        raise SimpruneError("--retrained is said of a --baseline: give one")
    if limits is None:
        given = {"--baseline": request.baseline, "--reference": request.reference,
                 "--junit": request.junit, "--markdown": request.markdown}  # fmt: skip
        if named := [name for name, value in given.items() if value is not None]:
            raise SimpruneError(f"{named[0]} needs a limit: --max-drop 0.5% or --min-agreement 99%")
    saved = request.save_baseline
    if saved is not None and saved.exists() and not request.force:
        raise SimpruneError(f"{saved} already exists: replace it with --force")
    for path in (saved, request.junit, request.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise SimpruneError(
                f"{path.parent} is no folder: make it, or write {path.name} elsewhere"
            )


def _contestants(request: Request, compared: bool) -> list[Contestant]:
    """Return the model, and behind it the one to compare with unless that is a baseline."""
    from simprune_deploy.engine import ENGINE_SUFFIX
    from simprune_deploy.evaluate.answers import open_engine, open_export, open_model

    target = str(request.target)
    if not request.target.exists() and not request.pretrained:
        raise SimpruneError(f"{target} does not exist: give an exported folder or a checkpoint")
    if request.engine or request.target.suffix == ENGINE_SUFFIX:
        first = open_engine(request.target, request.plugin)
        folder = request.target
        if folder.suffix == ENGINE_SUFFIX:
            folder = folder.absolute().parent.parent
        return _with_other(request, first, folder, compared)
    exported = _is_export(request.target)
    if exported and request.reference is None and (request.arch or request.trust_pickle):
        raise SimpruneError("--arch and --trust-pickle are for checkpoints, and none is given")
    if exported:
        first = open_export(request.target)
        return _with_other(request, first, request.target, compared)
    model = _pruned(request, target)
    first = open_model(target, model)
    if compared and request.baseline is None and request.reference is None:
        if not model.config.layers:
            raise SimpruneError(f"{target} {NOTHING_PRUNED}")
        return [first, open_model(target, _without_pruning(model))]
    return _with_other(request, first, request.target, compared)


def _with_other(
    request: Request, first: Contestant, folder: Path, compared: bool
) -> list[Contestant]:
    """Return the model with what it is compared with; without --reference the dense graph."""
    from simprune_deploy.evaluate.answers import open_export, open_model

    if not compared or request.baseline is not None:
        return [first]
    if request.reference is None:
        if not first.metadata.pruning.layers:
            raise SimpruneError(f"{folder} {NOTHING_PRUNED}")
        return [first, open_export(folder, dense=True)]
    if _is_export(Path(request.reference)):
        if request.against == "pruned":
            raise SimpruneError(
                f"--against pruned is for checkpoints; {request.reference} is pruned as exported"
            )
        return [first, open_export(Path(request.reference))]
    reference = _pruned(request, request.reference)
    if request.against == "pruned":
        from simprune_deploy.pruning.model import PrunedViT

        reference = PrunedViT(reference.vit, first.metadata.pruning)
    elif reference.config.layers:
        reference = _without_pruning(reference)
    return [first, open_model(request.reference, reference)]


NOTHING_PRUNED = (
    "prunes nothing, so there is nothing to compare it with: give --reference MODEL or "
    "--baseline FILE"
)


def _is_export(path: Path) -> bool:
    from simprune_deploy.onnx.exported_folder import MANIFEST

    return (path / MANIFEST).is_file() or path.suffix == ".onnx"


def _pruned(request: Request, source: str) -> Any:
    """Return a checkpoint's model as a PrunedViT; one that was not pruned has no prune layers."""
    from simprune_deploy.pruning.config import PruneConfig
    from simprune_deploy.pruning.model import PrunedViT

    model = load_model(source, request.arch, None, request.pretrained, request.trust_pickle).model
    return model if isinstance(model, PrunedViT) else PrunedViT(model, PruneConfig())


def _without_pruning(model: Any) -> Any:
    from simprune_deploy.pruning.model import PrunedViT

    config = dataclasses.replace(model.config, layers=(), capacities=())
    return PrunedViT(model.vit, config)
