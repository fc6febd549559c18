"""Where pictures and labels come from: folders, CSV files, ``.npz``, Hugging Face data sets.

A source lists its pictures and reads one when it is asked for: nothing here holds more than one.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import math
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from simprune_deploy.common.errors import DataError, RequirementError, argument
from simprune_deploy.common.files import sha256
from simprune_deploy.common.images import (
    UnusableImageError,
    find_pictures,
    fits_channels,
    printable,
)

if TYPE_CHECKING:
    from simprune_deploy.common.images import PictureLoader

HEAD_BYTES = 1 << 14
"""What of every file goes into a data set's identity, beside its name, size and label."""

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "target")
MOST_NAMES_BYTES = 1 << 24
SKIPPED_BYTES = 1 << 20
SEPARATORS = (",", ";", "\t")
"""Of a CSV file's columns; spreadsheets write the second where the comma is the decimal sign."""

Naming = Literal["folders", "nested folders", "column", "list"]
"""Where the names of classes stand. A list has an order of its own; folders, and the column of a
file, are sorted by whoever reads them. Pictures of nested folders lie deeper than a class's own."""


class Source(Protocol):
    """Pictures by their position from 0 on.

    Attributes:
        kind: What it is, in words.
        labels: int64[n], an index into `classes`; None without labels.
        classes: The names behind the labels; None if labels are the model's own class numbers.
        naming: Where those names stand.
    """

    kind: str
    labels: np.ndarray | None
    classes: tuple[str, ...] | None
    naming: Naming

    def __len__(self) -> int: ...

    def name(self, position: int) -> str:
        """Return what a report calls the picture."""

    def place(self, position: int) -> str:
        """Return where a user finds the picture's label: a line, a row, a file."""

    def read(self, position: int, loader: PictureLoader) -> np.ndarray:
        """Return float32[C, H, W] in [0, 1]; :class:`UnusableImageError` if it cannot be read."""

    def digest(self, positions: Sequence[int]) -> str:
        """Return a SHA-256 that changes when these pictures or their labels change."""


