"""``tune --flops`` and ``export --flops``: calibrated thresholds, as a user calls for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cli import cli
from places import ROOT

import simprune_deploy as sd
from simprune_deploy.deploy.calibrated import at_wish
from simprune_deploy.deploy.export import ExportRequest
from simprune_deploy.onnx.dense import dense
from simprune_deploy.onnx.metadata import read_metadata
from simprune_deploy.onnx.variants import prune_nodes
from simprune_deploy.parity.graph_check import check_graph
from simprune_deploy.pruning.calibrated_curve import CalibratedCurve
from simprune_deploy.tuning import calibrating

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a calibrated configuration."""
    file = tmp_path_factory.mktemp("calibrated") / "calibrated.json"
    called = cli(
        *("tune", MODEL, "--data", IMAGES, "--limit", 16, "--flops", "60%", "--features", "tokens"),
        *("--layers", "1,2,3,4", "--timing", 0, "-o", file),
    )
    assert called.code == 0, called.err
    assert "60% of the blocks' FLOPs" in called.out
    assert f"export {MODEL} --config {file}" in called.out
    return file


def test_the_configuration_is_exported_and_one_number_moves_along_its_curve(
    tuned: Path, tmp_path: Path
) -> None:
    found = json.loads(tuned.read_text())
    assert found["found"]["held_out"]["images"] == 8
    assert found["timed"] is None
    assert len(found["calibration"]["size_hints"]) == 4
    folder = tmp_path / "out"
    called = cli("export", MODEL, "--config", tuned, "--runtime-threshold", "-o", folder, "--json")
    assert called.code == 0, called.err
    answer = json.loads(called.out)
    assert answer["verdict"]["status"] == "passed"
    pruning = answer["manifest"]["model"]["pruning"]
    assert (pruning["threshold"], pruning["place"]) == (0.6, "inside")
    assert pruning["curve"] == found["pruning"]["curve"]

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    with np.load(IMAGES) as data:
        images = data["images"][:3, None].astype(np.float32) / 255

    def run(*thresholds: float) -> np.ndarray:
        feed = {"images": images, "threshold": np.array(thresholds, np.float32)}
        return np.asarray(session.run(None, feed)[0])

    one = run(0.6)
    np.testing.assert_allclose(run(0.6, 0.6, 0.6), one, atol=1e-4)
    each = run(0.6, 1.0, 0.8)
    np.testing.assert_allclose(each[0], one[0], atol=1e-4)
    np.testing.assert_allclose(each[1], run(2.0)[1], atol=1e-4)
    assert np.abs(each[1] - one[1]).max() > 1e-3

    unpruned = dense(onnx.load(folder / "model.onnx")).SerializeToString()
    (plain,) = onnxruntime.InferenceSession(unpruned).run(None, {"images": images})
    np.testing.assert_allclose(plain, run(1.0), atol=1e-4)

    assert "curve calibrated for 40%, 50%" in " ".join(cli("inspect", folder).out.split())
    inspected = json.loads(cli("inspect", folder, "--json").out)
    assert inspected["pruning"]["curve"] == pruning["curve"]
    again = cli("export", MODEL, "--config", tuned, "--flops", "0.7", "-o", tmp_path / "at70")
    assert again.code == 0, again.err
    manifest = json.loads((tmp_path / "at70" / "manifest.json").read_text())
    assert manifest["model"]["pruning"]["threshold"] == 0.7


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_thresholds_stay_float32_in_16_bits(tuned: Path, tmp_path: Path, precision: str) -> None:
    called = cli(
        *("export", MODEL, "--config", tuned, "--runtime-threshold", "--batch", 2),
        *("--precision", precision, "-o", tmp_path / "out"),
    )
    assert called.code == 0, called.out + called.err


def test_one_command_calibrates_and_exports(tmp_path: Path) -> None:
    called = cli(
        *("export", MODEL, "--flops", "65%", "--features", "keys", "--layers", "1,2,3,4"),
        *("-o", tmp_path / "out"),
    )
    assert called.code == 0, called.out + called.err
    assert "calibrated: keys inside blocks" in called.out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["calibration"]["calibration"]["flops"]["1"] == pytest.approx(0.65, abs=0.02)
    assert manifest["calibration"]["held_out"] is None  # eight photographs come along


