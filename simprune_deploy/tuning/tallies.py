"""What settings do to the model's answers, counted over a shard of the data.

Everything that is added up is a whole number, so that the sum over shards is exact whatever the
order in which they finish.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import ToolFailedError
from simprune_deploy.parity.tolerance import cosines
from simprune_deploy.predict.answers import classes_of
from simprune_deploy.predict.predictor import Predictor, PredictorSpec
from simprune_deploy.tuning.results import Setting

if TYPE_CHECKING:
    from simprune_deploy.evaluate.datasets import DataSet, Skipped

COSINE_STEPS = 1 << 40
"""Cosines, and single outputs, are added as whole multiples of 2^-40."""

DENSE_SETTING = Setting("dense")


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that a shard's settings need, as they travel to the process that runs it.

    Attributes:
        dense: The model without its pruning.
        pruned: By setting; settings that differ by their threshold alone may share one.
    """

    dense: PredictorSpec
    pruned: dict[Setting, PredictorSpec]

    def spec(self, setting: Setting) -> PredictorSpec:
        """Return what opens a setting's model."""
        return self.dense if setting == DENSE_SETTING else self.pruned[setting]

    def open(self, setting: Setting) -> Predictor:
        """Open a setting's model; it stays open until a shard needs others."""
        spec = self.spec(setting)
        if spec.key not in _OPEN:
            _OPEN[spec.key] = spec.open()
        return _OPEN[spec.key]

    def close_others(self) -> None:
        """Close what earlier shards opened and these models are not."""
        keys = {self.dense.key, *(spec.key for spec in self.pruned.values())}
        for key in _OPEN.keys() - keys:
            _OPEN.pop(key).close()


_OPEN: dict[str, Predictor] = {}
"""What is open in this process, by key: most shards need the models of the one before."""


def close_models() -> None:
    """Close all that is open in this process."""
    while _OPEN:
        _OPEN.popitem()[1].close()


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of one setting over some images; tallies of disjoint images can be added.

    Attributes:
        images: How many.
        right, right_in_5: Top-1 and top-5 hits.
        agree: Images with the dense model's class; of a single output, on its side of the cut.
        right_only_here, right_only_dense: Images that only this setting, or only the dense model,
            classifies rightly.
        cosines: Sum of the outputs' cosines to the dense model's, in steps of 2^-40; 0 of single
            outputs, which have none.
        worst_cosine: The smallest of them.
        above: Single outputs above the cut.
        values, squares: Sums of single outputs in steps of 2^-40, and of the squares of these.
        moved: Sum of the single outputs' distances to the dense model's, in the same steps.
        most_moved: The largest of them, in units of the output.
        kept: For each prune layer, how many images kept how many patches.
        classes: For each class with images: images, hits, the dense model's hits.
    """

    images: int = 0
    right: int = 0
    right_in_5: int = 0
    agree: int = 0
    right_only_here: int = 0
    right_only_dense: int = 0
    cosines: int = 0
    worst_cosine: float = 1.0
    above: int = 0
    values: int = 0
    squares: int = 0
    moved: int = 0
    most_moved: float = 0.0
    kept: tuple[Counter[int], ...] = ()
    classes: dict[int, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        summed = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        pairs = zip(self.kept, other.kept, strict=True)
        kept = (
            tuple(a + b for a, b in pairs) if self.kept and other.kept else self.kept or other.kept
        )
        classes = dict(self.classes)
        for label, counts in other.classes.items():
            old = classes.get(label, (0, 0, 0))
            classes[label] = tuple(map(operator.add, old, counts))
        worst = min(self.worst_cosine, other.worst_cosine)
        most = max(self.most_moved, other.most_moved)
        return Tally(**summed, worst_cosine=worst, most_moved=most, kept=kept, classes=classes)

    @property
    def deviation(self) -> float:
        """Standard deviation of the single outputs."""
        spread = self.images * self.squares - self.values**2  # exact: these are whole numbers
        return math.sqrt(spread) / self.images / COSINE_STEPS

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **values,
            "kept": [sorted(counts.items()) for counts in self.kept],
            "classes": [[label, *counts] for label, counts in sorted(self.classes.items())],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        """Build counts from :meth:`to_dict`'s result."""
        return cls(
            **{
                **values,
                "kept": tuple(Counter(dict(pairs)) for pairs in values["kept"]),
                "classes": {row[0]: (row[1], row[2], row[3]) for row in values["classes"]},
            }
        )


