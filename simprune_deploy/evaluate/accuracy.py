"""Is a model as accurate as another one was? The check for CI, with its doubts.

Two models answer to the same pictures: the drop of accuracy has a paired confidence interval, the
agreement one of its own. A check on too few pictures to show anything does not pass.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from simprune_deploy.common.errors import (
    ArtifactError,
    InvalidArgumentError,
    argument,
)
from simprune_deploy.common.files import staged_file, write_json
from simprune_deploy.common.requests import check_between
from simprune_deploy.evaluate.classes import ClassResult
from simprune_deploy.evaluate.predictions import Predictions
from simprune_deploy.evaluate.statistics import (
    PAIRED_METHOD,
    SHARE_METHOD,
    Interval,
    images_for_drop,
    images_for_share,
    paired_drop,
    share,
)
from simprune_deploy.predict.answers import Movement, classes_of, movement, one_sided

FORMAT = 1
KIND = "simprune-deploy accuracy baseline"
MAX_BASELINE_BYTES = 256 << 20
SAME_NORM = 2e-3
"""Norms of weights that differ by no more are of the same weights, in whichever precision: they
differ by 6e-4 at most between float32 and bfloat16, and by far more after training on."""

PASSED, FAILED, TOO_FEW = "passed", "failed", "too few images"


@dataclasses.dataclass(frozen=True)
class AccuracyLimits:
    """How much may be lost.

    Args:
        max_drop: Of top-1 accuracy, as a share: 0.005 is half a point. Default None: not asked.
        min_agreement: Share of images with the same class. Default None: not asked.
        sure: Require it of the whole 95 % confidence interval, not of what was measured. Default
            False.

    Raises:
        SimpruneError: a limit is no share, or neither is given.
    """

    max_drop: float | None = None
    min_agreement: float | None = None
    sure: bool = False

    def __post_init__(self) -> None:
        examples = {"max_drop": (0.005, "0.5%"), "min_agreement": (0.99, "99%")}
        for name, value in (("max_drop", self.max_drop), ("min_agreement", self.min_agreement)):
            if value is not None:
                check_between(name, value, 0, 1, argument(name, *examples[name]))
        if self.max_drop is None and self.min_agreement is None:
            wishes = " or ".join(argument(name, *each) for name, each in examples.items())
            raise InvalidArgumentError(f"say what is let pass: {wishes}")


@dataclasses.dataclass(frozen=True)
class AccuracyCheck:
    """One question and its answer.

    Attributes:
        name: "accuracy drop" or "agreement".
        status: "passed", "failed", or "too few images".
        limit: What was let pass, as a share.
        found: What was measured, with its interval.
        summary: One sentence for people.
    """

    name: str
    status: str
    limit: float
    found: Interval
    summary: str


@dataclasses.dataclass(frozen=True)
class AccuracyReport:
    """Everything that the check found.

    Attributes:
        checks: The answers.
        candidate, reference: The models compared.
        accuracy, reference_accuracy: Top-1 accuracy; None without labels.
        data: What the pictures are; "images": how many were compared, "skipped": [file, reason].
        classes: Per class; empty without labels.
        notes: What a reader should know.
        cut: Where one output is cut into two classes; None of models with more.
        moved: How far it is from the other model's; None of models with more.
    """

    checks: tuple[AccuracyCheck, ...]
    candidate: str
    reference: str
    accuracy: float | None
    reference_accuracy: float | None
    data: dict[str, Any]
    classes: tuple[ClassResult, ...]
    notes: tuple[str, ...]
    cut: float | None = None
    moved: Movement | None = None

    @property
    def status(self) -> str:
        """ "failed" if a check failed; else "too few images" if one had too few; else "passed"."""
        found = {check.status for check in self.checks}
        return next(status for status in (FAILED, TOO_FEW, PASSED) if status in found)

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    def __str__(self) -> str:
        lines = [f"{each.name}: {each.status}: {each.summary}" for each in self.checks]
        return "\n".join([f"{self.candidate} against {self.reference}: {self.status}", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {
            "status": self.status,
            **dataclasses.asdict(self),
            "methods": {"accuracy drop": PAIRED_METHOD, "agreement": SHARE_METHOD},
        }


def compare(
    candidate: Predictions,
    reference: Predictions,
    labels: np.ndarray | None,
    limits: AccuracyLimits,
    data: dict[str, Any],
    classes: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> AccuracyReport:
    """Ask every question that `limits` asks of two models' answers to the same pictures.

    Raises:
        SimpruneError: a drop is asked for and there are no labels, or models with one output put
            every picture on the same side of the cut, and no label says that they should.
    """
    if limits.max_drop is not None and labels is None:
        raise InvalidArgumentError(
            f"{argument('max_drop')} needs labels, and the images have none: ask for "
            f"{argument('min_agreement')}"
        )
    mine, theirs = candidate.classes, reference.classes
    _check_sides(candidate, reference, labels)
    checks: list[AccuracyCheck] = []
    per_class: tuple[ClassResult, ...] = ()
    accuracies: tuple[float | None, float | None] = (None, None)
    if labels is not None:
        right, was_right = mine == labels, theirs == labels
        accuracies = float(right.mean()), float(was_right.mean())
        per_class = _per_class(labels, right, was_right, classes)
        if limits.max_drop is not None:
            lost, won = int((was_right & ~right).sum()), int((right & ~was_right).sum())
            checks.append(_check_drop(lost, won, len(labels), limits.max_drop, limits.sure))
    if limits.min_agreement is not None:
        same, wanted = int((mine == theirs).sum()), limits.min_agreement
        checks.append(_check_agreement(same, len(mine), wanted, limits.sure, candidate.cut))
    return AccuracyReport(
        checks=tuple(checks),
        candidate=candidate.title,
        reference=reference.title,
        accuracy=accuracies[0],
        reference_accuracy=accuracies[1],
        data=data,
        classes=per_class,
        notes=notes,
        cut=candidate.cut,
        moved=_moved(candidate, reference),
    )


def _check_sides(candidate: Predictions, reference: Predictions, labels: np.ndarray | None) -> None:
    """Refuse single outputs of which no class can be told: no check of them could fail."""
    if candidate.cut is None:
        return
    both = np.concatenate([candidate.classes, reference.classes])
    rightly = labels is not None and (reference.classes == labels).all()
    found = one_sided(int(both.sum()), len(both), candidate.cut)
    if found is not None and not rightly:
        raise InvalidArgumentError(f"of {candidate.title} and {reference.title} {found}")


def _moved(candidate: Predictions, reference: Predictions) -> Movement | None:
    if candidate.values is None or reference.values is None:
        return None
    return movement(candidate.values, reference.values)


def _check_drop(lost: int, won: int, images: int, limit: float, sure: bool) -> AccuracyCheck:
    drop = paired_drop(lost, won, images)
    text = (
        f"top-1 {_points(-drop.estimate)} points, 95% confidence {_points(-drop.high)} to "
        f"{_points(-drop.low)} (lost {lost:,}, won {won:,} of {images:,} images)"
    )
    question = _Question(
        drop.estimate <= limit, drop.high <= limit, images, images_for_drop(limit), sure
    )
    return AccuracyCheck("accuracy drop", question.status, limit, drop, text + question.doubt)


def _check_agreement(
    same: int, images: int, limit: float, sure: bool, cut: float | None
) -> AccuracyCheck:
    found = share(same, images)
    what = "same class" if cut is None else f"same side of {cut:g}"
    text = (
        f"{what} on {same:,} of {images:,} images ({found.estimate:.2%}), 95% confidence "
        f"{found.low:.2%} to {found.high:.2%}"
    )
    question = _Question(
        found.estimate >= limit, found.low >= limit, images, images_for_share(limit), sure
    )
    return AccuracyCheck("agreement", question.status, limit, found, text + question.doubt)


@dataclasses.dataclass(frozen=True)
class _Question:
    """What decides a check.

    Attributes:
        held: Whether what was measured meets the limit.
        certain: Whether the whole confidence interval does.
        images: How many there were.
        needed: With fewer no interval could meet the limit.
        sure: Whether the whole interval has to.
    """

    held: bool
    certain: bool
    images: int
    needed: int
    sure: bool

    @property
    def status(self) -> str:
        if self.certain:
            return PASSED
        if not self.held:
            return FAILED
        if self.images < self.needed:
            return TOO_FEW  # it held, and so it might by luck
        return FAILED if self.sure else PASSED

    @property
    def doubt(self) -> str:
        if self.status == TOO_FEW:
            return (
                f"; {self.images:,} images cannot show this limit, however good the model: take "
                f"{self.needed:,} or more, or let more pass"
            )
        if self.held and not self.certain:
            return "; not sure: the interval reaches past the limit"
        return ""


def _points(value: float) -> str:
    return f"{100 * value:+.2f}" if round(100 * value, 2) else "0.00"


def _per_class(
    labels: np.ndarray, right: np.ndarray, was_right: np.ndarray, names: tuple[str, ...]
) -> tuple[ClassResult, ...]:
    rows = []
    for label in np.unique(labels):
        chosen = labels == label
        name = names[label] if label < len(names) else str(label)
        counts = (int(each.sum()) for each in (chosen, right & chosen, was_right & chosen))
        rows.append(ClassResult(name, *counts))
    return tuple(rows)


def save_baseline(path: Path, predictions: Predictions, data: dict[str, Any]) -> None:
    """Store a model's answers for later comparisons; the file appears whole or not at all.

    Args:
        path: A JSON file.
        predictions: Of the model.
        data: What the pictures are; its "sha256" tells them from others.
    """
    # single outputs are stored as they are: any cut, and how far they moved, can be asked later
    single = predictions.values
    answers = predictions.classes if single is None else single
    with staged_file(path) as staging:
        write_json(
            staging,
            {
                "kind": KIND,
                "format": FORMAT,
                "title": predictions.title,
                "model": predictions.identity,
                "weights": predictions.weights,
                "data": {name: data[name] for name in ("source", "sha256")},
                ("winners" if single is None else "values"): answers.tolist(),
            },
        )


def load_baseline(
    path: Path, candidate: Predictions, data: dict[str, Any], retrained: bool = False
) -> Predictions:
    """Read a stored baseline that a model can be compared with.

    Args:
        path: What :func:`save_baseline` wrote.
        candidate: The model's answers; single outputs of the baseline are cut as these are.
        data: What the pictures are.
        retrained: Let pass that the weights are others, of the same architecture. Default False.

    Raises:
        SimpruneError: it is no baseline, or one of another model or of other pictures.
    """
    predictions, stored = _read_baseline(path, candidate.cut)
    if stored != data["sha256"]:
        raise InvalidArgumentError(
            f"the baseline {path} is of other images, labels or preprocessing than these: save a "
            f"new one with {argument('save_baseline')}"
        )
    if predictions.identity != candidate.identity:
        names = [name for name in candidate.identity
                 if predictions.identity.get(name) != candidate.identity[name]]  # fmt: skip
        raise InvalidArgumentError(
            f"the baseline {path} is of another model ({predictions.title:.200}): "
            f"{', '.join(names)} differ; save a new one with {argument('save_baseline')}"
        )
    if not retrained and not same_weights(predictions.weights, candidate.weights):
        raise InvalidArgumentError(
            f"the baseline {path} is of another model, with other weights "
            f"({predictions.title:.200}): compare all the same with {argument('retrained', True)}, "
            f"or save a new one"
        )
    if len(predictions.classes) != len(candidate.classes):
        raise InvalidArgumentError(
            f"the baseline {path} has {len(predictions.classes):,} answers, and "
            f"{len(candidate.classes):,} images could be read now: save a new one"
        )
    return predictions


def _read_baseline(path: Path, cut: float | None) -> tuple[Predictions, str]:
    try:
        if path.stat().st_size > MAX_BASELINE_BYTES:
            raise ArtifactError(f"{path} is larger than {MAX_BASELINE_BYTES >> 20} MB: no baseline")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] != KIND:
            raise ValueError(f"kind {values['kind']!r}")
        if values["format"] != FORMAT:
            raise ArtifactError(
                f"the baseline {path} has format {values['format']}, and this version reads "
                f"{FORMAT}: update simprune-deploy"
            )
        weights = {str(name): float(norm) for name, norm in values["weights"].items()}
        facts = (str(values["title"]), dict(values["model"]), weights, *_stored(values, cut))
        return Predictions(*facts), str(values["data"]["sha256"])
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} does not exist: write it with {argument('save_baseline')}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        text = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} holds no baseline of ours ({text}): save a new one") from error


def _stored(
    values: dict[str, Any], cut: float | None
) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Return what a baseline holds: classes int64[n], single outputs float32[n], and their cut."""
    if "values" not in values:
        classes = np.array(values["winners"])
        if classes.ndim != 1 or classes.dtype != np.int64:
            raise ValueError("winners are no list of whole numbers")
        return classes, None, None
    single = np.array(values["values"], np.float32)
    if single.ndim != 1 or not np.isfinite(single).all():
        raise ValueError("values are no list of numbers")
    return classes_of(single[:, None], cut), single, cut


def same_weights(left: dict[str, float], right: dict[str, float]) -> bool:
    """Tell whether two models have the same weights, by the norms of those they both name."""
    common = left.keys() & right.keys()
    if not common:
        return False
    return all(
        abs(left[name] - right[name]) <= SAME_NORM * max(abs(left[name]), abs(right[name]))
        for name in common
    )
