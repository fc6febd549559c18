"""Labels, names and lists of classes, in every spelling that programs write them."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simprune_deploy.common.errors import DataError, InvalidArgumentError, SimpruneError
from simprune_deploy.common.images import Preprocessing
from simprune_deploy.evaluate.classes import MappedLabels, ModelClasses, map_labels, read_mapping
from simprune_deploy.evaluate.data_sources import (
    Archive,
    Files,
    HubDataset,
    csv_source,
    folder_source,
    numbered,
    whole_number,
)
from simprune_deploy.evaluate.datasets import DataSet, open_data_source

UNNAMED = ModelClasses(3)


def named(*names: str) -> ModelClasses:
    return ModelClasses(len(names), names)


def column(texts: Sequence[str]) -> Files:
    """A CSV file's labels."""
    paths = [Path(f"{i}.png") for i in range(len(texts))]
    lines = (Path("list.csv"), range(2, len(texts) + 2))
    return Files("CSV file", Path(), paths, *numbered(texts), "column", lines)


def listed(tmp_path: Path, labels: Sequence[int], classes: Sequence[str] = ()) -> Archive:
    arrays = {"images": np.zeros((len(labels), 4, 4), np.uint8), "labels": np.array(labels)}
    if classes:
        arrays["classes"] = np.array(classes)
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    return Archive(tmp_path / "a.npz")


def of_texts(texts: Sequence[str], model: ModelClasses) -> MappedLabels:
    return map_labels(column(texts), model)


