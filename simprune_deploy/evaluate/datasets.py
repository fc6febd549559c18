"""A data set for a model: pictures through timm's transforms, in batches, labels as it counts them.

Memory does not grow with the number of pictures: a batch is loaded when it is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.checkpoints.options import assumptions
from simprune_deploy.common.errors import DataError, InvalidArgumentError, argument, spelled
from simprune_deploy.common.images import (
    PILLOW_FORMATS,
    PictureLoader,
    Preprocessing,
    UnusableImageError,
    printable,
)
from simprune_deploy.common.requests import check_whole
from simprune_deploy.evaluate.class_order import ClassOrder, check_class_order
from simprune_deploy.evaluate.classes import ModelClasses, map_labels, read_mapping
from simprune_deploy.evaluate.data_sources import (
    Archive,
    HubDataset,
    Source,
    csv_source,
    folder_source,
)
from simprune_deploy.onnx.metadata import preprocessing_of

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata

MAX_UNREADABLE = 0.01
MOST_LISTED = 3


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What a user says of the data.

    Args:
        limit: Take this many pictures, spread evenly. Default (None): all.
        labels: Use labels where there are any. Default True.
        classes: File that maps the data's classes to the model's; see
            :func:`simprune_deploy.evaluate.classes.read_mapping`. Default None.
        max_unreadable: The share of unreadable pictures beyond which a run stops. Default 0.01.
        class_order: Whose order the data's class names are numbered in where the model does not
            name its classes: "timm" or "torchvision". Default None: what the model's training
            checkpoint says, otherwise torchvision's.
    """

    limit: int | None = None
    labels: bool = True
    classes: Path | None = None
    max_unreadable: float = MAX_UNREADABLE
    class_order: ClassOrder | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        if not isinstance(self.max_unreadable, numbers.Real) or not 0 <= self.max_unreadable <= 1:
            raise InvalidArgumentError(
                f"{argument('max_unreadable')} {self.max_unreadable!r} must be a share: "
                f"{argument('max_unreadable', 0.01, '1%')}"
            )
        check_class_order(self.class_order)
        for name, does in self.of_labels:
            if not self.labels:
                raise InvalidArgumentError(
                    f"{argument(name)} {does}, and {argument('labels', False)} uses none: drop one"
                )
        if len(self.of_labels) > 1:
            raise InvalidArgumentError(
                f"{argument('classes')} says the number of every class, and "
                f"{argument('class_order')} orders them: drop one"
            )

    @property
    def of_labels(self) -> tuple[tuple[str, str], ...]:
        """What was said that is of labels: the argument, and what it does."""
        said = []
        if self.classes is not None:
            said.append(("classes", "maps labels"))
        if self.class_order is not None:
            said.append(("class_order", "numbers labels"))
        return tuple(said)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Pictures ready for a model.

    Attributes:
        pixels: float32[b, C, H, W] in [0, 1], not normalized.
        labels: int64[b], the model's class numbers; None without labels.
    """

    pixels: np.ndarray
    labels: np.ndarray | None


Skipped = tuple[str, str]
"""Name of a picture that could not be read, and the reason."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """The pictures that a run is about; :func:`open_data` makes it.

    Attributes:
        path: What the user gave.
        source: Reads them.
        preprocessing: How pictures become inputs.
        positions: int64[n], those taken, ascending.
        labels: int64[n], the model's class numbers; None without labels.
        classes: Names of the model's classes; empty without labels.
        notes: What was decided, in words.
        max_unreadable: The share of unreadable pictures that is let pass.
    """

    path: Path
    source: Source
    preprocessing: Preprocessing
    positions: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    max_unreadable: float

    def __len__(self) -> int:
        return len(self.positions)

    @functools.cached_property
    def identity(self) -> str:
        """A SHA-256 that changes with the pictures, their labels, and how they are prepared."""
        import hashlib
        import json

        parts = [
            self.source.digest(self.positions.tolist()),
            [] if self.labels is None else self.labels.tolist(),
            self.preprocessing.to_dict(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def batches(
        self, start: int, stop: int, size: int, skipped: list[Skipped] | None = None
    ) -> Iterator[Batch]:
        """Yield the pictures from `start` to `stop` in batches of `size` or fewer.

        Args:
            start, stop: Of the pictures taken, counted from 0.
            size: Of a batch.
            skipped: Receives the pictures that could not be read; they are in no batch.
        """
        # an archive that moved to another machine, or was removed, is not "all unreadable"
        if not self.path.exists():
            raise DataError(f"{self.path} cannot be seen on this machine: share it")
        loader = PictureLoader(self.preprocessing)
        for first in range(start, min(stop, len(self)), size):
            pixels, kept = [], []
            for index in range(first, min(first + size, stop, len(self))):
                position = int(self.positions[index])
                try:
                    pixels.append(self.source.read(position, loader))
                    kept.append(index)
                except UnusableImageError as error:
                    if skipped is not None:
                        skipped.append((self.source.name(position), str(error)))
            if kept:
                labels = None if self.labels is None else self.labels[kept]
                yield Batch(np.stack(pixels), labels)

    def check_skipped(self, skipped: list[Skipped]) -> None:
        """Stop a run that could not read more of its pictures than it may."""
        count = len(skipped)
        if count and (count > self.max_unreadable * len(self) or count == len(self)):
            listed = "; ".join(f"{name}: {reason}" for name, reason in skipped[:MOST_LISTED])
            if count == len(self):
                raise DataError(
                    f"none of the {count:,} pictures of {self.path} can be used ({listed}"
                    f"{'; ...' if count > MOST_LISTED else ''}): give others, in "
                    f"{', '.join(PILLOW_FORMATS)}"
                )
            raise DataError(
                f"{count:,} of {len(self):,} pictures cannot be read ({listed}"
                f"{'; ...' if count > MOST_LISTED else ''}), more than the "
                f"{self.max_unreadable:.2%} allowed: repair them, or raise "
                f"{argument('max_unreadable')}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says of the data."""
        return {
            "source": printable(self.path),
            "kind": self.source.kind,
            "images": len(self),
            "of": len(self.source),
            "labels": self.labels is not None,
            "classes": 0 if self.labels is None else len(np.unique(self.labels)),
            "sha256": self.identity,
            "preprocessing": self.preprocessing.to_dict(),
            "notes": list(self.notes),
        }


