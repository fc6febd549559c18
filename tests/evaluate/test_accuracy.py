"""The accuracy check for CI: `verify --data`, its baselines, JUnit XML and Markdown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from cli import cli
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.accuracy import (
    AccuracyLimits,
    AccuracyReport,
    compare,
    load_baseline,
    same_weights,
    save_baseline,
)
from simprune_deploy.evaluate.predictions import Predictions
from simprune_deploy.evaluate.statistics import paired_drop, share
from simprune_deploy.onnx.metadata import load_graph
from simprune_deploy.onnx.variants import without_function
from simprune_deploy.predict import engine_files
from simprune_deploy.predict.onnx_predictor import OnnxPredictor
from simprune_deploy.predict.predictor import RuntimeInfo
from simprune_deploy.predict.source import source_of_export
from simprune_deploy.reports.accuracy import to_junit, to_markdown

DEMO = ROOT / "examples" / "fashion_mnist"
DATA = DEMO / "test_slice.npz"
HOSTILE = 'a <b>&"]]>|\x00\x1b[31m`\ud800 b'
SOURCE = {"source": "pictures", "sha256": "0" * 64, "images": 0, "skipped": []}


def answers(winners: Any, title: str = "model", **weights: float) -> Predictions:
    return Predictions(title, {"architecture": "vit"}, {"a.bias": 1.0} | weights, np.array(winners))


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})


def refusal(*arguments: object) -> str:
    """The one line with which a call is refused."""
    result = call("verify", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line)


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(2, 4), st.randoms(use_true_random=False))
def test_counts_are_those_of_the_images(n: int, classes: int, random: Any) -> None:
    mine, theirs, labels = ([random.randrange(classes) for _ in range(n)] for _ in range(3))
    report = compare(
        answers(mine),
        answers(theirs),
        np.array(labels),
        AccuracyLimits(0.01, 0.99),
        SOURCE,
        ("x", "y"),
    )
    right = [a == c for a, c in zip(mine, labels, strict=True)]
    was = [b == c for b, c in zip(theirs, labels, strict=True)]
    lost = sum(w and not r for r, w in zip(right, was, strict=True))
    won = sum(r and not w for r, w in zip(right, was, strict=True))
    drop, agreement = report.checks
    assert drop.found == paired_drop(lost, won, n)
    assert drop.found.estimate == pytest.approx((sum(was) - sum(right)) / n)
    assert agreement.found == share(sum(a == b for a, b in zip(mine, theirs, strict=True)), n)
    assert report.accuracy == sum(right) / n
    assert sum(each.images for each in report.classes) == n
    assert sum(each.right for each in report.classes) == sum(right)
    assert sum(each.dense_right for each in report.classes) == sum(was)


def verdict(lost: int, images: int, limits: AccuracyLimits) -> str:
    """The status of a comparison in which `lost` images are wrong that were right."""
    labels = np.zeros(images, np.int64)
    mine = labels.copy()
    mine[:lost] = 1
    return compare(answers(mine), answers(labels), labels, limits, SOURCE).status


def test_few_images_show_nothing_and_do_not_pass() -> None:
    half = AccuracyLimits(max_drop=0.005)
    assert verdict(0, 765, half) == "passed"  # the interval ends at 0.4996 %
    assert verdict(0, 764, half) == "too few images"
    assert verdict(1, 100, half) == "failed"  # 1 % lost is lost, however few
    assert verdict(5, 1000, half) == "passed"  # 0.5 %, measured; the interval reaches further
    assert verdict(5, 1000, dataclasses.replace(half, sure=True)) == "failed"
    assert verdict(0, 1000, dataclasses.replace(half, sure=True)) == "passed"
    assert verdict(6, 1000, half) == "failed"
    agree = AccuracyLimits(min_agreement=0.99)
    assert verdict(0, 381, agree) == "passed"
    assert verdict(0, 380, agree) == "too few images"
    assert verdict(11, 1000, agree) == "failed"
    # one check that passes does not cover another that cannot be answered
    assert verdict(0, 500, AccuracyLimits(0.005, 0.99)) == "too few images"


def test_limits_are_shares() -> None:
    for bad in ({}, {"max_drop": 0.0}, {"max_drop": 1.0}, {"min_agreement": 1.5}):
        with pytest.raises(SimpruneError):
            AccuracyLimits(**bad)
    with pytest.raises(SimpruneError, match="needs labels"):
        compare(answers([0]), answers([0]), None, AccuracyLimits(0.01), SOURCE)


def test_a_baseline_comes_back_and_fits_only_its_model_and_data(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    stored = answers([3, 1, 2], title="last week's")
    save_baseline(path, stored, SOURCE)
    loaded = load_baseline(path, stored, SOURCE)
    assert loaded.classes.tolist() == [3, 1, 2]
    assert loaded.title == "last week's"
    with pytest.raises(SimpruneError, match="of other images"):
        load_baseline(path, stored, {**SOURCE, "sha256": "1" * 64})
    other = dataclasses.replace(stored, identity={"architecture": "deit"})
    with pytest.raises(SimpruneError, match=r"another model .*architecture differ"):
        load_baseline(path, other, SOURCE)
    retrained = answers([3, 1, 2], **{"a.bias": 1.01})
    with pytest.raises(SimpruneError, match=r"other weights .*retrained=True"):
        load_baseline(path, retrained, SOURCE)
    assert load_baseline(path, retrained, SOURCE, retrained=True).title == "last week's"
    with pytest.raises(SimpruneError, match="3 answers, and 2 images"):
        load_baseline(path, answers([3, 1]), SOURCE)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "something"},
        {"format": 99},
        {"winners": [[1], [2]]},
        {"winners": [1.5, 2, 3]},
        {"winners": ["a"]},
        {"winners": [1 << 70]},
        {"weights": [1]},
        {"model": 3},
        {"data": None},
    ],
)
def test_a_damaged_baseline_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "baseline.json"
    save_baseline(path, answers([3, 1, 2]), SOURCE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SimpruneError, match=r"no baseline of ours|format 99"):
        load_baseline(path, answers([3, 1, 2]), SOURCE)
    path.write_text("[]")
    with pytest.raises(SimpruneError, match="no baseline of ours"):
        load_baseline(path, answers([3, 1, 2]), SOURCE)
    with pytest.raises(SimpruneError, match="does not exist"):
        load_baseline(tmp_path / "none.json", answers([3]), SOURCE)


def hostile_report() -> AccuracyReport:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    mine = labels.copy()
    mine[:9] ^= 1
    data = {**SOURCE, "source": HOSTILE, "images": 50, "skipped": [[HOSTILE, HOSTILE]]}
    return compare(answers(mine, HOSTILE), answers(labels, HOSTILE), labels,
                   AccuracyLimits(0.05, 0.9), data, (HOSTILE, "|`x"), (HOSTILE,))  # fmt: skip


JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": ({"name"}, {"time", "classname"}, {"skipped", "error", "failure", "system-out"}),
    "failure": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}
"""What Jenkins' junit-10.xsd allows: attributes needed, attributes allowed, elements allowed."""