def refusal(texts: Sequence[str], model: ModelClasses) -> str:
    with pytest.raises(SimpruneError) as caught:
        of_texts(texts, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names

LETTERS = st.text("aAbB_- /", min_size=1, max_size=4)


@given(st.lists(LETTERS, unique=True, min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_an_exact_name_wins_whatever_else_is_alike(names: list[str], random: object) -> None:
    used = [random.choice(names) for _ in range(12)]  # type: ignore[attr-defined]
    found = of_texts(used, named(*names))
    assert found.labels.tolist() == [names.index(name) for name in used]
    assert found.classes == tuple(names)
    assert found.how == "classes matched by name"


@given(st.lists(LETTERS, unique=True, min_size=2, max_size=6), LETTERS)
def test_a_name_without_its_own_is_matched_if_one_is_alike(names: list[str], name: str) -> None:
    def plain(text: str) -> list[str]:
        for mark in "_-/":
            text = text.replace(mark, " ")
        return text.lower().split()

    alike = [index for index, each in enumerate(names) if plain(each) == plain(name)]
    if name in names:
        alike = [names.index(name)]
    if len(alike) == 1:
        assert of_texts([name], named(*names)).labels.tolist() == alike
    else:
        text = refusal([name], named(*names))
        if alike:
            assert "could be the model's classes" in text
            for index in alike:
                assert f"{index} ({names[index]!r})" in text
        else:
            assert "are none of the model's" in text


def test_case_dashes_and_umlauts_of_a_mac(tmp_path: Path) -> None:
    model = named("A", "B", "a", "b")
    assert of_texts(["A", "B", "a", "b"], model).labels.tolist() == [0, 1, 2, 3]
    model = named("T-shirt", "Äpfel", "ankle boot")
    assert of_texts(["t_shirt", "A\u0308pfel", "Ankle-Boot"], model).labels.tolist() == [0, 1, 2]
    text = refusal(["cat", "Cat"], named("cat", "dog"))
    assert text.startswith("classes 'Cat' and 'cat' of the data could both be the model's class 0")
    assert text.endswith("say which is which, by number, with classes='FILE'")


def test_a_name_that_the_model_has_twice(tmp_path: Path) -> None:
    names = ("crane", "heron", "crane")  # as in ImageNet's
    text = refusal(["crane", "heron"], named(*names))
    assert "the class 'crane' could be the model's classes 0 ('crane') and 2 ('crane')" in text
    assert of_texts(["heron"], named(*names)).labels.tolist() == [1]
    # a list that is the model's own is taken by number
    source = listed(tmp_path, [2, 0, 1, 2], names)
    assert map_labels(source, named(*names)).labels.tolist() == [2, 0, 1, 2]
    # and a number says which
    mapping: dict[str, int | str] = {"crane": 2, "heron": "heron"}
    found = map_labels(column(["crane", "heron"]), named(*names), mapping)
    assert found.labels.tolist() == [2, 1]
    with pytest.raises(DataError, match="'crane' could be the model's classes 0"):
        map_labels(column(["crane"]), named(*names), {"crane": "crane"})


# Labels that are numbers


@given(st.lists(st.integers(0, 11), min_size=1), st.sampled_from(["{}", "{}.0", "{}.", "{:03}"]))
def test_whole_numbers_are_class_numbers_however_they_are_written(
    numbers: list[int], form: str
) -> None:
    found = of_texts([form.format(number) for number in numbers], ModelClasses(12))
    assert found.labels.tolist() == numbers
    assert found.classes == tuple(map(str, range(12)))


def test_what_pandas_writes(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": ["a.png"] * 12, "label": np.arange(12, dtype=float)})
    frame.to_csv(tmp_path / "floats.csv", index=False)
    assert "11.0" in (tmp_path / "floats.csv").read_text()
    found = map_labels(csv_source(tmp_path / "floats.csv"), ModelClasses(12))
    assert found.labels.tolist() == list(range(12))
    frame.loc[3, "label"] = None
    frame.to_csv(tmp_path / "hole.csv", index=False)
    with pytest.raises(DataError, match=r"line 5 of .* has no label"):
        csv_source(tmp_path / "hole.csv")


def test_what_is_no_whole_number() -> None:
    assert [whole_number(t) for t in ("1e0", "1.5", "", "٣", "1234567890", "0x1")] == [None] * 6
    assert [whole_number(t) for t in ("-1", "007", "2.", "3.000")] == [-1, 7, 2, 3]
    # hashes and doses may be names; where nobody knows the names, a fraction is a mistake
    assert of_texts(["1e0", "ab", "2e3"], UNNAMED).labels.tolist() == [0, 2, 1]
    assert of_texts(["1.5", "0.5"], named("0.5", "1.5")).labels.tolist() == [1, 0]
    text = refusal(["0.5", "1.0", "1.5"], UNNAMED)
    assert text.startswith("the label '0.5' (line 2 of list.csv) is no class number")
    mapping: dict[str, int | str] = {"0.5": 2, "1.0": 1, "1.5": 0}
    found = map_labels(column(["0.5", "1.0", "1.5"]), UNNAMED, mapping)
    assert found.labels.tolist() == [2, 1, 0]


def test_numbers_that_are_also_the_models_names() -> None:
    """A model that torchvision taught on folders 0 to 10 names its class 2 "10"."""
    names = sorted(str(number) for number in range(11))
    assert names.index("10") == 2
    for texts in (["10", "1"], ["10.0", "1.0"], [str(number) for number in range(11)]):
        text = refusal(texts, named(*names))
        assert "is the name of the model's class 2, and the number of another" in text
    assert of_texts(["0", "1"], named(*names)).labels.tolist() == [0, 1]
    assert of_texts(["30", "10"], named("10", "20", "30")).labels.tolist() == [2, 0]
    assert of_texts(["007", "010"], named("007", "010")).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["0", "2", "3", "-1"], "label 3 (line 4 of list.csv) is outside 0 to 2, the classes of"),
        (["0", "1", "-1"], "label -1 (line 4 of list.csv) is outside 0 to 2, the classes of the"),
        (["0", "1.0", "-1.0"], "label -1 (line 4 of list.csv) is outside"),
        (["2", "-2"], "label -2 (line 3 of list.csv)"),
    ],
)
def test_the_first_label_that_no_class_has_is_named(texts: list[str], words: str) -> None:
    text = refusal(texts, UNNAMED)
    assert words in text
    assert ("where there is no label: leave that picture out" in text) == ("label -1" in text)


def test_places_of_labels_in_every_source(tmp_path: Path) -> None:
    for labels, place in (([0, 5, 1, 9], "label 5 (image 1 of"), ([0, 1, -1], "label -1 (image 2")):
        for classes in ((), ("x", "y", "z")):
            with pytest.raises(DataError) as caught:
                map_labels(listed(tmp_path, labels, classes), UNNAMED)
            assert place in str(caught.value)
    for name in ("1", "12"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "val" / name / "a.png")
    with pytest.raises(DataError, match=r"label 12 \(12/a\.png\) is outside 0 to 2, the classes"):
        map_labels(folder_source(tmp_path / "val"), named("x", "y", "z"))


# Hugging Face


def hub(tmp_path: Path, labels: Sequence[object], feature: object) -> HubDataset:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    pictures = [Image.new("L", (4, 4))] * len(labels)
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {"image": pictures, "label": list(labels)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "hub"))
    return HubDataset(tmp_path / "hub")


