"""Whose class is whose: the labels of a data set, as the model counts its classes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import DataError, InvalidArgumentError, argument, spelled
from simprune_deploy.evaluate.class_order import (
    CLASS_ORDERS,
    IN_THEIR_ORDER,
    check_numbers_are_plain,
    choose_order,
    in_order,
    order_note,
)
from simprune_deploy.evaluate.data_sources import encoding_of, whole_number

if TYPE_CHECKING:
    from simprune_deploy.evaluate.data_sources import Source
    from simprune_deploy.onnx.metadata import ModelMetadata

IMAGENET_CLASSES = 1000
MOST_SHOWN = 3
MOST_BYTES = 1 << 24
SIDES = 2
"""Of a single output: at or below the cut, class 0, and above it, class 1."""

HELP = f"map them with {argument('classes', 'FILE')}, or take none with {argument('labels', False)}"
MAP = f"say which is which, by number, with {argument('classes', 'FILE')}"
BY_NUMBER = "class names are the model's class numbers"


def read_mapping(path: Path) -> dict[str, int | str]:
    """Read ``--classes FILE``: the data's names of the classes.

    Either a list of names, whose place i from 0 is the data's name of the model's class i: a line
    each, or a JSON list. Or a JSON object from the data's names to the model's class numbers or
    names; or a Hugging Face configuration, of which the entry "id2label" is taken. UTF-8, or
    UTF-16 with a mark.

    Raises:
        DataError: it cannot be read, or is neither.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than {MOST_BYTES} bytes: it is no list of names")
        text = path.read_text(encoding=encoding_of(path))
        if text.lstrip().startswith("{"):
            return _checked_mapping(path, _unique(path, text))
        return _mapping_of_list(path, _listed_names(text))
    except UnicodeError as error:
        raise DataError(f"{path} is not a text file: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _unique(path: Path, text: str) -> dict[str, Any]:
    """Read a JSON object; of a name that stands in it twice, json would keep the last."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if len(values) < len(found):
            raise DataError(f"{path} names {_first_twice(name for name, _ in found)!r} twice")
        return values

    values: dict[str, Any] = json.loads(text, object_pairs_hook=pairs)
    inner = values.get("id2label")
    return inner if isinstance(inner, dict) else values


def _listed_names(text: str) -> list[str]:
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError:
            values = None  # a name that begins with a bracket
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
    return [line.strip() for line in text.splitlines()]


def _mapping_of_list(path: Path, names: list[str]) -> dict[str, int | str]:
    if (twice := _first_twice(name for name in names if name)) is not None:
        raise DataError(
            f"{path} names a class twice, {twice!r}: one name for each of the model's classes"
        )
    return _checked_mapping(path, {name: i for i, name in enumerate(names) if name})


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _checked_mapping(path: Path, values: dict[str, Any]) -> dict[str, int | str]:
    mapping: dict[str, int | str] = {}
    for key, value in values.items():
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise DataError(f"{path} maps no classes: {key!r} is given neither a number nor a name")
        mapping[key] = value
    if not mapping:
        raise DataError(f"{path} maps no classes: it is empty")
    return mapping


@dataclasses.dataclass(frozen=True)
class ModelClasses:
    """What a model says of its classes.

    Attributes:
        count: How many.
        names: Of each; None if it does not say.
        order: By what its training numbered them: "timm", "torchvision", or another thing in
            words; None if it does not say.
    """

    count: int
    names: tuple[str, ...] | None = None
    order: str | None = None

    @classmethod
    def of(cls, metadata: ModelMetadata) -> ModelClasses:
        """Return what an export or a checkpoint says."""
        names = tuple(map(str, metadata.preprocessing.get("label_names") or ()))
        order = metadata.preprocessing.get("class_order")
        fits = len(names) == metadata.num_classes
        return cls(metadata.num_classes, names if fits else None, str(order) if order else None)


@dataclasses.dataclass(frozen=True)
class MappedLabels:
    """The labels of a data set, as a model counts its classes.

    Attributes:
        labels: int64[n], the model's class numbers.
        classes: A name for each of the model's classes; its number where there is none.
        how: How it was decided, in words.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    how: str


def map_labels(
    source: Source,
    model: ModelClasses,
    mapping: Mapping[str, int | str] | None = None,
    asked: str | None = None,
) -> MappedLabels:
    """Count a data set's classes as the model does.

    The first of these that says something decides: `mapping`, names that the model has too,
    numbers in place of names, `asked`, the model's own order, torchvision's.

    Args:
        source: With labels.
        model: What the model says of its classes.
        mapping: From :func:`read_mapping`. Default None.
        asked: The order that the user says, "timm" or "torchvision". Default None.

    Raises:
        DataError: a label or a name fits no class of the model, or more than one.
        InvalidArgumentError: an order is asked for where the classes are known without it.
    """
    labels, classes = source.labels, source.classes
    assert labels is not None
    if model.count == 1:
        model = _two_sides(labels, classes, model, mapping)
    shown = model.names or tuple(str(number) for number in range(model.count))
    if classes is None and mapping is None:
        _refuse_order(asked, "the labels are class numbers")
        _check_numbers(source, labels, model.count, "the model")
        return MappedLabels(labels, shown, "labels are the model's class numbers")
    if classes is None:
        values, labels = np.unique(labels, return_inverse=True)
        classes = tuple(str(number) for number in values)
    else:
        _check_numbers(source, labels, len(classes), "the data's list of classes")
    found, first = np.unique(labels, return_index=True)
    where = {classes[index]: int(place) for index, place in zip(found, first, strict=True)}
    used = list(where)
    if mapping is not None:
        numbers = _by_mapping(used, model, mapping)
        how = spelled(f"classes mapped by {argument('classes')}")
    elif source.naming == "list" and model.names == classes:
        # also where a name stands in both twice
        _refuse_order(asked, "the model names its classes, and the data's are the same")
        return MappedLabels(labels, shown, "classes matched by name")
    else:
        numbers, how = _known(source, model, used, where, asked) or _by_order(
            source, model, used, asked
        )
    wrong = [name for name, number in numbers.items() if not 0 <= number < model.count]
    if wrong:
        name = min(wrong, key=lambda each: where.get(each, len(labels)))
        raise _outside(name, numbers[name], source.place(where[name]), model.count, "the model")
    # by position: a list may hold a name twice
    table = np.array([numbers.get(name, -1) for name in classes], np.int64)
    if model.names is None and how != BY_NUMBER:
        inverse = {number: name for name, number in numbers.items()}
        shown = tuple(inverse.get(number, str(number)) for number in range(model.count))
    return MappedLabels(table[labels], shown, how)


def _two_sides(
    labels: np.ndarray,
    classes: Sequence[str] | None,
    model: ModelClasses,
    mapping: Mapping[str, int | str] | None,
) -> ModelClasses:
    """Return the two classes of a single output; its name is the class above the cut.

    Raises:
        DataError: the labels are not of two classes.
    """
    two = ModelClasses(SIDES, None, model.order)
    if mapping is not None:
        return two
    used = np.unique(labels)
    if len(used) > SIDES or any(map(_is_fraction, classes or ())):
        raise DataError(
            f"the labels have {len(used)} different values, and the model one output, cut into two "
            "classes: they are of another model, or numbers to be met (regression), which are not "
            f"compared: {HELP}"
        )
    if classes is None:
        return two
    if model.names and not all(name.isdigit() for name in classes):
        (own,) = model.names
        others = [name for name in classes if _normal(name) != _normal(own)]
        if len(others) != 1 or len(classes) != SIDES:
            raise DataError(
                f"the model's output is {own!r}, and the data's classes are {_some(classes)}: "
                f"{HELP}"
            )
        return ModelClasses(SIDES, (others[0], own), model.order)
    if len(classes) != SIDES and not all(name in ("0", "1") for name in classes):
        raise DataError(
            f"the data has {len(classes)} classes ({_some(classes)}), and the model one output, "
            f"which is cut into two: {HELP}"
        )
    return two


def _is_fraction(name: str) -> bool:
    try:
        number = float(name)
    except ValueError:
        return False
    return math.isfinite(number) and not number.is_integer()


def _refuse_order(asked: str | None, known: str) -> None:
    if asked is not None:
        raise InvalidArgumentError(
            f"{argument('class_order', asked)} orders classes, and {known}: drop it",
            what="class_order",
            value=asked,
        )


Numbers = dict[str, int]


def _by_mapping(
    used: Sequence[str], model: ModelClasses, mapping: Mapping[str, int | str]
) -> Numbers:
    """Return the model's class number of every name in use, as the user's file says."""
    mapping = _right_way_round(used, mapping)
    if missing := [name for name in used if _key(name, mapping) is None]:
        raise DataError(f"{argument('classes')} names no class for {_some(missing)}: add them")
    for name, value in mapping.items():
        if isinstance(value, int) and value >= model.count:
            raise DataError(
                f"{argument('classes')} gives class {name!r}, which is number {value}, and the "
                f"model's classes are 0 to {model.count - 1}: it is not of this model"
            )
    numbers = {}
    for name in used:
        value = mapping[_key(name, mapping) or name]
        numbers[name] = value if isinstance(value, int) else _named_class(name, value, model)
    return numbers


def _right_way_round(
    used: Sequence[str], mapping: Mapping[str, int | str]
) -> Mapping[str, int | str]:
    """Turn {"0": "cat"}, as in a Hugging Face configuration, to {"cat": 0}."""
    turned = {
        name: number
        for key, name in mapping.items()
        if isinstance(name, str) and (number := whole_number(key)) is not None
    }
    if len(turned) < len(mapping) or all(_key(name, mapping) is not None for name in used):
        return mapping
    return turned if all(name in turned for name in used) else mapping


def _key(name: str, mapping: Mapping[str, int | str]) -> str | None:
    """Return the entry of a name; of a label "3.0" also "3"."""
    number = whole_number(name)
    return next((key for key in (name, str(number)) if key in mapping), None)


def _named_class(name: str, value: str, model: ModelClasses) -> int:
    number = whole_number(value)
    if model.names is None and number is not None:
        return number
    found = None if model.names is None else _by_name([value], model.names)
    if found is None:
        has = _some(model.names) if model.names else "no names for its classes: give a number"
        raise DataError(
            f"{argument('classes')} gives {name!r} the class {value!r}, and the model has {has}"
        )
    return found[value]


def _by_name(used: Sequence[str], names: Sequence[str]) -> Numbers | None:
    """Return the model's class of each name; None if it has not all of them.

    A name as it stands comes before one that is alike but for case, '_', '-' and '/'.

    Raises:
        DataError: a name stands for more than one class, or a class for more than one name.
    """
    exact, alike = _places(names), _places([_normal(name) for name in names])
    found = {name: exact.get(name) or alike.get(_normal(name), []) for name in used}
    if not all(found.values()):
        return None
    for name, places in found.items():
        if len(places) > 1:
            raise DataError(
                f"the class {name!r} could be the model's classes "
                f"{' and '.join(f'{place} ({names[place]!r})' for place in places)}: {MAP}"
            )
    taken: dict[int, str] = {}
    for name, (place, *_) in found.items():
        if place in taken:
            raise DataError(
                f"classes {taken[place]!r} and {name!r} of the data could both be the model's "
                f"class {place} ({names[place]!r}): {MAP}"
            )
        taken[place] = name
    return {name: place for place, name in taken.items()}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return places


def _known(
    source: Source,
    model: ModelClasses,
    used: Sequence[str],
    where: Mapping[str, int],
    asked: str | None,
) -> tuple[Numbers, str] | None:
    """Return the class numbers that names, or numbers in their place, say; None if none do."""
    written = {name: whole_number(name) for name in used}
    numbers = {name: number for name, number in written.items() if number is not None}
    counted = len(numbers) == len(used) and (
        source.naming == "column" or all(name.isdigit() for name in used)
    )
    names = model.names or ()
    said = {name: name for name in used}
    if source.naming == "column" and counted:  # "3.0" may be the name "3"
        said = {name: name if name in names else str(numbers[name]) for name in used}
    if model.names is not None and (own := _by_name(list(said.values()), names)) is not None:
        _refuse_order(asked, "the model names its classes, which the data's match")
        matched = {name: own[said[name]] for name in used}
        if source.naming == "column" and counted:
            _check_same(matched, numbers, model.count)
        return matched, "classes matched by name"
    if model.count == IMAGENET_CLASSES:
        synsets = {name: number for number, name in enumerate(_imagenet_names())}
        if all(name in synsets for name in used):
            _refuse_order(asked, "they are matched by ImageNet's names")
            return {name: synsets[name] for name in used}, "classes matched by ImageNet's names"
    if counted and (source.naming == "column" or model.names is not None):
        _refuse_order(asked, "the labels are class numbers")
        return numbers, BY_NUMBER
    if model.names is not None:
        known = {_normal(name) for name in model.names}
        strangers = [name for name in used if _normal(name) not in known]
        raise DataError(
            f"{len(strangers)} classes of the data are none of the model's: {_some(strangers)}; "
            f"it has {_some(model.names)}: {HELP}"
        )
    if source.naming == "column" and all(re.fullmatch(r"-?\d+(\.\d*)?", name) for name in used):
        odd = next(name for name, number in written.items() if number is None)
        raise DataError(
            f"the label {odd!r} ({source.place(where[odd])}) is no class number: give whole "
            f"numbers or names, or {HELP}"
        )
    return None


def _check_same(matched: Numbers, numbers: Numbers, count: int) -> None:
    """Refuse numbers that are the model's names of other classes."""
    wrong = next((name for name, number in numbers.items() if matched[name] != number), None)
    if wrong is not None and all(0 <= number < count for number in numbers.values()):
        raise DataError(
            f"the label {wrong!r} is the name of the model's class {matched[wrong]}, and the "
            f"number of another: {MAP}"
        )


def _by_order(
    source: Source, model: ModelClasses, used: Sequence[str], asked: str | None
) -> tuple[Numbers, str]:
    """Return the places of the classes in the order in which the model was trained."""
    classes, listed = source.classes, source.naming == "list"
    assert classes is not None
    if listed:
        _refuse_order(asked, "the data lists its own in their order")
    if all(name.isascii() and name.isdigit() for name in used):
        numbers = {name: int(name) for name in used}
        if listed and len(classes) != model.count:
            return numbers, BY_NUMBER
        if not listed and _folders_are_numbers(numbers, model, asked):
            return numbers, BY_NUMBER
    if source.naming == "nested folders" and (asked or model.order) == "timm":
        deep = next(i for i in range(len(source)) if source.name(i).count("/") > 1)
        raise DataError(
            f"timm takes the innermost folder as the class, and {source.name(deep)} lies deeper "
            f"than a folder of the data: give one folder for each class, or {HELP}"
        )
    if len(classes) != model.count:
        raise DataError(
            f"the data has {len(classes)} classes ({_some(classes)}), and the model "
            f"{model.count} without names: {HELP}"
        )
    if listed:
        return {name: i for i, name in enumerate(classes) if name in set(used)}, IN_THEIR_ORDER
    order, why = choose_order(asked, model.order)
    taken = in_order(classes, order)
    numbers = {name: number for number, name in enumerate(taken)}
    return numbers, order_note(taken, order, why)


def _folders_are_numbers(numbers: Numbers, model: ModelClasses, asked: str | None) -> bool:
    """Tell whether folders that are named by numbers are named by the model's class numbers."""
    if max(numbers.values()) >= model.count:
        return False
    written: dict[int, str] = {}
    for name, number in numbers.items():
        if number in written:
            raise DataError(
                f"classes {written[number]!r} and {name!r} of the data are both number {number}: "
                f"{MAP}"
            )
        written[number] = name
    order = asked or model.order
    if order not in CLASS_ORDERS:
        check_numbers_are_plain(list(numbers), model.count)
    return order != "torchvision"


def _normal(name: str) -> str:
    # a Mac writes an umlaut as two characters
    name = unicodedata.normalize("NFC", name).lower()
    return " ".join(name.replace("_", " ").replace("-", " ").replace("/", " ").split())


def _imagenet_names() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _check_numbers(source: Source, labels: np.ndarray, count: int, what: str) -> None:
    wrong = (labels < 0) | (labels >= count)
    if wrong.any():
        position = int(np.argmax(wrong))
        label = int(labels[position])
        raise _outside(str(label), label, source.place(position), count, what)


def _outside(name: str, number: int, place: str, count: int, what: str) -> DataError:
    """Return the error of a number that no class has."""
    label = (
        f"label {number}" if whole_number(name) == number else f"class {name!r}, number {number},"
    )
    remedy = HELP
    if number == -1:
        remedy = (
            "-1 is what torchvision and Hugging Face write where there is no label: leave that "
            f"picture out, or take no labels with {argument('labels', False)}"
        )
    return DataError(
        f"{label} ({place}) is outside 0 to {count - 1}, the classes of {what}: {remedy}"
    )


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
