"""Whose class is whose: the labels of a data set, as the model counts its classes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from simprune_deploy.common.errors import DataError, argument, spelled

IMAGENET_CLASSES = 1000
MOST_SHOWN = 3
MOST_BYTES = 1 << 24
SIDES = 2
"""Of a single output: at or below the cut, class 0, and above it, class 1."""

HELP = f"map them with {argument('classes', 'FILE')}, or take none with {argument('labels', False)}"


def read_mapping(path: Path) -> dict[str, int | str]:
    """Read ``--classes FILE``: the data's names of the classes.

    Either a text file whose line i, from 0, is the data's name of the model's class i; or a JSON
    object from the data's names to the model's class numbers or names.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than {MOST_BYTES} bytes: it is no list of names")
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("{"):
            names = [line.strip() for line in text.splitlines()]
            while names and not names[-1]:
                names.pop()
            mapping: dict[str, int | str] = {name: i for i, name in enumerate(names) if name}
            if len(mapping) != len([name for name in names if name]):
                raise DataError(f"{path} names a class twice: a line for each of the model's")
        else:
            mapping = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    wrong = [key for key, value in mapping.items() if not isinstance(value, (int, str))]
    if wrong or not mapping:
        what = f"{wrong[0]!r} is given neither a number nor a name" if wrong else "it is empty"
        raise DataError(f"{path} maps no classes: {what}")
    return mapping


def map_labels(
    labels: np.ndarray,
    classes: Sequence[str] | None,
    num_classes: int,
    model_names: Sequence[str] | None = None,
    mapping: Mapping[str, int | str] | None = None,
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Return labels as the model's class numbers, the names of its classes, and how it was done.

    Args:
        labels: int64[n], indices into `classes`, or class numbers without `classes`.
        classes: The data's names. None: labels are the model's class numbers already.
        num_classes: Of the model. 1: it has a single output, cut into the classes 0 and 1.
        model_names: The names that the model gives its classes, if it does.
        mapping: From :func:`read_mapping`.

    Raises:
        SimpruneError: a label or a name fits no class of the model.
    """
    if num_classes == 1:
        model_names, num_classes = _side_names(labels, classes, model_names, mapping), SIDES
    names = list(model_names) if model_names and len(model_names) == num_classes else None
    shown = tuple(names) if names else tuple(str(number) for number in range(num_classes))
    if classes is None and mapping is None:
        _check_numbers(labels, num_classes)
        return labels, shown, "labels are the model's class numbers"
    if classes is None:
        classes = [str(number) for number in range(int(labels.max()) + 1)]
    _check_numbers(labels, len(classes), "the data's list of classes")
    used = [classes[index] for index in np.unique(labels)]
    numbers, how = _numbers(used, classes, num_classes, names, mapping)
    for name, number in numbers.items():
        if not 0 <= number < num_classes:
            raise DataError(
                f"class {name!r} is number {number}, and the model's classes are 0 to "
                f"{num_classes - 1}: {HELP}"
            )
    # by position: a list may hold a name twice
    table = np.array([numbers.get(name, -1) for name in classes], np.int64)
    if names is None:
        inverse = {number: name for name, number in numbers.items()}
        shown = tuple(inverse.get(number, str(number)) for number in range(num_classes))
    return table[labels], shown, how


def _side_names(
    labels: np.ndarray,
    classes: Sequence[str] | None,
    model_names: Sequence[str] | None,
    mapping: Mapping[str, int | str] | None,
) -> list[str] | None:
    """Return the names of a single output's classes, if its name is one of the data's.

    Raises:
        SimpruneError: the labels are not of two classes.
    """
    used = np.unique(labels)
    if mapping is not None:
        return None
    if len(used) > SIDES or any(map(_is_fraction, classes or ())):
        raise DataError(
            f"the labels have {len(used)} different values, and the model one output, cut into two "
            "classes: they are of another model, or numbers to be met (regression), which are not "
            f"compared: {HELP}"
        )
    if classes is None:
        return None
    if len(model_names or ()) == 1 and not all(name.isdigit() for name in classes):
        own = str((model_names or ())[0])
        others = [name for name in classes if _normal(name) != _normal(own)]
        if len(others) != 1 or len(classes) != SIDES:
            raise DataError(
                f"the model's output is {own!r}, and the data's classes are {_some(classes)}: "
                f"{HELP}"
            )
        return [others[0], own]
    if len(classes) != SIDES and not all(name in ("0", "1") for name in classes):
        raise DataError(
            f"the data has {len(classes)} classes ({_some(classes)}), and the model one output, "
            f"which is cut into two: {HELP}"
        )
    return None


def _is_fraction(name: str) -> bool:
    try:
        number = float(name)
    except ValueError:
        return False
    return math.isfinite(number) and not number.is_integer()


def _numbers(
    used: Sequence[str],
    classes: Sequence[str],
    num_classes: int,
    names: Sequence[str] | None,
    mapping: Mapping[str, int | str] | None,
) -> tuple[dict[str, int], str]:
    """Return the model's class number of every name in use."""
    own = {_normal(name): number for number, name in enumerate(names or ())}
    if mapping is not None:
        if missing := [name for name in used if name not in mapping]:
            raise DataError(f"{argument('classes')} names no class for {_some(missing)}: add them")
        numbers = {}
        for name in used:
            value = mapping[name]
            if isinstance(value, str) and _normal(value) not in own:
                raise DataError(
                    f"{argument('classes')} gives {name!r} the class {value!r}, and the model has "
                    f"{_some(names) if names else 'no names for its classes: give a number'}"
                )
            numbers[name] = own[_normal(value)] if isinstance(value, str) else int(value)
        return numbers, spelled(f"classes mapped by {argument('classes')}")
    if own and all(_normal(name) in own for name in used):
        return {name: own[_normal(name)] for name in used}, "classes matched by name"
    if num_classes == IMAGENET_CLASSES:
        synsets = {name: number for number, name in enumerate(_imagenet_names())}
        if all(name in synsets for name in used):
            return {name: synsets[name] for name in used}, "classes matched by ImageNet's names"
    if all(name.isascii() and name.isdigit() for name in used):
        return {name: int(name) for name in used}, "class names are the model's class numbers"
    if names:
        strangers = [name for name in used if _normal(name) not in own]
        raise DataError(
            f"{len(strangers)} classes of the data are none of the model's: {_some(strangers)}; "
            f"it has {_some(names)}: {HELP}"
        )
    if len(classes) != num_classes:
        raise DataError(
            f"the data has {len(classes)} classes ({_some(classes)}), and the model "
            f"{num_classes} without names: {HELP}"
        )
    order = {name: number for number, name in enumerate(classes) if name in set(used)}
    return order, "the model does not name its classes: the data's, in their order, are taken"


def _normal(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").replace("/", " ").split())


def _imagenet_names() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _check_numbers(labels: np.ndarray, count: int, what: str = "the model") -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise DataError(f"label {wrong} is outside 0 to {count - 1}, the classes of {what}: {HELP}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(repr(name) for name in names[:MOST_SHOWN]) + more


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """One class of the data: how many images, and how many of them were right.

    Attributes:
        name: Of the class.
        images: With this label.
        right: Top-1 hits of the setting.
        dense_right: Top-1 hits of the dense model.
    """

    name: str
    images: int
    right: int
    dense_right: int