def test_hub_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    text, real = datasets.Value("string"), datasets.Value("float64")
    own = datasets.ClassLabel(names=["10", "9", "1"])
    cases: list[tuple[str, Sequence[object], object, list[int]]] = [
        ("own", [2, 0, 1], own, [2, 0, 1]),  # in the order of its own list
        ("floats", [2.0, 0.0], real, [2, 0]),
        ("digits", ["2", "0"], text, [2, 0]),
    ]
    for name, labels, feature, expected in cases:
        source = hub(tmp_path / name, labels, feature)
        assert map_labels(source, UNNAMED).labels.tolist() == expected
        with pytest.raises(InvalidArgumentError, match="class_order='timm' orders classes, and"):
            map_labels(source, UNNAMED, asked="timm")
    # texts are numbered as the library's own encoding does
    source = hub(tmp_path / "texts", ["cat", "Bee", "ant", "cat"], text)
    encoded = source.table.class_encode_column("label")
    found = map_labels(source, ModelClasses(3, None, "timm"))
    assert found.labels.tolist() == encoded["label"][:] == [2, 0, 1, 2]
    for name, labels, feature, words in (
        ("none", ["a", None], text, "row 1 of .* has no label"),
        ("nan", [0.0, float("nan")], real, "row 1 of .* has no label"),
        ("half", [0.0, 0.5], real, r"row 1 of .* has the label 0\.5, which is neither"),
        ("many", [[0], [1]], datasets.Sequence(datasets.Value("int64")), r"the label \[0\], which"),
    ):
        with pytest.raises(DataError, match=words):
            hub(tmp_path / name, labels, feature)
    with pytest.raises(DataError, match=r"label -1 \(row 1 of .*leave that picture out"):
        map_labels(hub(tmp_path / "minus", [0, -1], own), UNNAMED)


# CSV files


def picture(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(place)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_marks(separator: str, encoding: str, tmp_path: Path) -> None:
    rows = [["Path", "Label"], ["ä/1.png", "Öl"], ['"b,;2.png"', "cat"]]
    suffix = ".tsv" if separator == "\t" else ".csv"
    file = tmp_path / f"list{suffix}"
    file.write_bytes("\r\n".join(map(separator.join, rows)).encode(encoding))
    source = open_data_source(file, labelled=True)
    assert [source.name(i) for i in range(2)] == ["ä/1.png", "b,;2.png"]
    assert source.classes == ("cat", "Öl")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0]


def test_paths_from_windows(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "1.png")
    picture(tmp_path / "a\\b.png")  # a name that has one keeps it
    (tmp_path / "list.csv").write_text("path\ncat\\1.png\na\\b.png\nnone\\2.png\n")
    paths = csv_source(tmp_path / "list.csv").paths
    assert [path.is_file() for path in paths] == [True, True, False]


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text('path,label\n\n"a\nb.png",0\nc.png,7\n')
    with pytest.raises(DataError, match=r"label 7 \(line 5 of .*list\.csv\)"):
        map_labels(csv_source(file), UNNAMED)
    file.write_text("path,label\na.png,0\n1,5.png,cat\n")
    with pytest.raises(DataError, match=r"line 3 of .* has 3 columns, and the first line names 2"):
        csv_source(file)
    file.write_bytes("path,label\nä.png,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not a CSV file in UTF-8"):
        csv_source(file)


