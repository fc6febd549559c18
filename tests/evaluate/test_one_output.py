"""`verify --data` on models with one output: the side of the cut, the value, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_output import (
    LOW,
    labels,
    pictures,
    plain,
    pruned,
    write_checkpoint,
    write_data,
)
from PIL import Image
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.accuracy import (
    AccuracyLimits,
    compare,
    load_baseline,
    save_baseline,
)
from simprune_deploy.evaluate.classes import ModelClasses, map_labels
from simprune_deploy.evaluate.data_sources import Archive
from simprune_deploy.evaluate.predictions import Predictions

SOURCE = {"source": "pictures", "sha256": "0" * 64, "images": 0, "skipped": []}


def call(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def found(*arguments: object) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a check."""
    result = call("verify", *arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    result = call("verify", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return str(line)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pruned"
    sd.export(
        pruned(), folder, sd.ExportOptions(runtime_threshold=True, batch=(1, 32)), verify=False
    )
    return folder


def test_the_fixture_turns_decisions_and_no_output_is_close_to_zero() -> None:
    dense, pruned = plain(), plain(LOW)
    assert 0.8 < ((dense > 0) == (pruned > 0)).mean() < 0.95
    assert min(np.abs(dense).min(), np.abs(pruned).min()) > 1e-5  # what a runtime may be off by
    assert 0 < (dense > 0).sum() < len(dense)


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
@pytest.mark.parametrize("cut", [None, 0.3, -0.5])
def test_a_turned_decision_fails_and_the_numbers_are_numpys(
    kind: str, cut: float | None, data: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    edge = np.float32(cut or 0)
    asked = [] if cut is None else ["--cut", cut]
    limits = ("--min-agreement", "99%", "--max-drop", "1%")
    code, report = found(model, "--data", data, *limits, *asked)
    dense, pruned = plain(), plain(LOW)
    drop, agreement = report["checks"]
    assert (code, report["status"], agreement["status"]) == (1, "failed", "failed")
    same = (dense > edge) == (pruned > edge)
    assert agreement["found"]["estimate"] == same.mean() < 0.95
    assert f"same side of {edge:g} on {same.sum()} of {len(same)}" in agreement["summary"]
    right, was_right = ((each > edge) == labels() for each in (pruned, dense))
    assert report["accuracy"] == right.mean()
    assert report["reference_accuracy"] == was_right.mean()
    assert drop["found"]["estimate"] == pytest.approx(was_right.mean() - right.mean())
    assert report["cut"] == edge
    apart = np.abs(pruned.astype(float) - dense)
    assert report["moved"] == pytest.approx(
        {"mean": apart.mean(), "largest": apart.max(), "deviation": dense.astype(float).std()},
        rel=1e-4,
    )
    by_class = {each["name"]: each for each in report["classes"]}
    for name in ("0", "1"):
        chosen = labels() == int(name)
        assert by_class[name]["images"] == chosen.sum()
        assert by_class[name]["right"] == (right & chosen).sum()
        assert by_class[name]["dense_right"] == (was_right & chosen).sum()


def test_what_does_not_turn_passes(data: Path, tmp_path: Path) -> None:
    same = write_checkpoint(tmp_path, threshold=0.99)
    limits = ("--min-agreement", "90%", "--max-drop", "5%")
    code, report = found(same, "--data", data, *limits)
    assert (code, report["status"]) == (0, "passed")
    assert report["checks"][1]["found"]["estimate"] == ((plain() > 0) == (plain(0.99) > 0)).mean()


def test_people_read_the_value_too(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    files = ("--markdown", tmp_path / "a.md", "--junit", tmp_path / "a.xml")
    result = call("verify", checkpoint, "--data", data, "--min-agreement", "99%", *files)
    apart = np.abs(plain(LOW) - plain()) / plain().std()
    words = f"moved by {apart.mean():.3f} standard deviations on average, {apart.max():.3f} at most"
    assert words in result.stdout
    assert "the output above 0 is class 1, else class 0" in result.stdout
    assert words in (tmp_path / "a.md").read_text()


def test_a_stored_baseline_holds_values_and_any_cut(
    checkpoint: Path, exported: Path, data: Path, tmp_path: Path
) -> None:
    dense, stored = write_checkpoint(tmp_path, threshold=1.1), tmp_path / "stored.json"
    code, saved = found(dense, "--data", data, "--save-baseline", stored)
    assert (code, saved["saved_baseline"]) == (0, str(stored))
    values = json.loads(stored.read_text())["values"]
    np.testing.assert_allclose(values, plain(), atol=1e-5)
    for cut in (0, 0.4):
        asked = ("--data", data, "--baseline", stored, "--min-agreement", "99%", "--cut", cut)
        code, report = found(checkpoint, *asked)
        edge = np.float32(cut)
        share = ((plain() > edge) == (plain(LOW) > edge)).mean()
        assert (code, report["checks"][0]["found"]["estimate"]) == (1, share)
        assert report["moved"]["mean"] == pytest.approx(np.abs(plain(LOW) - plain()).mean(), 1e-4)


@pytest.mark.parametrize(
    "change", [{"values": [[0.5], [1]]}, {"values": ["x"]}, {"values": [float("nan")]}]
)
def test_a_damaged_baseline_of_values_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "baseline.json"
    values = np.array([0.5, -1], np.float32)
    stored = Predictions("m", {"num_classes": 1}, {"a.b": 1.0}, np.array([1, 0]), values, 0.0)
    save_baseline(path, stored, SOURCE)
    loaded = load_baseline(path, stored, SOURCE)
    assert loaded.values is not None
    assert (loaded.classes.tolist(), loaded.values.tolist()) == ([1, 0], [0.5, -1])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SimpruneError, match="no baseline of ours"):
        load_baseline(path, stored, SOURCE)


def single(values: list[float], cut: float = 0.0) -> Predictions:
    outputs = np.array(values, np.float32)
    return Predictions("m", {}, {}, (outputs > cut).astype(np.int64), outputs, cut)


def test_outputs_on_one_side_show_nothing_and_do_not_pass(data: Path, tmp_path: Path) -> None:
    ages, pruned_ages = single([21, 35, 60] * 300), single([60, 21, 35] * 300)
    agree = AccuracyLimits(min_agreement=0.99)
    with pytest.raises(SimpruneError, match=r"all 1,800 outputs are above 0, .* set cut between"):
        compare(pruned_ages, ages, None, agree, SOURCE)
    mixed = np.array([0, 1, 1] * 300)
    with pytest.raises(SimpruneError, match="classes say nothing"):
        compare(pruned_ages, ages, mixed, AccuracyLimits(max_drop=0.01), SOURCE)
    # labels that say so make it an answer, as does a model that leaves the side
    assert compare(pruned_ages, ages, np.ones(900, int), agree, SOURCE).passed
    low = single([60, 21, -3] * 300)
    assert compare(low, ages, None, agree, SOURCE).status == "failed"
    # a cut between them tells them apart
    cut = compare(
        single([60, 21, 35] * 300, 30), single([21, 35, 60] * 300, 30), None, agree, SOURCE
    )
    assert cut.checks[0].found.estimate == pytest.approx(1 / 3)
    checkpoint = write_checkpoint(tmp_path)
    line = refusal(checkpoint, "--data", data, "--min-agreement", "99%", "--cut", -100)
    assert "all 480 outputs are above -100" in line
    assert "set --cut between them" in line


def test_a_cut_is_for_one_output(checkpoint: Path, data: Path) -> None:
    demo = Path(__file__).parents[2] / "examples" / "fashion_mnist"
    asked = ("--data", demo / "test_slice.npz", "--limit", 20, "--save-baseline", "none.json")
    line = refusal(demo / "vit", *asked, "--cut", 0.5)
    assert "--cut 0.5 is for models with one output, and this one gives 10 classes" in line
    for bad in ("nan", "inf", "1e39"):
        line = refusal(checkpoint, "--data", data, "--min-agreement", "99%", "--cut", bad)
        assert "--cut" in line
        assert "-3.4e+38 and 3.4e+38" in line
    assert "--cut belongs to --data" in refusal(checkpoint, "--cut", 1)


def test_two_folders_are_the_two_sides(checkpoint: Path, tmp_path: Path) -> None:
    for name, number in (("cat", 0), ("dog", 1)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in np.flatnonzero(labels() == number):
            Image.fromarray(pictures()[index]).save(tmp_path / "pets" / name / f"{index:03}.png")
    asked = ("--data", tmp_path / "pets", "--max-drop", "1%")
    _, report = found(checkpoint, *asked)
    assert report["accuracy"] == ((plain(LOW) > 0) == labels()).mean()
    assert any(
        "cat at or below the cut" in note and "dog above" in note for note in report["notes"]
    )
    mapping = tmp_path / "mapping.txt"
    mapping.write_text("dog\ncat\n")
    _, report = found(checkpoint, *asked, "--classes", mapping)
    assert report["accuracy"] == pytest.approx(1 - ((plain(LOW) > 0) == labels()).mean())


def test_labels_that_are_no_two_classes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (np.arange(len(labels())) % 3, r"3 different values, .*\(regression\)"),
        (labels() * 7, "label 7 .* is outside 0 to 1"),
        (labels() / 2, "whole number"),
    ):
        data = write_data(tmp_path, labels=wrong)
        assert re.search(said, refusal(checkpoint, "--data", data, "--max-drop", "1%"))


def archive(tmp_path: Path, classes: tuple[str, ...]) -> Archive:
    """The classes as a list of their own, and a picture of each of the first two."""
    count = min(2, len(classes))
    images = np.zeros((count, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(count), classes=np.array(classes))
    return Archive(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("classes", "names", "wanted", "shown"),
    [
        (("a", "b"), None, [0, 1], ("a", "b")),
        (("0", "1"), None, [0, 1], ("0", "1")),
        (("0.0", "1.0"), None, [0, 1], ("0.0", "1.0")),
        (("3", "7"), None, [0, 1], ("3", "7")),
        (("defect", "good"), ["Defect"], [1, 0], ("good", "Defect")),
        (("0", "1"), ["Defect"], [0, 1], ("0", "1")),
    ],
)
def test_names_of_the_sides(
    tmp_path: Path,
    classes: tuple[str, ...],
    names: list[str] | None,
    wanted: list[int],
    shown: tuple[str, ...],
) -> None:
    found = map_labels(archive(tmp_path, classes), ModelClasses(1, names and tuple(names)))
    assert (found.labels.tolist(), found.classes) == (wanted, shown)


@pytest.mark.parametrize(
    ("classes", "names", "said"),
    [
        (("a", "b", "c"), None, "3 classes"),
        (("a",), None, "1 classes"),
        (("0.25", "1.5"), None, "regression"),
        (("a", "b"), ["defect"], "output is 'defect'"),
    ],
)
def test_names_that_are_no_two_sides(
    tmp_path: Path, classes: tuple[str, ...], names: list[str] | None, said: str
) -> None:
    with pytest.raises(SimpruneError, match=said):
        map_labels(archive(tmp_path, classes), ModelClasses(1, names and tuple(names)))
