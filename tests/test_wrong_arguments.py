"""What a caller in Python gets wrong: one line, in the words of the function that was called."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plugin_build import ROOT

import simprune_deploy as sd

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
DATA = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"


@pytest.fixture(scope="module")
def vit() -> Any:
    return sd.load(MODEL)


WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (sd.BenchRequest, {"model": "m", "batch": "1"}, "batch '1' is no whole number: give one, 1 or"),
    (sd.BenchRequest, {"model": "m", "thresholds": 0.9}, r"thresholds 0\.9 is no list: give "),
    (sd.BenchRequest, {"model": "m", "iterations": 1.5}, r"iterations 1\.5 is no whole number"),
    (
        sd.BuildRequest,
        {"folder": "f", "plugin": "x", "use_plugin": False},
        "^use_plugin=False and plugin contradict",
    ),
    (sd.EngineOptions, {"batch": "1..8"}, r"batch 1\.\.8 is not a range: give batch=\(1, 8\)"),
    (sd.EngineOptions, {"opt_batch": 0}, "opt_batch 0 must be 1 or more"),
    (sd.ExportOptions, {"batch": (1.5, 2)}, r"batch \(1\.5, 2\) is not a range"),
    (sd.ExportOptions, {"batch": (8, 1)}, r"batch 8\.\.1 is not a range"),
    (sd.ExportOptions, {"opset": "20"}, "opset '20' is no whole number"),
    (sd.SweepRequest, {"model": "m", "data": "d", "limit": -3}, "limit -3 must be 1 or more"),
    (sd.SweepRequest, {"model": "m", "data": "d", "limit": "40"}, "limit '40' is no whole number"),
    (sd.SweepRequest, {"model": "m", "data": "d", "thresholds": []}, "must hold 1 or more"),
    (sd.SweepRequest, {"model": "m", "data": "d", "thresholds": "0.9"}, "threshold '0.9' is not a"),
    (sd.SweepRequest, {"model": "m"}, "give data"),
    (
        sd.SweepRequest,
        {"model": "m", "data": "d", "max_unreadable": "1%"},
        r"must be a share: max_unreadable=0\.01",
    ),
    (
        sd.AccuracyRequest,
        {"model": "m", "data": "d", "max_drop": 0.1, "class_order": "text"},
        "class_order 'text' is unknown: use timm or torchvision",
    ),
    (sd.TuneRequest, {"model": "m", "data": "d"}, r"give one wish: flops=0\.6, max_drop=0\.005, "),
    (
        sd.TuneRequest,
        {"model": "m", "data": "d", "max_drop": 0.0},
        r"max_drop=0\.0 must lie between 0 and 1, ends excluded: give one such as max_drop=0\.005",
    ),
    (
        sd.TuneRequest,
        {"model": "m", "data": "d", "target_latency": "8ms"},
        "target_latency '8ms' is no number above 0",
    ),
    (sd.AccuracyRequest, {"model": "m", "data": "d", "max_drop": "5%"}, "max_drop '5%' is no num"),
    (sd.AccuracyRequest, {"model": "m", "data": "d", "max_drop": 5}, r"max_drop=5\.0 must lie bet"),
]


@pytest.mark.parametrize(("call", "fields", "words"), WRONG)
def test_a_request_checks_its_values_when_it_is_made(
    call: Callable[..., Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(sd.InvalidArgumentError, match=words):
        call(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": "20"}, "tokens '20': give whole numbers"),
        ({"tokens": [20, 1.5]}, "tokens .*: give whole numbers"),
        ({"threshold": "0.9"}, r"threshold '0\.9' is not a number"),
        ({"layers": 3}, "layers 3: give whole numbers"),
        ({"layers": ["3"]}, r"layers \['3'\]: give whole numbers"),
    ],
)
def test_prune_says_what_a_value_must_be(vit: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(sd.InvalidArgumentError, match=words):
        sd.prune(vit, **fields)


@pytest.mark.parametrize("model", ["path.pt", None, 3])
def test_no_model_at_all_is_told_from_one_that_cannot_be_pruned(model: Any, tmp_path: Path) -> None:
    with pytest.raises(sd.InvalidArgumentError, match="is no model: give a timm ViT"):
        sd.prune(model)
    if model != "path.pt":
        with pytest.raises(sd.InvalidArgumentError, match="is no model: give a timm ViT"):
            sd.export(model, tmp_path / "out")
    import timm

    with pytest.raises(sd.UnsupportedModelError, match="resnet18 cannot be pruned"):
        sd.prune(timm.create_model("resnet18"))


def test_save_says_that_it_wants_a_pruned_model(vit: Any, tmp_path: Path) -> None:
    with pytest.raises(sd.InvalidArgumentError, match="save writes pruned models: prune it first"):
        sd.save(vit, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_options_of_an_export_are_no_dictionary(tmp_path: Path) -> None:
    with pytest.raises(sd.InvalidArgumentError, match="must be ExportOptions"):
        sd.export(MODEL, tmp_path / "out", options={})


def test_one_batch_size_is_a_range(deciding_demo: Path) -> None:
    assert sd.ExportOptions(batch=4).batch == (4, 4)  # type: ignore[arg-type]
    assert sd.ExportOptions(batch=np.int64(4)).batch == (4, 4)  # type: ignore[arg-type]


def test_one_set_of_a_sweep_may_be_given_as_it_is(tmp_path: Path) -> None:
    from simprune_deploy.tuning.grid import Grid

    one = Grid(0.9, [1, 3, 4], "pairs", "drop", 10)  # type: ignore[arg-type]
    several = Grid((0.9,), ((1, 3, 4),), ("pairs",), ("drop",), (10,))
    assert one.settings(6, 49) == several.settings(6, 49)
    auto = Grid((0.9,), "auto")
    assert auto.settings(12, 196) == Grid((0.9,), ("auto",)).settings(12, 196)
    assert len(Grid((0.9,), ((1, 3), (2,))).settings(6, 49)) == 2


def test_a_reference_may_be_a_model_or_a_path(deciding_demo: Path, vit: Any) -> None:
    assert sd.verify(deciding_demo, reference=vit).status == "passed"
    common = {"data": DATA, "limit": 40, "min_agreement": 0.5}
    of_path, of_model = (
        sd.check_accuracy(deciding_demo, reference=each, **common).report for each in (MODEL, vit)
    )
    assert of_path is not None
    assert of_model is not None
    path_checks, model_checks = (each.to_dict()["checks"] for each in (of_path, of_model))
    assert path_checks == model_checks
    itself = sd.check_accuracy(sd.prune(vit, threshold=2.0), **common).report
    assert itself is not None
    assert itself.passed


def test_what_belongs_to_engines_is_not_dropped(deciding_demo: Path, vit: Any) -> None:
    common = {"data": DATA, "limit": 40, "min_agreement": 0.5}
    with pytest.raises(sd.InvalidArgumentError, match="plugin is for engines: add engine=True"):
        sd.check_accuracy(deciding_demo, plugin="x", **common)
    with pytest.raises(sd.InvalidArgumentError, match="engine=True is for exported folders"):
        sd.check_accuracy(sd.prune(vit), engine=True, **common)


def test_messages_name_what_the_function_has(deciding_demo: Path, tmp_path: Path) -> None:
    import shutil

    (tmp_path / "empty").mkdir()
    with pytest.raises(sd.DataError, match="empty holds no pictures: give a folder that does"):
        sd.visualize(deciding_demo, tmp_path / "empty", output=tmp_path / "out")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(deciding_demo / "model.onnx", bare)
    with pytest.raises(sd.ArtifactError, match="give a folder of pictures with images"):
        sd.bench(bare / "model.onnx", backend="onnxruntime")
    with pytest.raises(sd.ArtifactError, match="give the checkpoint with reference"):
        sd.verify(bare / "model.onnx")
    with pytest.raises(sd.ArtifactError, match="nowhere does not exist: give an export"):
        sd.inspect("nowhere")
    with pytest.raises(sd.ArtifactError, match="File name too long"):
        sd.inspect("x" * 5000)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(sd.ArtifactError, match="is a sweep: `simprune-deploy report"):
        sd.inspect(str(tmp_path))


def test_notes_and_reasons_speak_of_arguments(tmp_path: Path) -> None:
    result = sd.export(MODEL, tmp_path / "out", layers=[1, 3, 4], verify=False, triton=True)
    assert result.triton is not None
    assert any("(verify=False)" in note for note in result.triton[0].notes)
    unpruned = sd.export(MODEL, tmp_path / "all", threshold=1.0)
    assert "lower threshold, or give pictures of your own with images" in str(unpruned.verdict)


def test_an_error_shows_no_marks_anywhere(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(sd.DestinationError) as raised:
        sd.export(MODEL, tmp_path)
    error = raised.value
    copied = pickle.loads(pickle.dumps(error))
    for text in (
        repr(error),
        error.args[0],
        str(copied),
        repr(copied),
        str(error.with_note("So.")),
    ):
        assert "replace it with force=True" in text
        assert text.isascii()