class Files:
    """Pictures in files, each with a label or none of them."""

    def __init__(
        self,
        kind: str,
        root: Path,
        paths: Sequence[Path],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        naming: Naming = "folders",
        lines: tuple[Path, Sequence[int]] | None = None,
    ) -> None:
        self.kind, self.root, self.paths = kind, root, paths
        self.labels, self.classes, self.naming = labels, classes, naming
        self.lines = lines

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, position: int) -> str:
        return printable(self.paths[position], self.root)

    def place(self, position: int) -> str:
        if self.lines is None:
            return self.name(position)
        file, numbers = self.lines
        return f"line {numbers[position]} of {file}"

    def read(self, position: int, loader: PictureLoader) -> np.ndarray:
        return loader(self.paths[position])

    def digest(self, positions: Sequence[int]) -> str:
        total = hashlib.sha256()
        for position in positions:
            path = self.paths[position]
            label = -1 if self.labels is None else int(self.labels[position])
            try:
                size, head = path.stat().st_size, _head(path)
            except OSError:
                size, head = -1, b""  # it will be counted as unreadable
            total.update(f"{self.name(position)}\0{label}\0{size}\0".encode())
            total.update(hashlib.sha256(head).digest())
        total.update(repr(self.classes).encode())
        return total.hexdigest()


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def folder_source(root: Path, labelled: bool = True) -> Files:
    """Open a folder with a folder for each class, or one of pictures without labels.

    Args:
        root: The folder. Hidden files and folders are left out.
        labelled: Take the folders in it as classes. Default True; False takes every picture below
            it, without labels, as does a folder that has pictures and no folders.

    Raises:
        SimpruneError: there are no pictures, a class has none, or some lie beside the classes.
    """
    paths, refused = find_pictures(root)
    if refused:
        raise DataError(f"{root}/{refused[0][0]} cannot be listed: {refused[0][1]}")
    if not paths:
        raise DataError(f"{root} holds no pictures: give a folder that does")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not labelled or not folders:
        return Files("unlabelled folder", root, paths)
    classes: list[str] = [path.relative_to(root).parts[0] for path in paths]
    if loose := next((path for path in paths if path.parent == root), None):
        raise DataError(
            f"{printable(loose, root)} lies beside the class folders of {root}: move it into one, "
            f"or take all pictures as unlabelled with {argument('labels', False)}"
        )
    if empty := sorted(set(folders) - set(classes)):
        raise DataError(
            f"the class folder {empty[0]!r} of {root} holds no pictures"
            f"{_more(empty)}: remove it or fill it"
        )
    number = {name: index for index, name in enumerate(folders)}
    labels = np.array([number[name] for name in classes], np.int64)
    deep = any(len(path.relative_to(root).parts) > 2 for path in paths)
    naming: Naming = "nested folders" if deep else "folders"
    return Files("folder with a folder a class", root, paths, labels, tuple(folders), naming)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def csv_source(path: Path) -> Files:
    """Open a CSV file of paths (from its folder, or absolute) and labels.

    The first line names the columns: one of :data:`PATH_COLUMNS`, and for labels one of
    :data:`LABEL_COLUMNS`. Columns are separated by commas, semicolons or tabs. Labels are class
    names, or if all are whole numbers the model's class numbers.
    """
    try:
        with path.open(encoding=encoding_of(path), newline="") as file:
            rows, lines, labelled = _csv_rows(path, file)
    except (UnicodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path} names no pictures: one line each, below the columns' names")
    for number, (name, label) in zip(lines, rows, strict=True):
        if not name or "\0" in name:
            raise DataError(f"line {number} of {path} names no picture")
        if labelled and not label:
            raise DataError(f"line {number} of {path} has no label: give all of them or none")
    root = path.absolute().parent
    paths = [_listed(root, name) for name, _ in rows]
    if not labelled:
        return Files("CSV file without labels", root, paths, lines=(path, lines))
    texts = [label for _, label in rows]
    return Files("CSV file", root, paths, *numbered(texts), "column", (path, lines))


def _csv_rows(path: Path, file: IO[str]) -> tuple[list[tuple[str, str]], list[int], bool]:
    """Return the paths with their labels, the lines they stand in, and whether there are labels."""
    head = file.readline()
    file.seek(0)
    separator = next(
        (
            each
            for each in SEPARATORS
            if _column(next(csv.reader([head], delimiter=each), ()), PATH_COLUMNS)
        ),
        SEPARATORS[0],
    )
    reader = csv.reader(file, delimiter=separator)
    columns = [name.strip() for name in next(reader, ())]
    where, what = _column(columns, PATH_COLUMNS), _column(columns, LABEL_COLUMNS)
    if where is None:
        raise DataError(
            f"{path} has no column of paths: its first line must name one "
            f"{' or '.join(PATH_COLUMNS[:2])}, and it reads {','.join(columns)[:80]!r}"
        )
    rows, lines = [], []
    for row in reader:
        if not row:
            continue
        if len(row) > len(columns):
            raise DataError(
                f"line {reader.line_num} of {path} has {len(row)} columns, and the first line "
                f"names {len(columns)}: put a text with {separator!r} in it between double quotes"
            )
        cells = dict(zip(columns, row, strict=False))
        rows.append((cells.get(where, "").strip(), cells.get(what or "", "").strip()))
        lines.append(reader.line_num)
    return rows, lines, what is not None


def _column(columns: Iterable[str], known: Sequence[str]) -> str | None:
    return next((name for name in columns if name.strip().lower() in known), None)