def test_junit_is_what_ci_servers_read() -> None:
    root = ElementTree.fromstring(to_junit(hostile_report()))
    for element in root.iter():
        needed, allowed, inner = JUNIT[element.tag]
        assert needed <= element.attrib.keys() <= needed | allowed
        assert {child.tag for child in element} <= inner
    assert root.tag == "testsuite"
    cases = root.findall("testcase")
    assert [case.get("name") for case in cases] == ["accuracy drop", "agreement"]
    assert [len(case.findall("failure")) for case in cases] == [1, 1]
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "2", "0")
    passed = compare(answers([0] * 999), answers([0] * 999), None,
                     AccuracyLimits(min_agreement=0.99), {**SOURCE, "images": 999})  # fmt: skip
    root = ElementTree.fromstring(to_junit(passed))
    assert (root.get("tests"), root.get("failures")) == ("1", "0")
    assert root.findall(".//failure") == []


def test_markdown_shows_untrusted_names_as_text() -> None:
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(to_markdown(hostile_report()).encode("utf-8", "replace").decode())
    )
    assert html.startswith("<h3>Accuracy check: failed</h3>")
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert html.count("<table>") == 2
    assert "<td>|`x</td>" in html


def test_weights_are_known_again_in_other_precisions() -> None:
    assert same_weights({"a.b": 1.0, "x": 5.0}, {"a.b": 1.0006})
    assert not same_weights({"a.b": 1.0}, {"a.b": 1.01})
    assert not same_weights({"a.b": 1.0}, {"c.d": 1.0})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "pruned"
    pruned = sd.prune(sd.load(DEMO / "vit"), threshold=0.9, layers=[1, 3, 4])
    sd.export(pruned, folder, sd.ExportOptions(runtime_threshold=True, batch=(1, 32)), verify=False)
    return folder


