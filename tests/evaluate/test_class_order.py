"""Class folders are numbered as what trained the model does: timm's reader, torchvision's."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from cli import Called, cli
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torchvision.datasets import ImageFolder

import simprune_deploy as sd
from simprune_deploy.checkpoints.formats import from_object
from simprune_deploy.common.errors import DataError, InvalidArgumentError
from simprune_deploy.common.images import PictureLoader, Preprocessing
from simprune_deploy.evaluate.class_order import in_order
from simprune_deploy.evaluate.classes import MappedLabels, ModelClasses, map_labels
from simprune_deploy.evaluate.data_sources import folder_source
from simprune_deploy.predict.source import source_of_model
from simprune_deploy.pruning.model import describe_vit

ARCH = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
TWELVE = tuple(f"class_{number}" for number in range(1, 13))

FOLDERS: list[tuple[str, ...]] = [
    TWELVE,
    ("ant", "Bee", "cat"),
    ("10", "9", "1"),
    ("Öl", "Zebra", "äpfel", "apfel"),
    ("item007", "item08", "item9", "Item100", "item1000"),
    ("v1.10", "v1.9", "V1.2"),
    ("a b", "a_b", "a-b", "a1b"),
    ("n01440764", "n01443537", "n01484850"),
]


def folder_of(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / name / "1.png")
    return root


def by_folder(root: Path, found: MappedLabels) -> dict[str, int]:
    """The class number of every folder, as the labels of its pictures say."""
    paths = folder_source(root).paths
    return {path.parent.name: int(y) for path, y in zip(paths, found.labels, strict=True)}


def taken(root: Path, model: ModelClasses, asked: str | None = None) -> MappedLabels:
    return map_labels(folder_source(root), model, asked=asked)


@pytest.mark.parametrize("names", FOLDERS, ids=lambda names: names[0])
def test_folders_are_numbered_as_timm_and_torchvision_number_them(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    root = folder_of(tmp_path / "val", names)
    timms = create_dataset("", root=str(root)).reader.class_to_idx
    torchvisions = ImageFolder(str(root)).class_to_idx
    count = len(names)
    for asked, recorded, expected in (
        (None, None, torchvisions),
        (None, "timm", timms),
        (None, "torchvision", torchvisions),
        ("timm", None, timms),
        ("timm", "torchvision", timms),
        ("torchvision", "timm", torchvisions),
    ):
        found = taken(root, ModelClasses(count, None, recorded), asked)
        assert by_folder(root, found) == expected
        assert found.classes == tuple(sorted(expected, key=expected.__getitem__))
        how = found.how
        if timms == torchvisions:
            assert "in their order" in how
            continue
        order = "timm" if expected is timms else "torchvision"
        other = "torchvision" if expected is timms else "timm"
        assert f"taken as {order}'s" in how
        assert how.endswith(f"choose with class_order={other!r}")
        place, mine, theirs = re.search(r"class (\d+) is '(.*)', and '(.*)' as", how).groups()  # type: ignore[union-attr]
        rival = timms if order == "torchvision" else torchvisions
        assert expected[mine] == rival[theirs] == int(place)
        assert mine != theirs
        says = "class_order says" if asked else "checkpoint says" if recorded else "nothing says"
        assert says in how


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text("aAbB0129._- äÖß٣", min_size=1, max_size=6), min_size=1, max_size=8))
def test_sorting_is_timms_own_where_timm_has_an_order(names: set[str]) -> None:
    assert in_order(list(names), "torchvision") == tuple(sorted(names))
    keys = [natural_key(name) for name in names]
    if any(keys.count(key) > 1 for key in keys):
        with pytest.raises(DataError, match="as equals, in an order that changes from run to run"):
            in_order(list(names), "timm")
    else:
        assert in_order(list(names), "timm") == tuple(sorted(names, key=natural_key))


def test_names_that_timm_holds_equal_are_refused_in_its_order(tmp_path: Path) -> None:
    """timm sorts a set by keys that are equal, and sets come otherwise in every process."""
    root = folder_of(tmp_path / "val", ("a", "A", "b"))
    assert natural_key("a") == natural_key("A")
    with pytest.raises(DataError, match="timm sorts the classes 'A' and 'a' as equals"):
        taken(root, ModelClasses(3, None, "timm"))
    found = taken(root, ModelClasses(3))
    assert by_folder(root, found) == ImageFolder(str(root)).class_to_idx
    assert "timm has no certain order for them" in found.how


def test_names_on_which_timm_stops_are_told(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "val", ("m", "m²", "1²"))
    with pytest.raises(ValueError, match="invalid literal"):
        find_images_and_targets(str(root))
    with pytest.raises(DataError, match=r"timm cannot sort the class '1²': .*classes='FILE'"):
        taken(root, ModelClasses(3), "timm")
    assert by_folder(root, taken(root, ModelClasses(3))) == ImageFolder(str(root)).class_to_idx


def test_folders_named_by_numbers(tmp_path: Path) -> None:
    """0 to 11 are the numbers of classes to some, and texts to torchvision: the user says."""
    root = folder_of(tmp_path / "val", [str(number) for number in range(12)])
    timms = create_dataset("", root=str(root)).reader.class_to_idx
    assert by_folder(root, taken(root, ModelClasses(12, None, "timm"))) == timms
    assert by_folder(root, taken(root, ModelClasses(12), "timm")) == timms
    torchvisions = ImageFolder(str(root)).class_to_idx
    assert by_folder(root, taken(root, ModelClasses(12), "torchvision")) == torchvisions
    assert by_folder(root, taken(root, ModelClasses(12, None, "torchvision"))) == torchvisions
    with pytest.raises(
        DataError, match=r"'10' is the model's class 10 by its number, and number 2"
    ):
        taken(root, ModelClasses(12))
    # some of them, of a model with more
    some = folder_of(tmp_path / "some", ["0", "10"])
    with pytest.raises(DataError, match="by its number"):
        taken(some, ModelClasses(12))
    assert by_folder(some, taken(some, ModelClasses(12), "timm")) == {"0": 0, "10": 10}
    # nothing to ask where both agree
    for names, count in ((["0", "1", "7"], 10), (["00", "02", "11"], 12), (["0", "1", "2"], 3)):
        plain = folder_of(tmp_path / f"{count}", names)
        found = taken(plain, ModelClasses(count))
        assert by_folder(plain, found) == {name: int(name) for name in names}
        assert found.how == "class names are the model's class numbers"
    twice = folder_of(tmp_path / "twice", ["1", "01", "0"])
    with pytest.raises(DataError, match="'01' and '1' of the data are both number 1"):
        taken(twice, ModelClasses(3))


def test_timm_takes_the_innermost_folder(tmp_path: Path) -> None:
    for name in ("animals/cat", "animals/dog", "plants/oak"):
        folder_of(tmp_path / "val" / name, ("x",))
    root = tmp_path / "val"
    assert set(create_dataset("", root=str(root)).reader.class_to_idx) == {"x"}
    assert by_folder(root, taken(root, ModelClasses(2)))  # torchvision's own reading
    for count in (2, 3):
        with pytest.raises(DataError, match="timm takes the innermost folder as the class, and an"):
            taken(root, ModelClasses(count, None, "timm"))


def test_an_order_where_the_classes_are_known_is_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "val", ("ant", "Bee", "cat"))
    named = ModelClasses(3, ("cat", "ant", "bee"))
    assert by_folder(root, taken(root, named)) == {"cat": 0, "ant": 1, "Bee": 2}
    for asked in ("timm", "torchvision"):
        with pytest.raises(
            InvalidArgumentError, match=f"class_order={asked!r} orders classes, and"
        ):
            taken(root, named, asked)
    # names of other classes contradict any order
    with pytest.raises(DataError, match="classes of the data are none of the model's"):
        taken(root, ModelClasses(3, ("x", "y", "z")), "timm")


# What a checkpoint says


def train_py(model: str = ARCH, **changes: Any) -> argparse.Namespace:
    """Arguments of timm's train.py, with its defaults."""
    values: dict[str, Any] = {
        **{"data_dir": "/data", "dataset": "", "train_split": "train", "val_split": "validation"},
        **{"class_map": "", "model": model, "num_classes": None, "gp": None, "img_size": None},
        **{"in_chans": None, "input_size": None, "crop_pct": None, "mean": None, "std": None},
        **{"interpolation": "", "batch_size": 128, "validation_batch_size": None, "opt": "sgd"},
        **{"eval_metric": "top1", "recovery_interval": 0, "checkpoint_hist": 10},
        "model_kwargs": dict(SMALL),
    }
    return argparse.Namespace(**{**values, **changes})


