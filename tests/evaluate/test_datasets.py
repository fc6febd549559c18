"""Data sets for sweeps: the same pictures from every kind of source, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.datasets import DataOptions, DataSet, open_data
from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.pruning.config import PruneConfig

SLICE = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"
NAMES = [
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
]  # fmt: skip
COUNT = 40


def facts(**changes: object) -> ModelMetadata:
    """What the demo model's export says of itself."""
    base = ModelMetadata(
        architecture="vit_tiny_patch16_224",
        model_args={},
        preprocessing={"mean": [0.286], "std": [0.353], "crop_pct": 1.0, "label_names": NAMES},
        pruning=PruneConfig(),
        export={},
        output="logits",
        num_classes=10,
        num_prefix_tokens=1,
        num_patches=196,
        depth=6,
        channels=1,
        image_size=(28, 28),
        embed_dim=96,
        mlp_dim=384,
        parameters=1,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


UNNAMED = {"mean": [0.286], "std": [0.353], "crop_pct": 1.0}


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SLICE) as data:
        return data["images"][:COUNT], data["labels"][:COUNT].astype(np.int64)


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / NAMES[label].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:04}.png")
    return root


def as_folder(place: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    return write_folder(place / "folder", images, labels)


def as_csv(place: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    root = write_folder(place, images, labels)
    files = sorted(root.glob("*/*.png"), key=lambda path: path.name)
    rows = [f"{path.relative_to(root)},{NAMES[y]}" for path, y in zip(files, labels, strict=True)]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    return root / "list.csv"


def as_npz(place: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez_compressed(place / "a.npz", images=images, labels=labels, classes=np.array(NAMES))
    return place / "a.npz"


def as_hub(place: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=NAMES)}
    )
    rows = {"picture": [Image.fromarray(image) for image in images], "kind": labels.tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(place / "hub"))
    return place / "hub"


Writer = Callable[[Path, np.ndarray, np.ndarray], Path]


@pytest.mark.parametrize("write", [as_folder, as_csv, as_npz, as_hub])
def test_every_source_gives_the_same_pictures_and_labels(
    write: Writer, tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    data = open_data(write(tmp_path, images, labels), facts())
    data = pickle.loads(pickle.dumps(data))  # as it travels to other machines
    assert len(data) == COUNT
    assert data.classes == tuple(NAMES)
    found = {}
    for batch in data.batches(0, COUNT, 7):
        assert batch.labels is not None
        assert len(batch.pixels) <= 7
        for pixels, label in zip(batch.pixels, batch.labels, strict=True):
            found[np.rint(pixels[0] * 255).astype(np.uint8).tobytes()] = label
    expected = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert found == expected
    assert data.to_dict()["labels"] is True


def test_a_limit_is_spread_evenly(tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = pictures
    order = np.argsort(labels, kind="stable")
    path = as_npz(tmp_path, images[order], labels[order])
    data = open_data(path, facts(), DataOptions(limit=10))
    assert data.positions.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert "10 of 40 pictures" in data.notes[0]
    assert data.identity != open_data(path, facts()).identity


def test_identity_changes_with_pictures_labels_and_preprocessing(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    root = as_folder(tmp_path, images, labels)
    first = open_data(root, facts()).identity
    assert open_data(root, facts()).identity == first
    crop = facts(preprocessing={**facts().preprocessing, "crop_pct": 0.9})
    assert open_data(root, crop).identity != first
    file = next(root.glob("*/*.png"))
    Image.fromarray(255 - images[0]).save(file)
    assert open_data(root, facts()).identity != first


def test_folders_without_classes_have_no_labels(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    for index, image in enumerate(images[:5]):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    data = open_data(tmp_path, facts())
    assert data.labels is None
    assert "no labels" in data.notes[0]
    root = as_folder(tmp_path / "more", images, labels)
    data = open_data(root, facts(), DataOptions(labels=False))
    assert data.labels is None
    assert len(data) == COUNT


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_channels_first_and_last(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 28, 28, channels), dtype=np.uint8)
    wanted = facts(channels=channels, preprocessing={"mean": [0.5], "std": [0.5], "crop_pct": 1.0})
    first = images.transpose(0, 3, 1, 2)
    for name, array in {"last": images, "first": first}.items():
        np.savez(tmp_path / f"{name}.npz", images=np.ascontiguousarray(array))
        (batch,) = open_data(tmp_path / f"{name}.npz", wanted).batches(0, 3, 3)
        np.testing.assert_array_equal(batch.pixels, first.astype(np.float32) / 255)


@pytest.mark.parametrize(("shape", "count"), [((3, 28, 28), 1), ((3, 28, 28, 3), 3)])
def test_archives_without_the_models_channels_are_refused(
    tmp_path: Path, shape: tuple[int, ...], count: int
) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
    refused(
        tmp_path / "a.npz",
        rf"with {count} channels?, and the model takes 4: give uint8\[n, height, width, 4\]",
        facts(channels=4, preprocessing={"mean": [0.5], "std": [0.5]}),
    )


@pytest.mark.parametrize("write", [as_folder, as_csv, as_hub])
def test_pictures_with_alpha_feed_four_channels(tmp_path: Path, write: Writer) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 28, 28, 4), dtype=np.uint8)
    labels = np.zeros(6, np.int64)
    values = {"mean": [0.5], "std": [0.5], "crop_pct": 1.0, "label_names": NAMES}
    data = open_data(write(tmp_path, images, labels), facts(channels=4, preprocessing=values))
    (batch,) = data.batches(0, 6, 6)
    np.testing.assert_array_equal(batch.pixels, images.transpose(0, 3, 1, 2).astype("f4") / 255)


def test_a_folder_whose_every_picture_is_unusable_says_why(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    values = {"mean": [0.5], "std": [0.5], "label_names": NAMES}
    model = facts(channels=4, preprocessing=values)
    data = open_data(as_folder(tmp_path, *pictures), model, DataOptions(max_unreadable=1.0))
    skipped: list[tuple[str, str]] = []
    assert list(data.batches(0, COUNT, 8, skipped)) == []
    with pytest.raises(
        SimpruneError, match=r"none of the 40 .*L without an alpha.*give others"
    ) as e:
        data.check_skipped(skipped)
    assert "max_unreadable" not in str(e.value)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path) -> None:
    images = np.zeros((100_000, 28, 28), np.uint8)
    np.savez_compressed(tmp_path / "many.npz", images=images)
    del images
    data = open_data(tmp_path / "many.npz", facts())
    tracemalloc.start()
    for first in range(0, 100_000, 25_000):
        for _ in data.batches(first, first + 40, 20):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8_000_000  # the array is 78 MB


def test_unreadable_pictures_are_named_counted_and_limited(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    root = as_folder(tmp_path, *pictures)
    broken = next(root.glob("*/*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    data = open_data(root, facts(), DataOptions(max_unreadable=0.05))
    skipped: list[tuple[str, str]] = []
    assert sum(len(b.pixels) for b in data.batches(0, COUNT, 8, skipped)) == COUNT - 1
    assert skipped[0][0] == broken.relative_to(root).as_posix()
    data.check_skipped(skipped)
    strict = open_data(root, facts())
    with pytest.raises(SimpruneError, match=r"1 of 40 pictures cannot be read .*1\.00% allowed"):
        strict.check_skipped(skipped)


def refused(path: Path, match: str, model: ModelMetadata | None = None, **options: object) -> None:
    with pytest.raises(SimpruneError, match=match) as caught:
        open_data(path, model or facts(), DataOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "holds no pictures")
    root = as_folder(tmp_path, *pictures)
    (root / "hat").mkdir()
    refused(root, "class folder 'hat' .* holds no pictures")
    Image.new("L", (28, 28)).save(root / "hat" / "1.png")
    refused(root, "1 classes of the data are none of the model's: 'hat'; it has 't-shirt'")
    refused(root, "11 classes .* and the model 10 without names", facts(preprocessing=UNNAMED))
    Image.new("L", (28, 28)).save(root / "loose.png")
    refused(root, "loose.png lies beside the class folders .* labels=False")


def test_classes_are_mapped_by_file_by_number_or_by_order(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    strange = [f"kind {9 - index}" for index in range(10)]
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(strange))
    path, names = tmp_path / "a.npz", tmp_path / "names"

    def mapped(data: DataSet) -> None:
        assert data.labels is not None
        assert (data.labels == labels).all()

    names.write_text("\n".join(strange) + "\n")
    mapped(open_data(path, facts(), DataOptions(classes=names)))
    names.write_text(json.dumps({name: index for index, name in enumerate(strange)}))
    mapped(open_data(path, facts(), DataOptions(classes=names)))
    names.write_text(json.dumps(dict(zip(strange, NAMES, strict=True))))
    mapped(open_data(path, facts(), DataOptions(classes=names)))
    # without names on either side, the order counts, and is said to
    data = open_data(path, facts(preprocessing=UNNAMED))
    mapped(data)
    assert "in their order" in data.notes[0]

    refused(path, "are none of the model's")
    names.write_text(json.dumps(dict.fromkeys(strange[1:], 3)))
    refused(path, "names no class for 'kind 9'", classes=names)
    names.write_text(json.dumps(dict.fromkeys(strange, 10)))
    refused(path, "is number 10, and the model's classes are 0 to 9", classes=names)
    names.write_text(json.dumps(dict.fromkeys(strange, "hat")))
    refused(path, "the class 'hat', and the model has 't-shirt'", classes=names)
    names.write_text('{"a": [1]}')
    refused(path, "neither a number nor a name", classes=names)


def test_a_class_that_the_list_holds_twice_is_one_class(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    twice = [*NAMES[:9], NAMES[0]]  # its second place must not become label -1
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(twice))
    found = open_data(tmp_path / "a.npz", facts()).labels
    assert found is not None
    assert 9 in labels
    assert (found == np.where(labels == 9, 0, labels)).all()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"pictures": np.zeros(3)}, "has no array 'images': it has pictures"),
        ({"images": np.zeros((3, 28, 28))}, r"float64\[3, 28, 28\]"),
        (
            {"images": np.zeros((3, 28, 28, 2), np.uint8)},
            r"with 2 channels, and the model takes 1: give uint8\[n, height, width, 1\]",
        ),
        ({"images": np.zeros((3, 28, 28), np.uint8), "labels": np.zeros(2, int)}, "each of the 3"),
        (
            {"images": np.zeros((3, 28, 28), np.uint8), "labels": np.array([0, 10, 1])},
            r"label 10 \(image 1 of .*\) is outside 0 to 9",
        ),
        ({"images": np.array([None])}, "images of"),
    ],
)
def test_archives_that_do_not_fit_are_refused(
    arrays: dict[str, np.ndarray], match: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    refused(tmp_path / "a.npz", match)


def test_damaged_archives_and_other_files_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((9, 28, 28), np.uint8))
    (tmp_path / "cut.npz").write_bytes(file.getvalue()[:2000])
    refused(tmp_path / "cut.npz", "not an .npz file that can be read")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "no data set: give a folder, a .csv")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no column of paths"),
        ("a,b\n1,2\n", "no column of paths"),
        ("path,label\n", "names no pictures"),
        ("path,label\na.png,\n", "line 2 .* has no label"),
        ("path,label\n,coat\n", "line 2 .* names no picture"),
        ("path,label\na.png,99\n", r"label 99 \(line 2 of .*list.csv\) is outside"),
    ],
)
def test_csv_files_that_do_not_fit_are_refused(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    refused(tmp_path / "list.csv", match)


def test_a_hub_data_set_with_splits_asks_for_one(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    images, labels = pictures
    one = datasets.load_from_disk(str(as_hub(tmp_path, images[:2], labels[:2])))
    datasets.DatasetDict({"test": one, "train": one}).save_to_disk(str(tmp_path / "all"))
    refused(tmp_path / "all", "holds the splits test, train: give one, data")
    assert len(open_data(tmp_path / "all" / "test", facts())) == 2
    (tmp_path / "all" / "test" / "state.json").write_text("{")
    refused(tmp_path / "all" / "test", "cannot be read as a data set")


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    for options, match in (
        ({"limit": 0}, "limit 0"),
        ({"max_unreadable": 2.0}, "max_unreadable 2"),
        ({"labels": False, "classes": tmp_path}, "drop one"),
    ):
        with pytest.raises(SimpruneError, match=match):
            DataOptions(**options)  # type: ignore[arg-type]


def test_the_whole_test_set_becomes_one_file(
    tmp_path: Path, pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = pictures
    for name, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    script = ROOT / "examples" / "fashion_mnist" / "to_npz.py"
    subprocess.run([sys.executable, script, tmp_path, tmp_path / "all.npz"], check=True)
    data = open_data(tmp_path / "all.npz", facts())
    assert data.labels is not None
    assert data.labels.tolist() == labels.tolist()
    assert data.classes == tuple(NAMES)