# --classes FILE


def mapped(tmp_path: Path, content: str | bytes, model: ModelClasses, texts: str = "c a b") -> str:
    """Return the labels of texts under a file, or the error."""
    file = tmp_path / "classes"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        found = map_labels(column(texts.split()), model, read_mapping(file))
    except SimpruneError as error:
        return str(error)
    return " ".join(map(str, found.labels))


LIST = "b\nc\na\n"
OBJECT = json.dumps({"b": 0, "c": 1, "a": 2})


@pytest.mark.parametrize(
    "content",
    [
        LIST,
        codecs.BOM_UTF8 + LIST.encode(),
        codecs.BOM_UTF16_LE + LIST.replace("\n", "\r\n").encode("utf-16-le"),
        codecs.BOM_UTF16_BE + LIST.encode("utf-16-be"),
        OBJECT,
        codecs.BOM_UTF8 + OBJECT.encode(),
        codecs.BOM_UTF16_LE + OBJECT.encode("utf-16-le"),
        '["b", "c", "a"]',
        '{"b": 0.0, "c": 1.0, "a": 2.0}',
        '{"b": "0", "c": "1", "a": "2"}',
        '{"0": "b", "1": "c", "2": "a"}',
        '{"model_type": "vit", "id2label": {"0": "b", "1": "c", "2": "a"}, "depth": [1]}',
    ],
)
def test_files_of_classes(content: str | bytes, tmp_path: Path) -> None:
    assert mapped(tmp_path, content, UNNAMED) == "1 2 0"


def test_names_of_the_model_in_a_file(tmp_path: Path) -> None:
    model = named("x", "y", "z")
    assert mapped(tmp_path, '{"b": "X", "c": "y", "a": "z"}', model) == "1 2 0"
    # the data's names are numbers, and the file gives them the model's names
    assert mapped(tmp_path, '{"0": "z", "1": "y", "2": "x"}', model, "0 1 2.0") == "2 1 0"
    # brackets may begin a name
    assert mapped(tmp_path, "[b]\n[c]\n[a]\n", UNNAMED, "[c] [a]") == "1 2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": 0, "b": 1, "a": 2, "c": 1}', "names 'a' twice"),
        ("a\nb\na\n", "names a class twice, 'a'"),
        ('["a", "b", "a"]', "names a class twice, 'a'"),
        ('{"a": true, "b": 1, "c": 2}', "'a' is given neither a number nor a name"),
        ('{"a": 0.5, "b": 1, "c": 2}', "'a' is given neither a number nor a name"),
        ("name\na\nb\nc\n", "classes gives class 'c', which is number 3, and the model's classes"),
        ('{"a": -1, "b": 1, "c": 2}', "class 'a', number -1, (line 3 of list.csv) is outside"),
        ('{"a": "x", "b": 1, "c": 2}', "no names for its classes: give a number"),
        ('{"0": "x", "1": "y", "2": "z"}', "classes names no class for 'a', 'b', 'c': add them"),
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not a text file"),
        (b"\xe4\n", "is not a text file"),
        ("", "maps no classes: it is empty"),
    ],
)
def test_files_that_say_no_classes(content: str | bytes, words: str, tmp_path: Path) -> None:
    text = mapped(tmp_path, content, UNNAMED)
    assert words in text
    assert "\n" not in text


# Pictures


def test_a_folder_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no picture")
    source = folder_source(tmp_path)
    wanted = Preprocessing(1, 4, 4, (0.5,), (0.5,))
    data = DataSet(tmp_path, source, wanted, np.arange(2), None, (), (), max_unreadable=1.0)
    skipped: list[tuple[str, str]] = []
    assert list(data.batches(0, 2, 2, skipped)) == []
    words = r"none of the 2 pictures of .* can be used \(a/1.png: not a picture; "
    with pytest.raises(DataError, match=words):
        data.check_skipped(skipped)


def test_an_archive_says_its_place(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "b.npz").write_bytes(file.getvalue())
    assert Archive(tmp_path / "b.npz").place(1) == f"image 1 of {tmp_path / 'b.npz'}"