def deit() -> argparse.Namespace:
    """Arguments of DeiT's main.py, named after timm's; it reads folders with torchvision."""
    values = {"model": ARCH, "input_size": 32, "nb_classes": 12, "aa": "rand-m9-mstd0.5-inc1"}
    values |= {"train_interpolation": "bicubic", "reprob": 0.25, "data_path": "/data"}
    return argparse.Namespace(**values)


@pytest.mark.parametrize(
    ("header", "order"),
    [
        ({"arch": ARCH, "args": train_py(), "version": 2}, "timm"),
        ({"arch": ARCH, "args": vars(train_py())}, "timm"),
        ({"arch": ARCH, "args": train_py(dataset="imagenet")}, "timm"),
        ({"arch": ARCH, "args": train_py(dataset="torch/image_folder")}, "torchvision"),
        ({"arch": ARCH, "args": train_py(dataset="torch/cifar10")}, None),
        ({"arch": ARCH, "args": train_py(dataset="hfds/org/pictures")}, None),
        ({"arch": ARCH, "args": train_py(class_map="map.txt")}, "class map map.txt"),
        ({"arch": ARCH}, None),  # PyTorch's ImageNet example, MoCo
        ({"arch": ARCH, "args": deit()}, None),
        ({"args": deit()}, None),
        ({"args": train_py()}, None),
    ],
)
def test_only_what_timms_train_py_wrote_says_timms_order(
    header: dict[str, Any], order: str | None
) -> None:
    found = from_object("model.pt", {**header, "state_dict": {"head.bias": torch.zeros(12)}})
    assert found.preprocessing.get("class_order") == order


