"""Sweeps and tuning on engines, on stand-ins for a GPU: see the top of running_double.py.

Beside what these play, the builder's work is not real: its "engine" is the file that it was given.
The files it is given, their metadata and when they are built anew are real.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import running_double
from places import ROOT
from running_double import Cuda
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.engine import build, flavours
from simprune_deploy.engine.build import EngineOptions
from simprune_deploy.engine.engine_metadata import read_engine_metadata
from simprune_deploy.engine.folder_engines import build_here
from simprune_deploy.engine.gpu import NoGpuError, find_gpu
from simprune_deploy.evaluate.datasets import DataOptions, open_data
from simprune_deploy.onnx.variants import diagnostic_name
from simprune_deploy.predict.engine_predictor import EnginePredictor, EngineSpec
from simprune_deploy.predict.source import ModelSource, source_of_export
from simprune_deploy.tuning.results import Measurement
from simprune_deploy.tuning.sweep import Sweep, SweepOptions, setting_of, start_sweep
from simprune_deploy.tuning.sweep_runtimes import runtime_of

MODEL = ROOT / "examples" / "fashion_mnist" / "vit"
IMAGES = ROOT / "examples" / "fashion_mnist" / "test_slice.npz"
ENGINE, DENSE, DIAGNOSIS = (f"model{kind}-trt-sm87.engine" for kind in ("", "-dense", "-diagnosis"))

Install = Callable[..., list[str]]


@pytest.fixture
def install(stand_in: Cuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return what makes this an Orin; what it returns grows by each file that is built of."""

    def installed(images: list[int], low: int, high: int, threshold: bool = True) -> list[str]:
        profile = {
            "images": {"min": [low, *images], "opt": [low, *images], "max": [high, *images]},
            **({"threshold": {"min": [1], "opt": [1], "max": [high]}} if threshold else {}),
        }
        asked: list[str] = []

        def work(request: dict[str, Any], title: str, path: Path, progress: Any) -> dict[str, Any]:
            progress(f"building {path.name}")
            asked.append(path.name)
            graph = onnx.load(request["model"])
            graph.doc_string = f"build {len(asked)}"  # a builder's bytes are others each time
            onnx.save(graph, request["output"])
            return {
                "status": "built, not run",
                "checked": "nothing",
                "plugin_layers": request["plugin_layers"],
                "polygraphy": "0",
            }

        monkeypatch.setattr(build, "run_worker", work)
        monkeypatch.setitem(sys.modules, "tensorrt", running_double.tensorrt(stand_in, profile))
        return asked

    yield installed
    gc.collect()
    assert stand_in.memory == stand_in.handles == {}  # every engine gave back what it took


@pytest.fixture
def folder(deciding_demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(deciding_demo, tmp_path / "demo"))


def sweep_of(
    folder: Path, backend: str, place: Path, limit: int, batch: int, timing: int = 0
) -> Sweep:
    source = source_of_export(folder)
    data = open_data(IMAGES, source.metadata, DataOptions(limit=limit))
    options = SweepOptions(batch, timing)
    return start_sweep(source, data, runtime_of(backend, source, batch), place, options)


def assert_alike(found: list[Measurement], wanted: list[Measurement]) -> None:
    """Compare all that does not depend on the machine; ONNX Runtime may fuse graphs otherwise."""
    rough = ("cosine", "worst_cosine")
    rest = {"milliseconds": None, "dense_milliseconds": None, "peak_memory": None}
    for mine, theirs in zip(found, wanted, strict=True):
        for name in rough:
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5)
        rest |= {name: getattr(theirs, name) for name in rough}
        assert dataclasses.replace(mine, **rest) == theirs


