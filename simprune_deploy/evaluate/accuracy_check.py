"""``verify --data`` as a function: two models on the same pictures, and how much may be lost."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Literal

from simprune_deploy.checkpoints.options import CheckpointOptions, for_checkpoints
from simprune_deploy.common.errors import (
    ArtifactError,
    DestinationError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import as_path, request_of
from simprune_deploy.engine import ENGINE_SUFFIX
from simprune_deploy.evaluate.accuracy import (
    AccuracyLimits,
    AccuracyReport,
    compare,
    load_baseline,
    save_baseline,
)
from simprune_deploy.evaluate.class_order import ClassOrder
from simprune_deploy.evaluate.datasets import MAX_UNREADABLE, DataOptions, open_data
from simprune_deploy.evaluate.predictions import (
    ComparedModel,
    open_model,
    predict_classes,
    weight_norms,
)
from simprune_deploy.predict.answers import check_cut, cut_of
from simprune_deploy.predict.source import (
    ModelSource,
    as_exported,
    is_export,
    open_source,
    source_of_export,
    source_of_model,
)

Against = Literal["dense", "pruned"]

NOTHING_PRUNED = (
    f"prunes nothing, so there is nothing to compare it with: give {argument('reference', 'MODEL')}"
    f" or {argument('baseline', 'FILE')}"
)


@dataclasses.dataclass(frozen=True)
class AccuracyRequest:
    """What to compare, on what, and how much may be lost.

    Args:
        model: An exported folder, its ONNX file, one of its engines, a checkpoint, or a model.
        data: A folder with a folder a class, or of pictures; .csv, .npz; a Hugging Face data set.
        max_drop: Of top-1 accuracy, as a share: 0.005 is half a point. Default None: not asked.
        min_agreement: Share of images with the same class. Default None: not asked.
        sure: Require it of the whole 95 % confidence interval. Default False.
        reference: Another of these to compare with. Default None: the same without its pruning.
        against: Whether a reference checkpoint runs "dense" (default) or "pruned" as `model` is.
        baseline: Stored predictions to compare with. Default None.
        retrained: Let pass that the baseline is of other weights. Default False.
        save_baseline: Store the predictions of `model` here, unless the check fails.
        force: Replace a stored baseline. Default False.
        engine: Run the folder's engine on the GPU here. Default False.
        plugin: The library of the plugin in the engine. Default: looked for.
        checkpoint: How checkpoints are loaded.
        limit: Take this many pictures, spread evenly. Default None: all.
        labels: Use labels where there are any. Default True.
        classes: File that maps the data's classes to the model's. Default None.
        class_order: "timm" or "torchvision": whose order numbers class names that the model does
            not know. Default None: what the model's training checkpoint says, or torchvision's.
        max_unreadable: The share of unreadable pictures beyond which it stops. Default 0.01.
        cut: Of a model with one output: above it is class 1, at or below it class 0. Default None:
            0, of a logit the probability of one half.

    Raises:
        InvalidArgumentError: the arguments contradict each other, or a limit is no share.
        DestinationError: the baseline is there already, or its folder is not.
    """

    model: Any
    data: str | Path
    max_drop: float | None = None
    min_agreement: float | None = None
    sure: bool = False
    reference: Any = None
    against: Against = "dense"
    baseline: str | Path | None = None
    retrained: bool = False
    save_baseline: str | Path | None = None
    force: bool = False
    engine: bool = False
    plugin: str | Path | None = None
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)
    limit: int | None = None
    labels: bool = True
    classes: str | Path | None = None
    class_order: ClassOrder | None = None
    max_unreadable: float = MAX_UNREADABLE
    cut: float | None = None

    def __post_init__(self) -> None:
        limits = self.limits
        check_cut(self.cut)
        if self.against not in ("dense", "pruned"):
            raise InvalidArgumentError(
                f"{argument('against')} {self.against!r} is unknown: use dense or pruned",
                what="against",
                value=self.against,
                allowed=("dense", "pruned"),
            )
        if self.baseline is not None and self.reference is not None:
            raise InvalidArgumentError(
                f"{argument('baseline')} and {argument('reference')} each name what to compare "
                "with: give one"
            )
        if self.against == "pruned" and self.reference is None:
            raise InvalidArgumentError(
                f"{argument('against', 'pruned')} prunes the {argument('reference')}: give one"
            )
        if self.retrained and self.baseline is None:
            raise InvalidArgumentError(
                f"{argument('retrained', True)} is said of a {argument('baseline')}: give one"
            )
        if limits is None and (self.baseline or self.reference):
            name = "baseline" if self.baseline else "reference"
            raise needs_a_limit(name)
        saved = as_path(self.save_baseline)
        if saved is not None and saved.exists() and not self.force:
            raise DestinationError(
                f"{saved} already exists: replace it with {argument('force', True)}"
            )
        check_folder_of(saved)
        self.data_options  # noqa: B018  (checks its values)

    @property
    def limits(self) -> AccuracyLimits | None:
        """What may be lost; None if a baseline is saved and nothing compared."""
        asked = self.max_drop is not None or self.min_agreement is not None
        if not asked and self.save_baseline is not None:
            return None
        return AccuracyLimits(self.max_drop, self.min_agreement, self.sure)

    @property
    def data_options(self) -> DataOptions:
        """What is said of the data."""
        return DataOptions(
            self.limit,
            self.labels,
            as_path(self.classes),
            self.max_unreadable,
            self.class_order,
        )


@dataclasses.dataclass(frozen=True)
class AccuracyResult:
    """What the check found.

    Attributes:
        report: The answers; None if nothing was compared.
        saved_baseline: Where the predictions were stored; None if they were not.
    """

    report: AccuracyReport | None
    saved_baseline: Path | None

    @property
    def passed(self) -> bool:
        return self.report is None or self.report.passed

    def __str__(self) -> str:
        saved = [] if self.saved_baseline is None else [f"predictions: {self.saved_baseline}"]
        found = [] if self.report is None else [str(self.report)]
        return "\n".join([*found, *saved])

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        found = {} if self.report is None else self.report.to_dict()
        saved = self.saved_baseline
        return {**found, "saved_baseline": None if saved is None else str(saved)}


def needs_a_limit(name: str) -> InvalidArgumentError:
    """Return the error of an argument that means nothing where nothing is compared."""
    return InvalidArgumentError(
        f"{argument(name)} needs a limit: {argument('max_drop', 0.005, '0.5%')} or "
        f"{argument('min_agreement', 0.99, '99%')}"
    )


def check_folder_of(path: Path | None) -> None:
    """Refuse a file whose folder is not there.

    Raises:
        DestinationError: it is not.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise DestinationError(
            f"{path.parent} is no folder: make it, or write {path.name} elsewhere"
        )