def test_the_order_travels_with_the_model(tmp_path: Path) -> None:
    model = timm.create_model(ARCH, num_classes=12, **SMALL)
    value = {"arch": ARCH, "state_dict": model.state_dict(), "args": train_py()}
    torch.save(value, tmp_path / "model.pt")
    pruned = sd.prune(sd.load(tmp_path / "model.pt"), layers=[1])
    for name in ("again.pt", "again.safetensors"):
        sd.save(pruned, tmp_path / name)
        again = sd.load(tmp_path / name)
        assert describe_vit(again.vit)["preprocessing"]["class_order"] == "timm"  # type: ignore[arg-type]
    metadata = source_of_model("vit", pruned).metadata
    assert ModelClasses.of(metadata) == ModelClasses(12, None, "timm")
    shown = cli("inspect", tmp_path / "model.pt", "--json")
    assert json.loads(shown.out)["preprocessing"]["class_order"] == "timm"


# From a training's checkpoint to a number


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of twelve classes, and a model that timm's reader taught to tell them apart."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for name in TWELVE:
        (place / "val" / name).mkdir(parents=True)
        base = rng.integers(0, 256, (6, 6, 3))
        for number in range(3):
            levels = np.clip(base + rng.integers(-6, 7, base.shape), 0, 255).astype(np.uint8)
            picture = Image.fromarray(levels).resize((36, 36), Image.Resampling.BICUBIC)
            picture.save(place / "val" / name / f"{number}.png")
    model = timm.create_model(ARCH, num_classes=12, **SMALL).eval()
    pictures = create_dataset("", root=str(place / "val"))
    loader = PictureLoader(Preprocessing.of_model(model))
    wanted = Preprocessing.of_model(model)
    pixels = np.stack([loader.of_levels(np.asarray(pictures[i][0])) for i in range(len(pictures))])
    x = torch.from_numpy(wanted.normalize(pixels))
    y = torch.tensor([pictures[i][1] for i in range(len(pictures))])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        means = torch.stack([features[y == each].mean(0) for each in range(12)])
        middle = features.mean(0)
        weight = torch.nn.functional.normalize(means - middle)
        model.head.weight.copy_(weight)
        model.head.bias.copy_(-(weight @ middle))
        assert bool((model(x).argmax(1) == y).all())
    state = model.state_dict()
    torch.save({"arch": ARCH, "state_dict": state, "args": train_py()}, place / "timm.pt")
    args = train_py(class_map="map.txt")
    torch.save({"arch": ARCH, "state_dict": state, "args": args}, place / "mapped.pt")
    bare = argparse.Namespace(model_kwargs=dict(SMALL))
    torch.save({"arch": ARCH, "state_dict": state, "args": bare}, place / "bare.pt")
    (place / "map.txt").write_text("\n".join(pictures.reader.class_to_idx))
    return place


def swept(trained: Path, tmp_path: Path, model: str, *more: object) -> tuple[float, list[str]]:
    """Dense top-1 accuracy of a sweep, and what it says of the data."""
    said = cli(
        *("sweep", trained / model, "--data", trained / "val", "--thresholds", "0.999"),
        *("--layers", "1", "--backend", "torch", "--timing", "0", "--json"),
        *("-o", tmp_path / "sweep", *more),
    )
    assert said.code == 0, said
    result = json.loads(said.out)
    return result["cells"][0]["top1"], result["data"]["notes"]