def open_data(path: Path, metadata: ModelMetadata, options: DataOptions | None = None) -> DataSet:
    """Open a data set for a model.

    Args:
        path: A folder with a folder a class, a folder of pictures, a CSV file, an ``.npz`` file,
            or a folder that Hugging Face's ``save_to_disk`` wrote.
        metadata: Of the model: input size, preprocessing, number and names of classes.
        options: What to take of it.

    Raises:
        SimpruneError: there is nothing in it, or its labels are not the model's classes.
    """
    options = options or DataOptions()
    source = open_data_source(path, options.labels)
    if isinstance(source, Archive):
        source.check_channels(metadata.channels)
    count = len(source)
    wanted = min(options.limit or count, count)
    positions = np.arange(wanted, dtype=np.int64) * count // wanted
    notes = []
    if wanted < count:
        notes.append(
            spelled(f"{wanted:,} of {count:,} pictures, spread evenly ({argument('limit')})")
        )
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    if source.labels is None:
        notes.append("no labels: agreement with the dense model in place of accuracy")
        _refuse_of_labels(options, f"{path} has none")
    elif not options.labels:
        notes.append(
            spelled(
                f"labels left aside ({argument('labels', False)}): agreement in place of accuracy"
            )
        )
    elif not metadata.num_classes:
        notes.append("the model gives features: labels are not used")
        _refuse_of_labels(options, "the model gives features, which use none")
    else:
        mapping = read_mapping(options.classes) if options.classes else None
        found = map_labels(source, ModelClasses.of(metadata), mapping, options.class_order)
        labels, classes = found.labels[positions], found.classes
        sides = ""
        if metadata.num_classes == 1:
            sides = f": {classes[0]} at or below the cut of the output, {classes[1]} above it"
        notes.append(found.how + sides)
    notes += assumptions(metadata.preprocessing)
    return DataSet(
        path=path,
        source=source,
        preprocessing=preprocessing_of(metadata),
        positions=positions,
        labels=labels,
        classes=classes,
        notes=tuple(notes),
        max_unreadable=options.max_unreadable,
    )


def _refuse_of_labels(options: DataOptions, why: str) -> None:
    for name, does in options.of_labels:
        raise InvalidArgumentError(f"{argument(name)} {does}, and {why}: drop it")


def open_data_source(path: Path, labelled: bool) -> Source:
    """Return where the pictures of a folder or file are; its labels too if they are wanted.

    Raises:
        SimpruneError: it is no data set, or there is nothing in it.
    """
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return HubDataset(path)
        return folder_source(path, labelled)
    if not path.exists():
        raise DataError(f"{path} does not exist: give pictures with {argument('data')}")
    if path.suffix.lower() == ".npz":
        return Archive(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return csv_source(path)
    raise DataError(
        f"{path} is no data set: give a folder, a .csv or an .npz file, or a Hugging Face data "
        "set that save_to_disk wrote"
    )