@pytest.fixture(scope="module")
def first(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo against its dense self on 120 images, everything written."""
    folder = tmp_path_factory.mktemp("check")
    result = call("verify", exported, "--data", DATA, "--limit", 120, "--max-drop", "4%",
                  "--min-agreement", "0.9", "--junit", folder / "j.xml", "--markdown",
                  folder / "m.md", "--save-baseline", folder / "base.json", "--json")  # fmt: skip
    return result, folder


def test_the_demo_against_its_dense_self(first: Any, exported: Path) -> None:
    result, folder = first
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["status"] == "passed"
    # the numbers again, by hand, in PyTorch
    import torch

    with np.load(DATA) as data:
        taken = np.arange(120) * 3000 // 120
        grey, labels = data["images"][taken], data["labels"][taken]
    pixels = torch.from_numpy((grey[:, None].astype(np.float32) / 255 - 0.286) / 0.353)
    vit = sd.load(DEMO / "vit")
    with torch.inference_mode():
        dense = vit(pixels).argmax(1).numpy()
        pruned = sd.prune(vit, threshold=0.9, layers=[1, 3, 4]).eval()(pixels).argmax(1).numpy()
    assert values["accuracy"] == pytest.approx((pruned == labels).mean(), abs=1.01 / 120)
    assert values["reference_accuracy"] == pytest.approx((dense == labels).mean(), abs=1.01 / 120)
    agreement = values["checks"][1]["found"]["estimate"]
    assert agreement == pytest.approx((pruned == dense).mean(), abs=1.01 / 120)
    assert values["data"]["images"] == 120
    assert ElementTree.parse(folder / "j.xml").getroot().get("failures") == "0"
    assert "Accuracy check: passed" in (folder / "m.md").read_text()
    stored = json.loads((folder / "base.json").read_text())
    assert (np.array(stored["winners"]) == pruned).mean() > 0.995


def test_a_file_that_leaves_the_operator_to_a_plugin(exported: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "model-plugin.onnx"
    graph = without_function(load_graph(exported / "model.onnx"))
    stripped.write_bytes(graph.SerializeToString())
    ask = ("--data", DATA, "--limit", 20, "--min-agreement", "0.1", "--json")
    found = []
    for path in (stripped, exported):
        result = call("verify", path, *ask)
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    assert found[0]["checks"] == found[1]["checks"]
    assert "function put back" in found[0]["candidate"]
    assert "function put back" not in found[1]["candidate"]


def test_the_stored_baseline_is_compared_with(first: Any, exported: Path) -> None:
    _, folder = first
    base = folder / "base.json"
    common = (exported, "--data", DATA, "--baseline", base)
    again = call("verify", *common, "--limit", 120, "--min-agreement", "95%")
    assert again.exit_code == 0, again.output
    assert "same class on 120 of 120 images (100.00%)" in again.stdout
    assert "of other images" in refusal(*common, "--limit", 40, "--min-agreement", "95%")
    # the same model in PyTorch has the same weights; retrained ones are others
    checkpoint = call("verify", DEMO / "vit", "--data", DATA, "--limit", 120, "--baseline", base,
                      "--max-drop", "9%", "--save-baseline", base)  # fmt: skip
    assert (checkpoint.exit_code, "--force" in checkpoint.stderr) == (2, True)
    checkpoint = call("verify", DEMO / "vit", "--data", DATA, "--limit", 120, "--baseline", base,
                      "--max-drop", "9%")  # fmt: skip
    assert checkpoint.exit_code == 0, checkpoint.output
    values = json.loads(base.read_text())
    values["weights"]["pos_embed"] *= 1.1
    base.write_text(json.dumps(values))
    assert "--retrained" in refusal(*common, "--limit", 120, "--min-agreement", "95%")


def test_onnx_against_pytorch_as_pruned_and_dense(exported: Path) -> None:
    common = ("verify", exported, "--data", DATA, "--limit", 60, "--reference", DEMO / "vit",
              "--min-agreement", "90%", "--json")  # fmt: skip
    pruned = json.loads(call(*common, "--against", "pruned").stdout)
    assert pruned["checks"][0]["found"]["estimate"] >= 59 / 60
    assert "pruned at 0.9 (PyTorch" in pruned["reference"]
    assert "dense (PyTorch" in json.loads(call(*common).stdout)["reference"]


def test_an_engine_is_asked_in_place_of_the_graph(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: ONNX Runtime stands in the engine's place; the way to it is tested."""
    source = source_of_export(exported)

    class Double(OnnxPredictor):
        def __init__(self, spec: Any) -> None:
            super().__init__(spec)
            details = {"engine": {"file": "an.engine"}}
            self.runtime = RuntimeInfo("TensorRT on a double", "10", "none", details=details)

    class Spec:
        def open(self) -> Any:
            return Double(source.spec())

    monkeypatch.setattr(engine_files, "shipped_engine", lambda *given: (Spec(), source))
    result = call("verify", exported, "--engine", "--data", DATA, "--limit", 40,
                  "--min-agreement", "80%", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert "TensorRT on a double" in values["candidate"]
    assert "without its pruning" in values["reference"]


def test_a_check_that_fails_or_cannot_tell_has_exit_code_1(exported: Path, tmp_path: Path) -> None:
    base, junit = tmp_path / "base.json", tmp_path / "j.xml"
    few = call("verify", exported, "--data", DATA, "--limit", 30, "--max-drop", "10%",
               "--save-baseline", base, "--junit", junit)  # fmt: skip
    assert few.exit_code == 1
    assert "accuracy check: too few images" in few.stdout
    assert "take 35 or more" in " ".join(few.stdout.split())
    assert "the baseline was not saved" in few.stdout
    assert not base.exists()
    assert ElementTree.parse(junit).getroot().get("failures") == "1"


def test_what_cannot_be_checked_is_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    data = ("--data", DATA)
    agree = (*data, "--min-agreement", "99%")
    assert "--max-drop belongs to --data" in refusal(exported, "--max-drop", "1%")
    assert "--max-unreadable belongs to --data" in refusal(exported, "--max-unreadable", "2%")
    assert "say what is let pass" in refusal(exported, *data)
    assert "'half' is not a share" in refusal(exported, *data, "--max-drop", "half")
    assert "--max-drop 150% must lie" in refusal(exported, *data, "--max-drop", "150%")
    assert "give one" in refusal(exported, *agree, "--baseline", "b", "--reference", "r")
    assert "give one" in refusal(exported, *agree, "--against", "pruned")
    assert "'all' is not one of" in cli("verify", exported, *agree, "--against", "all").line
    assert "drop one" in refusal(exported, *agree, "--images", tmp_path)
    assert "is no folder" in refusal(exported, *agree, "--junit", tmp_path / "no" / "j.xml")
    assert "needs a limit" in refusal(
        exported, *data, "--save-baseline", tmp_path / "b.json", "--junit", tmp_path / "j.xml"
    )
    assert "does not exist" in refusal(tmp_path / "none", *agree)
    assert "prunes nothing" in refusal(DEMO / "vit", *agree)
    assert "needs labels" in refusal(
        exported, *data, "--no-labels", "--max-drop", "1%", "--limit", 2
    )
    assert list(tmp_path.iterdir()) == []