def test_cells_are_those_of_onnxruntime(folder: Path, tmp_path: Path, install: Install) -> None:
    """On an engine that was there, for fewer pictures than a batch of the sweep: they are split."""
    asked = install([1, 28, 28], 1, 3)
    options = EngineOptions(batch=(1, 3), workspace_mib=64)
    before = build_here(folder, use_plugin=False, options=options)
    settings = [
        dataclasses.replace(setting_of(source_of_export(folder)), threshold=t) for t in (0.95, 0.8)
    ]
    sweep = sweep_of(folder, "engine", tmp_path / "a", 50, 4, timing=10)
    result = sweep.result(settings, "a command")
    assert asked == [ENGINE, DENSE, DIAGNOSIS]  # the one that was there was not built again
    assert read_engine_metadata(before.path) == before.metadata
    for name in (DENSE, DIAGNOSIS):
        metadata = read_engine_metadata(folder / "engines" / name)
        assert (metadata.workspace_mib, metadata.profile["images"]) == (
            64,
            before.metadata.profile["images"],
        )

    wanted = sweep_of(folder, "onnxruntime", tmp_path / "b", 50, 4).measure(settings)
    assert_alike(list(result.cells), wanted)
    kept = [cell.kept for cell in result.cells[1:]]
    assert kept[0] > kept[1] > (1, 1)
    assert all(cell.milliseconds and cell.dense_milliseconds for cell in result.cells)
    assert all(cell.peak_memory is None for cell in result.cells)

    environment = result.environment
    assert environment["runtime"] == "TensorRT 10.3.0 on Orin (SM 8.7)"
    for name in (ENGINE, DENSE, DIAGNOSIS):
        digest = read_engine_metadata(folder / "engines" / name).engine.sha256[:8]
        assert f"{name} {digest}" in environment["answers"] + environment["times"]
        assert digest in environment["set of engines"]
    assert DIAGNOSIS in environment["answers"]
    assert f"of the shipped engine, {ENGINE} " in environment["times"]
    assert "tuned for batch 1" in environment["times"]
    assert "peak memory is not measured: an engine takes" in environment["timing"]
    assert environment["plugin"] == "none"


def test_times_are_of_the_engine_that_ships(folder: Path, install: Install) -> None:
    install([1, 28, 28], 1, 4)
    build_here(folder, use_plugin=False)
    backend = runtime_of("engine", source_of_export(folder), 4)
    setting = setting_of(source_of_export(folder))
    timed, counted = backend.alone([setting], True), backend.models([setting])
    shipped, showing = timed.spec(setting), counted.spec(setting)
    assert isinstance(shipped, EngineSpec)
    assert isinstance(showing, EngineSpec)
    assert isinstance(timed.dense, EngineSpec)
    assert shipped.key != showing.key
    assert (shipped.engine.name, timed.dense.engine.name, shipped.showing) == (ENGINE, DENSE, None)
    assert showing.showing is not None
    assert {showing.engine.name, showing.showing.name} == {DIAGNOSIS}