def check_accuracy(
    model: AccuracyRequest | str | Path, *, progress: Progress = silent, **fields: Any
) -> AccuracyResult:
    """Compare a model's accuracy with another's on the same pictures.

    Args:
        model: The request, or its first field; the others by name.
        progress: Called with a word on each step.

    Returns:
        The report; whether it passed is for the caller to act on.

    Raises:
        SimpruneError: a model, the pictures or the baseline cannot be used.
    """
    request = request_of(AccuracyRequest, model, fields)
    limits = request.limits
    progress("loading")
    with contextlib.ExitStack() as stack:
        models = _models(request, compared=limits is not None, progress=progress)
        for each in models:
            stack.enter_context(each.predictor)
        cut_of(models[0].metadata.num_classes, request.cut)  # before anything runs
        pictures = open_data(Path(request.data), models[0].metadata, request.data_options)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(f"{done:,} of {len(pictures):,} images")

        found = predict_classes(models, pictures, advance, request.cut)
    data = pictures.to_dict()
    data["images"] = len(found.predictions[0].classes)
    data["skipped"] = [list(pair) for pair in found.skipped]
    candidate = found.predictions[0]
    report = None
    if limits is not None:
        if request.baseline is not None:
            reference = load_baseline(Path(request.baseline), candidate, data, request.retrained)
            title = f"baseline {request.baseline}: {reference.title}"
            reference = dataclasses.replace(reference, title=title)
        else:
            reference = found.predictions[1]
        notes = tuple(pictures.notes)
        report = compare(candidate, reference, found.labels, limits, data, pictures.classes, notes)
    passed = report is None or report.passed
    saved = as_path(request.save_baseline) if passed else None
    if saved is not None:
        save_baseline(saved, candidate, data)
    return AccuracyResult(report, saved)