_ADDED = (
    "images",
    "right",
    "right_in_5",
    "agree",
    "right_only_here",
    "right_only_dense",
    "cosines",
    "above",
    "values",
    "squares",
    "moved",
)
"""The counts that are added up."""


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum."""
    return functools.reduce(operator.add, tallies, Tally())


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of work: some pictures, at the settings that share an executor.

    Attributes:
        number: Of the shard.
        start, stop: Its pictures, counted among those taken.
        settings: What is asked of them; may hold the dense model.
        dense: float32[n, C], the dense model's outputs of an earlier run; None to compute them.
        cut: Of a single output: above it is class 1. None of models with more.
    """

    number: int
    start: int
    stop: int
    settings: tuple[Setting, ...]
    dense: np.ndarray | None = None
    cut: float | None = None


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What a shard gave.

    Attributes:
        number: Of the shard.
        tallies: One for each of its settings.
        skipped: The pictures that could not be read.
        dense: float32[n, C], the dense model's outputs.
        process: The process that ran it.
    """

    number: int
    tallies: dict[Setting, Tally]
    skipped: list[Skipped]
    dense: np.ndarray
    process: int


def evaluate_shard(models: Models, data: DataSet, batch: int, shard: Shard) -> ShardResult:
    """Run the shard's pictures through the dense model and every setting, batch by batch.

    Raises:
        SimpruneError: an output is NaN or infinite.
    """
    models.close_others()
    tallies = dict.fromkeys(shard.settings, Tally())
    skipped: list[Skipped] = []
    dense_outputs: list[np.ndarray] = []
    done = 0
    for each in data.batches(shard.start, shard.stop, batch, skipped):
        count = len(each.pixels)
        if shard.dense is None:
            found = models.open(DENSE_SETTING).predict(each.pixels)
            dense = _finite(found.outputs, DENSE_SETTING)
        else:
            dense = shard.dense[done : done + count]
        done += count
        dense_outputs.append(dense)
        for setting in shard.settings:
            if setting == DENSE_SETTING:
                outputs, kept = dense, np.zeros((count, 0), np.int64)
            else:
                outputs, kept = _pruned(models, setting, each.pixels)
            _finite(outputs, setting)
            tallies[setting] += tally(outputs, dense, kept, each.labels, shard.cut)
    joined = np.concatenate(dense_outputs) if dense_outputs else np.zeros((0, 0), np.float32)
    return ShardResult(shard.number, tallies, skipped, joined, os.getpid())


def _pruned(models: Models, setting: Setting, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = models.open(setting).predict(pixels, threshold=setting.threshold, counts=True)
    assert found.kept is not None
    return found.outputs, found.kept


def _finite(outputs: np.ndarray, setting: Setting) -> np.ndarray:
    if not np.isfinite(outputs).all():
        raise ToolFailedError(
            f"the model's outputs hold NaN or infinity ({setting.name}): nothing can be said of it"
        )
    return outputs


def tally(
    outputs: np.ndarray,
    dense: np.ndarray,
    kept: np.ndarray,
    labels: np.ndarray | None,
    cut: float | None = None,
) -> Tally:
    """Count what a batch of outputs says beside the dense model's.

    Args:
        outputs, dense: float32[b, C].
        kept: int64[b, layers].
        labels: int64[b], or None.
        cut: Of a single output, C == 1: above it is class 1. Default None: 0.
    """
    single = outputs.shape[1] == 1
    agree = classes_of(outputs, cut) == classes_of(dense, cut)
    values: dict[str, Any] = {
        "images": len(outputs),
        "agree": int(agree.sum()),
        "kept": tuple(Counter(column.tolist()) for column in kept.T),
        **(_values(outputs, dense, cut) if single else _cosines(outputs, dense)),
    }
    if labels is not None:
        place, dense_place = (rank(each, labels, cut) for each in (outputs, dense))
        right, dense_right = place == 0, dense_place == 0
        values |= {
            "right": int(right.sum()),
            "right_in_5": int((place < 5).sum()),
            "right_only_here": int((right & ~dense_right).sum()),
            "right_only_dense": int((dense_right & ~right).sum()),
            "classes": {
                int(label): _counts(labels == label, right, dense_right)
                for label in np.unique(labels)
            },
        }
    return Tally(**values)


def _cosines(outputs: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    near = np.minimum(1.0, cosines(outputs, dense))
    return {
        "cosines": int(np.rint(near * COSINE_STEPS).astype(np.int64).sum()),
        "worst_cosine": float(near.min(initial=1.0)),
    }


def _values(outputs: np.ndarray, dense: np.ndarray, cut: float | None) -> dict[str, Any]:
    """Count single outputs, float32[b, 1]; Python's whole numbers have no largest."""
    apart = np.abs(outputs[:, 0].astype(np.float64) - dense[:, 0])
    steps, moved = (
        [round(x * COSINE_STEPS) for x in each.tolist()] for each in (outputs[:, 0], apart)
    )
    return {
        "above": int(classes_of(outputs, cut).sum()),
        "values": sum(steps),
        "squares": sum(step * step for step in steps),
        "moved": sum(moved),
        "most_moved": float(apart.max(initial=0.0)),
    }


def _counts(chosen: np.ndarray, *hits: np.ndarray) -> tuple[int, int, int]:
    right, dense_right = (int((chosen & each).sum()) for each in hits)
    return int(chosen.sum()), right, dense_right


def rank(outputs: np.ndarray, labels: np.ndarray, cut: float | None = None) -> np.ndarray:
    """Return int64[b]: how many classes come before the label; ties go to the lower number.

    Of a single output, C == 1, there are two, and the label's is the first or the other.
    """
    if outputs.shape[1] == 1:
        return (classes_of(outputs, cut) != labels).astype(np.int64)
    own = np.take_along_axis(outputs, labels[:, None], 1)
    before = np.arange(outputs.shape[1])[None] < labels[:, None]
    found: np.ndarray = ((outputs > own) | ((outputs == own) & before)).sum(1)
    return found


def shards_of(count: int, size: int) -> list[tuple[int, int, int]]:
    """Return (number, start, stop) of the shards of `count` pictures."""
    return [
        (number, start, min(start + size, count))
        for number, start in enumerate(range(0, count, size))
    ]


def by_graph(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Group the settings that differ by nothing but the threshold: one graph serves them."""
    groups: dict[Any, list[Setting]] = {}
    for each in settings:
        if each != DENSE_SETTING:
            groups.setdefault(dataclasses.replace(each, threshold=None), []).append(each)
    return list(groups.values())