@pytest.fixture(scope="module")
def four_at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of four pictures at once, as a camera gives them, at one threshold."""
    folder = tmp_path_factory.mktemp("four") / "pruned"
    pruned = sd.prune(sd.load(MODEL), threshold=0.85, layers=[2])
    sd.export(pruned, folder, sd.ExportOptions(batch=(4, 4), input="uint8-nhwc"), verify=False)
    return folder


def test_a_fixed_batch_is_filled_up(four_at_once: Path, tmp_path: Path, install: Install) -> None:
    folder = Path(shutil.copytree(four_at_once, tmp_path / "four"))
    install([28, 28, 1], 4, 4, threshold=False)
    build_here(folder, use_plugin=False)
    setting = setting_of(source_of_export(folder))
    found = sweep_of(folder, "engine", tmp_path / "a", 10, 4).measure([setting])
    assert found[1].images == 10
    assert_alike(found, sweep_of(folder, "onnxruntime", tmp_path / "b", 10, 4).measure([setting]))


def test_an_engine_for_larger_batches_than_are_timed_is_refused(
    folder: Path, install: Install
) -> None:
    asked = install([1, 28, 28], 2, 4)
    build_here(folder, use_plugin=False, options=EngineOptions(batch=(2, 4)))
    with pytest.raises(SimpruneError, match=r"takes 2 images or more, and batches of 1 are timed"):
        runtime_of("engine", source_of_export(folder), 4)
    assert asked == [ENGINE]


def test_counts_that_cannot_be_are_not_counted(folder: Path, install: Install) -> None:
    install([1, 28, 28], 1, 4)
    build_here(folder, use_plugin=False)
    backend = runtime_of("engine", source_of_export(folder), 4)
    setting = setting_of(source_of_export(folder))
    with backend.models([setting]).spec(setting).open() as predictor:
        assert isinstance(predictor, EnginePredictor)
        run = predictor.engine.run
        for slot in (0, 197):  # no patch is kept, and one more than there are
            name = diagnostic_name(1, "assignment")

            def wrong(feed: Any, slot: int = slot, name: str = name) -> Any:
                return {**run(feed), name: np.full((2, 197), slot)}

            predictor.engine.run = wrong  # type: ignore[method-assign]
            with pytest.raises(SimpruneError, match="of an image of 196: it decides wrongly"):
                predictor.predict(np.zeros((2, 1, 28, 28), np.float32), counts=True)


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(says: str, *arguments: object) -> None:
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert says in err


def test_the_commands(folder: Path, tmp_path: Path, install: Install) -> None:
    install([1, 28, 28], 1, 4)
    build_here(folder, use_plugin=False)
    base = ["--data", IMAGES, "--limit", 20, "--backend", "engine", "--timing", 0, "--json"]
    place = tmp_path / "s"
    code, out, err = call("sweep", folder, *base, "--thresholds", "0.9", "-o", place)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["environment"]["backend"] == "engine"
    assert [cell["images"] for cell in report["cells"]] == [20, 20]

    answer = call("tune", folder, *base, "--max-drop", "60%", "-o", tmp_path / "t.json")
    assert (answer[0], answer[2]) == (0, "")
    assert json.loads(answer[1])["environment"]["answers"].startswith(f"of {DIAGNOSIS}")

    # what another engine answers is not added to these cells
    again = ["sweep", folder, *base, "--thresholds", "0.9,0.8", "-o", place, "--resume"]
    assert call(*again)[0] == 0
    (folder / "engines" / DIAGNOSIS).unlink()
    refused("swept with another set of engines", *again)


def test_what_engines_cannot_do_is_refused(folder: Path, tmp_path: Path, install: Install) -> None:
    asked = install([1, 28, 28], 1, 4)
    base = ["--data", IMAGES, "--backend", "engine"]
    for command in (["sweep"], ["tune", "--max-drop", "5%"]):
        refused("is none: export it first, with --runtime-threshold", *command, MODEL, *base)
        shutil.copy(folder / "model.onnx", tmp_path / "alone.onnx")
        refused("is none: export it first", *command, tmp_path / "alone.onnx", *base)
        refused("leave --ray out", *command, folder, *base, "--ray", "local")
    refused("--compare runs in PyTorch, not engine", "sweep", folder, *base, "--compare")
    assert asked == []
    exported = source_of_export(folder)
    checkpoint = ModelSource("checkpoint", exported.metadata)
    with pytest.raises(SimpruneError, match="runs exported folders, and checkpoint is none"):
        runtime_of("engine", checkpoint, 4)


def test_without_tensorrt_or_a_gpu_the_way_out_is_named(folder: Path, tmp_path: Path) -> None:
    try:
        flavours.load_module("tensorrt")
        find_gpu()
    except (SimpruneError, NoGpuError):
        pass
    else:
        pytest.skip("TensorRT and a GPU are here")
    before = sorted(folder.rglob("*"))
    base = [folder, "--data", IMAGES, "--backend", "engine", "-o", tmp_path / "o"]
    says = "; --backend onnxruntime runs on the CPU"
    refused(says, "sweep", *base)
    refused(says, "tune", "--max-drop", "5%", *base)
    assert sorted(folder.rglob("*")) == before
    assert not (tmp_path / "o").exists()


def test_a_gpu_without_tensorrt_too(
    folder: Path, stand_in: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused("--backend onnxruntime runs", "sweep", folder, "--data", IMAGES, "--backend", "engine")