def test_fixed_counts_are_those_of_the_curve(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "of-config"
    called = cli(
        *("export", MODEL, "--config", tuned, "--tokens", "fixed", "--flops", "70%"),
        *("--no-verify", "--batch", 1, "-o", folder),
    )
    assert called.code == 0, called.out + called.err
    graph = onnx.load(folder / "model.onnx")
    config = read_metadata(graph).pruning
    curve = CalibratedCurve.from_dict(json.loads(tuned.read_text())["pruning"]["curve"])
    assert config.capacities == curve.counts(0.7, 196)
    assert check_graph(graph, read_metadata(graph)).passed
    # it holds each layer's threshold to that of an image with all its patches
    constant = next(
        each for each in graph.graph.initializer if each.name == prune_nodes(graph)[1].input[3]
    )
    limit = onnx.numpy_helper.to_array(constant)
    np.testing.assert_allclose(limit, 1 - curve.at(0.7).layers[1], rtol=1e-6)
    constant.CopyFrom(onnx.numpy_helper.from_array(limit + np.float32(1e-5), constant.name))
    assert not check_graph(graph, read_metadata(graph)).passed

    folder = tmp_path / "of-flops"
    called = cli(
        *("export", MODEL, "--flops", "80%", "--features", "tokens", "--layers", "2,3"),
        *("--img-size", 20, "--tokens", "fixed", "--batch", 2, "-o", folder),
    )
    assert called.code == 0, called.out + called.err
    config = read_metadata(onnx.load(folder / "model.onnx")).pruning
    assert config.curve is not None
    assert config.capacities == config.curve.counts(0.8, 100)
    assert config.capacities[-1] < 100


def test_counts_of_a_curve_move_along_it_and_counts_of_the_users_stay(tuned: Path) -> None:
    pruning = json.loads(tuned.read_text())["pruning"]
    curve = CalibratedCurve.from_dict(pruning["curve"])
    where = {"layers": pruning["layers"], "place": "inside", "curve": curve, "threshold": 0.6}
    at60, at70 = (curve.counts(share, 196) for share in (0.6, 0.7))
    model = sd.load(MODEL)
    for counts, flops, wanted in (
        (at60, 0.7, at70),
        (at60, None, at60),
        ((170, 140, 120, 100), 0.7, (170, 140, 120, 100)),
    ):
        pruned = sd.prune(model, tokens=list(counts), **where)
        moved = at_wish(ExportRequest(model=pruned, flops=flops), pruned).config
        assert (moved.capacities, moved.threshold) == (wanted, flops or 0.6)


def test_batches_at_another_image_size(tmp_path: Path) -> None:
    file = tmp_path / "batches.json"
    called = cli(
        *("tune", MODEL, "--data", IMAGES, "--limit", 16, "--flops", "60%", "--batch", 8),
        *("--img-size", 20, "--features", "tokens", "--layers", "1,2,3", "--timing", 0),
        *("--layer-cost", "1%", "-o", file),
    )
    assert called.code == 0, called.err
    assert "60% of the blocks' FLOPs in batches of 8, padded" in called.out
    assert f"export {MODEL} --img-size 20 --config {file}" in called.out
    values = json.loads(file.read_text())
    assert values["model"]["image_size"] == [20, 20]
    found, curve = values["found"], CalibratedCurve.from_dict(values["pruning"]["curve"])
    assert found["batch"] == 8
    assert found["calibration"]["flops"]["8"] == pytest.approx(0.6, abs=0.02)
    assert found["rejected_loss"] >= 0
    assert values["pruning"]["tokens"] in ("dynamic", list(curve.counts(0.6, 100)))


def test_what_a_layer_costs_reaches_calibration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[float] = []

    def stands_in(*_: object, layer_cost: float | None, **__: object) -> None:
        given.append(layer_cost)
        raise sd.InvalidArgumentError("enough")

    monkeypatch.setattr(calibrating, "calibrate", stands_in)
    base = ("tune", MODEL, "--data", IMAGES, "--limit", 8, "--flops", "60%", "-o", tmp_path / "x")
    for options in ((), ("--layer-cost", "0.5%")):
        assert "enough" in cli(*base, *options).line
    assert given == [None, 0.005]


def test_mistakes_are_one_line(tuned: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        return cli(*arguments, "-o", tmp_path / "out").line

    export, tune = ("export", MODEL), ("tune", MODEL, "--data", IMAGES)
    for share in ("0", "100%", "130%", "-0.5", "nan"):
        assert "outside (0, 1)" in refused(*export, f"--flops={share}")
        assert "outside (0, 1)" in refused(*tune, f"--flops={share}")
    assert "is not a share" in refused(*export, "--flops", "much")
    both = refused(*export, "--flops", "60%", "--threshold", "0.8")
    assert "drop one" in both
    curve = refused(*export, "--config", tuned, "--threshold", "0.8")
    assert "choose a point of its curve with --flops" in curve
    layers = refused(*export, "--config", tuned, "--layers", "2,3")
    assert "calibrated with --layers 1,2,3,4" in layers
    assert "below 0." in refused(*export, "--config", tuned, "--flops", "10%")
    assert "cannot be reached" in refused(*tune, "--limit", 8, "--flops", "5%")
    assert "too few" in refused(*tune, "--limit", 3, "--flops", "60%")
    assert "drop --selection" in refused(*tune, "--flops", "60%", "--selection", "redundancy")
    assert "a wish of its own" in refused(*tune, "--flops", "60%", "--min-speedup", 2)
    assert "drop --tokens" in refused(*export, "--flops", "60%", "--tokens", "60")
    assert "add --flops 60%" in refused(*export, "--tokens", "fixed")
    assert "--layer-cost 50% is outside [0, 0.1)" in refused(
        *tune, "--flops", "60%", "--layer-cost", "50%"
    )
    assert "--batch 0 must be 1 or more" in refused(*tune, "--flops", "60%", "--batch", 0)
    assert "'maybe' is not one of 'dynamic', 'fixed'" in refused(
        *tune, "--flops", "60%", "--tokens", "maybe"
    )
    for option, value in (("--layer-cost", "0.5%"), ("--tokens", "fixed")):
        wrong = refused(*tune, "--max-drop", "4%", option, value)
        assert f"{option} is for --flops: add it, or drop {option}" in wrong
    damaged = tmp_path / "damaged.json"
    values = json.loads(tuned.read_text())
    values["pruning"]["curve"]["shares"] = [0.7, 0.6]
    damaged.write_text(json.dumps(values))
    assert "calibrated shares" in refused(*export, "--config", damaged)