def _models(request: AccuracyRequest, compared: bool, progress: Progress) -> list[ComparedModel]:
    """Return the model, and behind it the one to compare with unless that is a baseline."""
    target = Path(request.model) if isinstance(request.model, (str, Path)) else None
    if target is not None and not target.exists() and not request.checkpoint.pretrained:
        raise ArtifactError(f"{target} does not exist: give an exported folder or a checkpoint")
    if target is not None and (request.engine or target.suffix == ENGINE_SUFFIX):
        first, source = _engine(target, as_path(request.plugin), progress)
    elif request.engine or request.plugin is not None:
        raise InvalidArgumentError(
            f"{argument('plugin')} is for engines: add {argument('engine', True)}"
            if request.plugin is not None
            else f"{argument('engine', True)} is for exported folders, and a model is given"
        )
    else:
        source = _source(request, target)
        first = open_model(source)
    if not compared or request.baseline is not None:
        return [first]
    if request.reference is None:
        if not source.metadata.pruning.layers:
            raise InvalidArgumentError(f"{source.name} {NOTHING_PRUNED}")
        return [first, open_model(source, dense=True)]
    return [first, _reference(request, request.reference, source)]


def _source(request: AccuracyRequest, target: Path | None) -> ModelSource:
    if target is None or not _is_exported(target):
        return open_source(request.model, request.checkpoint)
    if request.reference is None and request.checkpoint.given:
        raise for_checkpoints(request.checkpoint, f"{target}, an export,")
    return source_of_export(target)


def _is_exported(target: Path) -> bool:
    return is_export(target) or target.suffix == ".onnx"


def _reference(request: AccuracyRequest, reference: Any, source: ModelSource) -> ComparedModel:
    if isinstance(reference, (str, Path)) and _is_exported(Path(reference)):
        if request.against == "pruned":
            raise InvalidArgumentError(
                f"{argument('against', 'pruned')} is for checkpoints; {reference} is pruned as "
                "exported"
            )
        return open_model(source_of_export(Path(reference)))
    options = request.checkpoint
    if source.graph is not None and isinstance(reference, (str, Path)):
        options = as_exported(options, source.metadata)
    other = open_source(reference, options)
    if request.against == "pruned":
        from simprune_deploy.pruning.model import PrunedViT

        assert other.model is not None
        pruned = PrunedViT(other.model.vit, source.metadata.pruning)
        return open_model(source_of_model(other.name, pruned))
    return open_model(other, dense=True)


def _engine(
    target: Path, plugin: Path | None, progress: Progress
) -> tuple[ComparedModel, ModelSource]:
    from simprune_deploy.predict.engine_files import shipped_engine

    spec, source = shipped_engine(target, plugin, progress)
    predictor = spec.open()
    runtime = predictor.runtime
    title = (
        f"{target}, pruned at {source.metadata.pruning.point()} ({runtime.name} "
        f"{runtime.version} on {runtime.device}, {runtime.details['engine']['file']})"
    )
    return ComparedModel(title, predictor, weight_norms(source)), source