def _listed(root: Path, name: str) -> Path:
    """Return the file that a list names; a list from Windows has backslashes between folders."""
    path = root / name
    if "\\" in name and not path.exists():
        return root / name.replace("\\", "/")
    return path


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file: UTF-16 where it is marked so, otherwise UTF-8.

    Notepad marks UTF-8 too, and PowerShell writes UTF-16.
    """
    with path.open("rb") as file:
        head = file.read(2)
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def whole_number(text: str) -> int | None:
    """Return the whole number that a label is, also as pandas writes it ("3.0"); or None.

    "1e0" is none: names such as it are made by hashing.
    """
    found = re.fullmatch(r"(-?[0-9]{1,9})(\.0*)?", text)
    return None if found is None else int(found[1])


def numbered(texts: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return int64[n], the place of each text among the different ones as text, and those."""
    classes = tuple(sorted(set(texts)))
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[text] for text in texts], np.int64), classes


class Archive:
    """Pictures in an ``.npz`` file: ``images`` uint8[n, H, W] or [n, H, W, C] (or channels first),
    and if there are any ``labels`` int[n] and ``classes`` str[...].

    C is the model's: those are fed as they are. Grey ones become RGB, and RGB ones grey, for a
    model that takes the other.

    The images are read from the archive one after another, and never held together.
    """

    kind = "npz file"
    naming: Naming = "list"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: IO[bytes] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                if "images" not in names:
                    raise DataError(
                        f"{path} has no array 'images': it has {', '.join(sorted(names)) or 'none'}"
                    )
                sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
                with archive.open("images.npy") as stream:
                    self.shape, self.offset = _image_header(stream, path)
            found = sizes["images.npy"] - self.offset
            if found != math.prod(self.shape):
                raise DataError(f"{path} is damaged: its images take {found} bytes")
            self.labels, self.classes = self._read_labels(names, sizes)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not an .npz file that can be read: {error}") from error

    def _read_labels(
        self, names: set[str], sizes: dict[str, int]
    ) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        if "labels" not in names:
            return None, None
        most = {"labels": 8 * len(self) + 256, "classes": MOST_NAMES_BYTES}
        for name, limit in most.items():
            if sizes.get(f"{name}.npy", 0) > limit:
                raise DataError(f"'{name}' of {self.path} is larger than {limit} bytes")
        with np.load(self.path, allow_pickle=False) as data:
            labels = data["labels"]
            classes = data["classes"] if "classes" in names else None
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise DataError(
                f"the labels of {self.path} are {labels.dtype}{list(labels.shape)}: "
                f"there must be a whole number for each of the {len(self)} images"
            )
        if classes is None:
            return labels.astype(np.int64), None
        if classes.dtype.kind != "U" or classes.ndim != 1:
            raise DataError(f"'classes' of {self.path} must be a list of names")
        return labels.astype(np.int64), tuple(str(name) for name in classes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def name(self, position: int) -> str:
        return f"image {position}"

    def place(self, position: int) -> str:
        return f"image {position} of {self.path}"

    def read(self, position: int, loader: PictureLoader) -> np.ndarray:
        size = math.prod(self.shape[1:])
        if self._stream is None:
            # open from here on: an archive is read from front to back
            self._stream = zipfile.ZipFile(self.path).open("images.npy")  # noqa: SIM115
        target = self.offset + position * size
        # in steps, because zipfile reads what it skips, all at once
        for stop in (*range(self._stream.tell(), target, SKIPPED_BYTES), target):
            self._stream.seek(stop)
        raw = self._stream.read(size)
        if len(raw) != size:
            raise UnusableImageError("the archive ends before it")
        levels: np.ndarray = np.frombuffer(raw, np.uint8).reshape(self.shape[1:])
        if self._channels(loader.preprocessing.channels)[1]:
            levels = np.moveaxis(levels, 0, 2)
        return loader.of_levels(levels)

    def _channels(self, wanted: int) -> tuple[int, bool]:
        """Return how many channels there are for a model of `wanted`, and whether they are first.

        Taken as last where both ends could be.
        """
        if len(self.shape) == 3:
            return 1, False
        for count in (wanted, 3, 1):
            if count in (self.shape[3], self.shape[1]):
                return count, self.shape[3] != count
        return self.shape[3], False

    def check_channels(self, wanted: int) -> None:
        """Refuse images of which a model of `wanted` channels can be fed none.

        Raises:
            SimpruneError: they have other channels.
        """
        count, _ = self._channels(wanted)
        if not fits_channels(count, wanted):
            raise DataError(
                f"the images of {self.path} are uint8{list(self.shape)} with {count} "
                f"{'channel' if count == 1 else 'channels'}, and the model takes {wanted}: give "
                f"uint8[n, height, width, {wanted}], or channels first"
            )

    def digest(self, positions: Sequence[int]) -> str:
        return hashlib.sha256(f"{sha256(self.path)} {list(positions)}".encode()).hexdigest()


def _image_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], int]:
    """Return the shape of an array of images, and where its bytes begin."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of numpy's format")
    shape, fortran, dtype = read(stream)
    if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or 0 in shape:
        raise DataError(
            f"the images of {path} are {dtype}{list(shape)}: uint8[n, height, width], or with the "
            "model's channels last or first, can be read"
        )
    return tuple(int(side) for side in shape), stream.tell()


class HubDataset:
    """A Hugging Face data set that ``save_to_disk`` wrote; its pictures stay on the disk."""

    kind = "Hugging Face data set"
    naming: Naming = "list"

    def __init__(self, root: Path) -> None:
        try:
            import datasets
        except ImportError:
            raise RequirementError(
                f"{root} is a Hugging Face data set, and `datasets` is not installed: "
                "pip install datasets"
            ) from None
        if (root / "dataset_dict.json").is_file():
            splits = sorted(path.parent.name for path in root.glob("*/dataset_info.json"))
            raise DataError(
                f"{root} holds the splits {', '.join(splits)}: give one, "
                f"{argument('data')} {root / (splits[-1] if splits else 'test')}"
            )
        try:
            table = datasets.load_from_disk(str(root))
        except Exception as error:  # whatever the library stumbles over in damaged files
            text = " ".join(str(error).split())[:200]
            raise DataError(f"{root} cannot be read as a data set: {text}") from error
        features = table.features
        image = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not image:
            raise DataError(f"{root} has no column of images: it has {', '.join(features)}")
        self.image = image[0]
        # our own loader decodes, with its limits
        self.table = table.cast_column(self.image, datasets.Image(decode=False))
        self.root = root
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        column = named[0] if named else _column(features, LABEL_COLUMNS)
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] | None = None
        if column is None:
            return
        values = list(self.table.with_format(None)[column])
        for row, value in enumerate(values):
            if value is None or value != value:
                raise DataError(f"{self.place(row)} has no label: give all of them or none")
            if not isinstance(value, (str, int)) and not (
                isinstance(value, float) and value.is_integer()
            ):
                raise DataError(
                    f"{self.place(row)} has the label {value!r:.60}, which is neither a class "
                    f"number nor a name: leave it aside with {argument('labels', False)}"
                )
        if named:
            self.classes = tuple(features[column].names)
            self.labels = np.array(values, np.int64)
            return
        numbers = [whole_number(str(value)) for value in values]
        if all(number is not None for number in numbers):
            self.labels = np.array(numbers, np.int64)
        else:  # in the order of the library's own class_encode_column
            self.labels, self.classes = numbered([str(value) for value in values])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def name(self, position: int) -> str:
        return f"row {position}"

    def place(self, position: int) -> str:
        return f"row {position} of {self.root}"

    def read(self, position: int, loader: PictureLoader) -> np.ndarray:
        entry = self.table[int(position)][self.image]
        if not entry:
            raise UnusableImageError("no picture in this row")
        if entry["bytes"]:
            return loader(bytes(entry["bytes"]))
        return loader(Path(entry["path"] or ""))

    def digest(self, positions: Sequence[int]) -> str:
        total = hashlib.sha256(f"{self.classes} {list(positions)}".encode())
        for path in sorted(self.root.glob("*.arrow")):
            total.update(f"{path.name} {sha256(path)}".encode())
        return total.hexdigest()