def test_a_checkpoint_of_timms_gets_its_order(trained: Path, tmp_path: Path) -> None:
    top1, (note,) = swept(trained, tmp_path, "timm.pt")
    assert top1 == 1
    assert "as the model's training checkpoint says: class 1 is 'class_2', and 'class_10'" in note
    assert note.endswith("choose with --class-order torchvision")
    top1, _ = swept(trained, tmp_path, "timm.pt", "--class-order", "torchvision", "--force")
    assert top1 < 0.2


def test_of_other_checkpoints_the_note_tells_how_to_choose(trained: Path, tmp_path: Path) -> None:
    top1, notes = swept(trained, tmp_path, "bare.pt")
    (note,) = (each for each in notes if "class_10" in each)
    assert top1 < 0.2
    assert "since nothing says what trained the model: class 1 is 'class_10'" in note
    choose = note.split("choose with ")[1].split()
    assert swept(trained, tmp_path, "bare.pt", "--force", *choose)[0] == 1


def test_a_class_map_is_asked_for_and_is_a_list_of_names(trained: Path, tmp_path: Path) -> None:
    command = ("sweep", trained / "mapped.pt", "--data", trained / "val", "--thresholds", "0.999")
    command += ("--layers", "1", "--backend", "torch", "--timing", "0", "-o", tmp_path / "no")
    line = cli(*command).line
    assert "the model's classes are numbered by the class map map.txt" in line
    assert "give the same list with --classes FILE" in line
    top1, notes = swept(trained, tmp_path, "mapped.pt", "--classes", trained / "map.txt")
    assert (top1, notes) == (1, ["classes mapped by --classes"])


def verified(trained: Path, *more: object) -> Called:
    return cli(
        *("verify", trained / "bare.pt", "--data", trained / "val"),
        *("--reference", trained / "bare.pt", "--min-agreement", "99%", *more),
    )


def test_verify_takes_an_order(trained: Path) -> None:
    said = verified(trained, "--class-order", "timm", "--json")
    found = json.loads(said.out)
    assert found["accuracy"] == 1
    assert "as --class-order says" in str(found)
    said = " ".join(verified(trained).out.split())  # type: ignore[assignment]
    assert "choose with --class-order timm" in str(said)
    stray = cli("verify", trained, "--class-order", "timm").line
    assert "--class-order belongs to --data" in stray


def test_an_exported_model_keeps_the_order(trained: Path, tmp_path: Path) -> None:
    said = cli("export", trained / "timm.pt", "--layers", "1", "--threshold", "0.999",
               "--no-verify", "-o", tmp_path / "out")  # fmt: skip
    assert said.code == 0, said
    command = ("verify", tmp_path / "out", "--data", trained / "val", "--max-drop", "50%", "--json")
    found = json.loads(cli(*command).out)
    assert found["reference_accuracy"] == 1
    assert "as the model's training checkpoint says" in str(found["notes"])


def test_tune_takes_an_order(trained: Path, tmp_path: Path) -> None:
    said = cli(
        *("tune", trained / "bare.pt", "--data", trained / "val", "--max-drop", "50%"),
        *("--layers", "1", "--backend", "torch", "--timing", "0", "--class-order", "timm"),
        *("--json", "-o", tmp_path / "tuned.json"),
    )
    assert said.code == 0, said
    assert "as --class-order says" in str(json.loads(said.out))


def test_an_order_without_class_folders_is_refused(trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "numbers.csv").write_text("path,label\n1.png,0\n")
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.zeros(1, int))
    for data, words in (
        (tmp_path, f"--class-order numbers labels, and {tmp_path} has none: drop it"),
        (tmp_path / "numbers.csv", "--class-order timm orders classes, and the labels are class"),
        (tmp_path / "a.npz", "--class-order timm orders classes, and the labels are class numbers"),
    ):
        command = ("verify", trained / "bare.pt", "--reference", trained / "bare.pt")
        command += ("--min-agreement", "99%", "--data", data, "--class-order", "timm")
        assert words in cli(*command).line
    for more, words in (
        (("--no-labels",), "--class-order numbers labels, and --no-labels uses none: drop one"),
        (("--classes", "map.txt"), "--classes says the number of every class, and --class-order"),
    ):
        assert words in verified(trained, "--class-order", "timm", *more).line
    with pytest.raises(InvalidArgumentError, match="class_order 'natural' is unknown: use timm or"):
        sd.SweepRequest("m", "d", class_order="natural")  # type: ignore[arg-type]
