"""bench: what is timed and how it is summed up, and the command on a real model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import cli
from made_up_engine import metadata_of
from memory_holder import MemoryHolder
from PIL import Image
from places import ROOT
from running_double import Cuda, tensorrt
from typer.testing import CliRunner

import simprune_deploy as sd
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError, ToolFailedError
from simprune_deploy.common.files import sha256, write_json
from simprune_deploy.deploy.doctor.machine import Machine
from simprune_deploy.engine.build import BuiltEngine
from simprune_deploy.engine.engine_metadata import FileStamp, metadata_path
from simprune_deploy.engine.flavours import load_module
from simprune_deploy.engine.gpu import Gpu, NoGpuError, find_gpu
from simprune_deploy.evaluate.bench import bench, models
from simprune_deploy.evaluate.bench.inputs import _batches, count_tokens, padding
from simprune_deploy.evaluate.bench.machine import describe_machine, is_busy
from simprune_deploy.evaluate.bench.request import BenchRequest
from simprune_deploy.evaluate.memory import MemoryRun, probe
from simprune_deploy.evaluate.timing import (
    EachOnce,
    Latency,
    LayerCost,
    Plan,
    Speedup,
    latency,
    layer_cost,
    measure,
    speedup,
)
from simprune_deploy.onnx.metadata import load_graph
from simprune_deploy.onnx.variants import dense
from simprune_deploy.parity.golden import load_golden
from simprune_deploy.predict.source import source_of_export
from simprune_deploy.pruning.cost import (
    BlockShape,
    BlockTokens,
    allowed_speedup,
    block_flops,
    mlp_flops,
)
from simprune_deploy.reports.bench import print_benchmark

DEMO = ROOT / "examples" / "fashion_mnist"
LAYERS = [1, 3]


# --- measuring ------------------------------------------------------------------------------------


class Clockwork:
    """A clock and two models; what they take may drift while they run."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.calls = 0.0, drift, []  # type: ignore[var-annotated]

    def model(self, name: str, milliseconds: float) -> Any:
        def run(index: int) -> float:
            self.calls.append((name, index))
            self.now += milliseconds * (1 + self.drift * len(self.calls)) / 1e3
            return milliseconds / 2

        return run

    def measure(self, plan: Plan) -> Any:
        runners = {"dense": self.model("dense", 4), "pruned": self.model("pruned", 2)}
        return measure(runners, plan, clock=lambda: self.now)


def test_models_take_turns_on_the_same_inputs() -> None:
    machine = Clockwork()
    times = machine.measure(Plan(iterations=7, warm_up=3, inputs=2))
    warm_up = [(name, i) for name in ("dense", "pruned") for i in (0, 1, 0)]
    # the first run of a block is not timed; the order turns from block to block
    block = {name: [(name, 0), (name, 0), (name, 1)] for name in ("dense", "pruned")}
    ab, ba = block["dense"] + block["pruned"], block["pruned"] + block["dense"]
    assert machine.calls == warm_up + ab + ba + ab + ba
    assert times["dense"].whole == [pytest.approx([4, 4])] * 4
    assert times["pruned"].gpu == [[1, 1]] * 4


@pytest.mark.parametrize("iterations", [1, 3, 100, 101, 1000])
@pytest.mark.parametrize("inputs", [1, 4, 7])
def test_a_plan_runs_whole_rounds_and_at_least_what_was_asked(iterations: int, inputs: int) -> None:
    plan = Plan(iterations, 0, inputs)
    runs = [len(block) for block in plan.blocks]
    assert sum(runs) >= iterations
    assert sum(runs[:-1]) < plan.rounds * inputs
    assert all(count % inputs == 0 for count in runs)
    assert len(plan.blocks) <= 25


def test_each_input_can_run_once_in_turns_of_ten() -> None:
    plan = EachOnce(23)
    assert [list(block) for block in plan.blocks] == [
        [*range(10)],
        [*range(10, 20)],
        [20, 21, 22],
    ]
    machine = Clockwork()
    runners = {name: machine.model(name, 1) for name in ("a", "b", "c")}
    counted: list[int] = []
    measure(runners, plan, clock=lambda: machine.now, advance=counted.append)
    assert sum(counted) == 3 * 23
    # another one begins each block, and its first run is not timed
    turns = [name for name, _ in machine.calls[3 * 3 :]]
    assert [name for name, before in zip(turns, ["", *turns], strict=False) if name != before] == [
        *("a", "b", "c"),
        *("b", "c", "a"),
        *("c", "a", "b"),
    ]
    assert machine.calls[9:12] == [("a", 0), ("a", 0), ("a", 1)]


def test_a_machine_that_slows_down_does_not_change_the_ratio() -> None:
    times = Clockwork(drift=0.01).measure(Plan(iterations=200, warm_up=0, inputs=1))
    first, last = times["dense"].whole[0], times["dense"].whole[-1]
    assert np.mean(last) > 2 * np.mean(first)
    found = speedup(times["dense"].whole, times["pruned"].whole)
    assert found.ratio == pytest.approx(2, rel=0.05)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 2 < found.high


def test_an_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        spell = random.lognormal(0, 0.5, (25, 1))  # hits both models of a block
        slow = 3.0 * spell * random.lognormal(0, 0.1, (25, 4))
        fast = 2.0 * spell * random.lognormal(0, 0.1, (25, 4))
        found = speedup(slow.tolist(), fast.tolist())
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.5 <= found.high
    assert 180 <= held <= 198


def test_one_slow_block_does_not_carry_the_ratio() -> None:
    slow, fast = [[3.0]] * 20, [[2.0]] * 19 + [[200.0]]
    assert speedup(slow, fast) == Speedup(1.5, 1.5, 1.5, 20)


def test_with_few_blocks_there_is_no_interval() -> None:
    assert speedup([[2.0]] * 7, [[1.0]] * 7) == Speedup(2.0, None, None, 7)
    assert speedup([[2.0]] * 8, [[1.0]] * 8).low == 2.0


def test_a_prune_layer_costs_its_part_of_what_the_speed_up_lacks() -> None:
    found = layer_cost(Speedup(1.25, 1.0, 2.0, 20), 2.5, 4)
    # of the dense time 0.8 were taken where 0.4 were allowed; at best 0.5, at worst all
    assert found == LayerCost(*map(pytest.approx, (0.1, 0.025, 0.15)))
    assert layer_cost(Speedup(2.0, None, None, 3), 2.0, 1) == LayerCost(0.0, None, None)
    faster = layer_cost(Speedup(2.0, None, None, 3), 1.6, 1)
    assert faster is not None
    assert faster.share == pytest.approx(-0.125)
    assert layer_cost(Speedup(1.0, 0.9, 1.1, 20), 1.0, 0) is None


def test_percentiles_are_over_all_runs() -> None:
    values = np.arange(1, 101.0)
    found = latency([values[:30].tolist(), values[30:].tolist()])
    assert found == Latency(50.5, 50.5, pytest.approx(90.1), pytest.approx(99.01), 100)


def test_allowed_is_a_ratio_of_flops() -> None:
    shape = BlockShape(8, 32)
    whole, half = BlockTokens(10, 10), BlockTokens(5, 5)
    assert allowed_speedup(shape, 10, [whole, whole], 100.0) == 1
    dense, less = block_flops(shape, 10), block_flops(shape, 5)
    found = allowed_speedup(shape, 10, [whole, half], 100.0)
    assert found == pytest.approx((100 + 2 * dense) / (100 + dense + less))
    # a layer inside a block spares its MLP alone
    saved = mlp_flops(shape, 10) - mlp_flops(shape, 5)
    found = allowed_speedup(shape, 10, [BlockTokens(10, 5)], 100.0)
    assert found == pytest.approx((100 + dense) / (100 + dense - saved))


@pytest.mark.parametrize(("count", "batch"), [(4, 1), (4, 2), (4, 3), (4, 8), (3, 3), (1, 4)])
def test_every_image_is_equally_often_in_the_batches(count: int, batch: int) -> None:
    images = np.arange(count)[:, None]
    batches = _batches(images, batch)
    assert {len(each) for each in batches} == {batch}
    assert len(set(np.bincount(np.concatenate(batches)[:, 0], minlength=count))) == 1


# --- the machine ----------------------------------------------------------------------------------


def test_power_mode_and_clocks_are_asked_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"Jetson Orin Nano\0")
    (tmp_path / "proc" / "cpuinfo").write_text("model name\t: ARMv8\n")

    def run(command: Sequence[str]) -> str | None:
        if command[0] == "nvpmodel":
            return "NV Power Mode: 15W\n0\n"
        return "1410 MHz, 1980 MHz, 9501 MHz, 450.00 W, Enabled\n" if "--id=0" in command else None

    found = describe_machine(Machine(tmp_path, run, lambda: Gpu("Orin", (8, 7), "12.6", 8 << 30)))
    assert found["system"] == "Jetson Orin Nano"
    assert found["processor"].startswith("ARMv8, ")
    assert "Orin" in found["GPU"]
    assert found["driver's CUDA"] == "12.6"
    assert (found["power mode"], found["SM clock"]) == ("15W", "1410 MHz")
    nothing = describe_machine(Machine(tmp_path / "none", lambda command: None))
    assert not {"system", "power mode", "SM clock", "frequency governor"} & nothing.keys()


def test_a_busy_machine_is_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, busy in ((3.9, False), (4.1, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert is_busy() == busy
        assert describe_machine()["load before"].startswith(f"{load} programs")


@pytest.fixture
def helpers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe's process takes the helpers' classes out of a pickle."""
    paths = [str(ROOT / "tests" / "helpers"), str(ROOT)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.mark.usefixtures("helpers_are_found")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    """64 MB more of weights show as that, and what a run takes apart from it."""
    ballast = np.ones(100_000_000, np.float32)
    image = np.zeros((1, 1), np.float32)
    found = [probe([MemoryRun(MemoryHolder(size, 32 << 20), image)]) for size in (1, 64 << 20)]
    peaks = [each.peak or 0 for each in found]
    assert 64e6 < peaks[1] - peaks[0] < 100e6
    for each in found:
        (run,) = each.runs
        assert each.before is not None
        assert each.before < (each.peak or 0) < ballast.nbytes
        assert run is not None
        assert 30 << 20 < run < 40 << 20
    both = probe([MemoryRun(MemoryHolder(1, size), image) for size in (1, 48 << 20)])
    assert (both.runs[0] or 0) < 8 << 20 < 44 << 20 < (both.runs[1] or 0)


@pytest.mark.usefixtures("helpers_are_found")
def test_a_model_that_does_not_run_is_one_line() -> None:
    image = np.zeros((1, 1), np.float32)
    with pytest.raises(ToolFailedError, match=r"\(exit code 1\): RuntimeError: no good") as raised:
        probe([MemoryRun(MemoryHolder(1, fails="no good"), image)])
    assert "\n" not in str(raised.value)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six of Fashion-MNIST's test images."""
    folder = tmp_path_factory.mktemp("pictures")
    with np.load(DEMO / "test_slice.npz") as file:
        images = file["images"][:6]
    for number, image in enumerate(images):
        Image.fromarray(image.reshape(28, 28)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def exported(deciding_demo: Path) -> Path:
    """Return the demo model, exported with a run-time threshold, with golden cases."""
    return deciding_demo


def quick(model: Path, **values: Any) -> Any:
    given = {"backend": "onnxruntime", "iterations": 4, "warm_up": 1, "threads": 1, **values}
    return bench(model, **given).to_dict()


def test_the_report(exported: Path) -> None:
    report = quick(exported, thresholds=(0.95, 0.8))
    assert report["environment"]["threads"] == 1
    assert "on the CPU" in report["environment"]["run_by"]
    assert report["inputs"]["images"] == 4
    assert report["inputs"]["source"] == "the golden cases of the folder"
    assert report["plan"] == {"warm_up": 1, "blocks": 1, "runs_a_block": 4}
    dense, mild, strong = report["models"]
    assert [dense["name"], mild["name"]] == ["dense", "pruned at 0.95"]
    assert "speedup" not in dense
    for row in (dense, mild, strong):
        times = row["latency_ms"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert times["runs"] == 4
        assert row["images_per_second"] == pytest.approx(1e3 / times["mean"], rel=0.01)
        assert row["memory_bytes"]["process at most"] > 10_000_000
        assert row["gpu_ms"] is None
    assert mild["speedup"]["blocks"] == 1
    assert mild["tokens"]["processed_share"] > strong["tokens"]["processed_share"]
    assert 1 < mild["tokens"]["allowed_speedup"] < strong["tokens"]["allowed_speedup"]
    assert "layer_cost" not in dense
    for row in (mild, strong):
        lacks = 1 / row["speedup"]["ratio"] - 1 / row["tokens"]["allowed_speedup"]
        share = pytest.approx(lacks / len(LAYERS), abs=1e-4)
        assert row["layer_cost"] == {"share": share, "low": None, "high": None}


def test_tokens_are_those_of_the_golden_cases(exported: Path) -> None:
    """They hold PyTorch's decisions, each at a threshold of its own: the same counts."""
    golden = load_golden(exported / "golden.npz", LAYERS)
    source = source_of_export(exported)
    assert len(set(golden.thresholds)) > 1
    for row, threshold in enumerate(golden.thresholds):
        batches = [golden.images[row : row + 1]]
        records = golden.reference.records
        kept = {str(layer): len(records[layer][row].heads()) for layer in LAYERS}
        assert count_tokens(source, batches, float(threshold))["kept"] == kept


def test_a_folder_of_pictures(exported: Path, pictures: Path) -> None:
    (pictures / "broken.png").write_text("no picture")
    given = {"images": pictures, "iterations": 1, "warm_up": 0}
    report = quick(exported, **given)
    assert report["inputs"]["images"] == report["inputs"]["batches"] == 6
    assert report["inputs"]["skipped"] == [["broken.png", "not a picture"]]
    golden = quick(exported, iterations=1, warm_up=0)
    assert report["models"][1]["tokens"]["kept"] != golden["models"][1]["tokens"]["kept"]


def test_a_batch_keeps_as_many_tokens_as_its_image_with_the_most(exported: Path) -> None:
    alone = quick(exported, iterations=1, warm_up=0)["models"][1]["tokens"]
    together = quick(exported, iterations=1, warm_up=0, batch=4)["models"][1]
    assert together["tokens"]["kept"]["1"] > alone["kept"]["1"]
    assert together["latency_ms"]["runs"] == 1
    padded = (alone["padded"], together["tokens"]["padded"])
    # of the same images; this export takes four at most
    assert padded[0] == padded[1]
    assert (list(padded[0]["flops_share"]), padded[0]["batch"]) == (["1", "4"], 4)


def with_pruning(exported: Path, batch: tuple[int, int], **changes: Any) -> Any:
    metadata = source_of_export(exported).metadata
    pruning = dataclasses.replace(metadata.pruning, **changes)
    export = {**metadata.export, "batch": list(batch)}
    return dataclasses.replace(metadata, pruning=pruning, export=export)


def test_what_padding_gives_back(exported: Path) -> None:
    half = [Counter({197: 1, 99: 1})] * 2
    found = padding(with_pruning(exported, (1, 64)), LAYERS, half, timed=1)
    assert found is not None
    assert (list(found["flops_share"]), found["batch"]) == (["1", "8", "32"], 32)
    # an image with all its tokens is in one batch of two, and in nearly every one of 32
    assert found["given_back"] == 1
    found = padding(with_pruning(exported, (1, 64)), LAYERS, half, timed=2)
    assert found is not None
    assert (list(found["flops_share"]), found["batch"]) == (["1", "2", "8", "32"], 2)
    assert found["given_back"] == pytest.approx(0.5, abs=1e-3)
    found = padding(with_pruning(exported, (16, 16)), LAYERS, half, timed=16)
    assert found is not None
    assert list(found["flops_share"]) == ["1", "16"]
    whole = [Counter({197: 2})] * 2
    found = padding(with_pruning(exported, (1, 8)), LAYERS, whole, timed=1)
    assert found == {"flops_share": {"1": 1.0, "8": 1.0}, "batch": 8, "given_back": 0.0}
    fixed = with_pruning(exported, (1, 8), capacities=(98, 60))
    assert padding(fixed, LAYERS, half, timed=1) is None
    assert padding(with_pruning(exported, (1, 1)), LAYERS, half, timed=1) is None


def test_much_that_padding_gives_back_is_told_with_the_way_out(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quick(exported, iterations=1, warm_up=0)
    padded = report["models"][1]["tokens"]["padded"]
    padded |= {"flops_share": {"1": 0.5, "8": 0.61, "32": 0.7}, "batch": 32}
    sentence = "pruned: batches of 32 give back 40% of what an image alone saves: export fixed "
    for given_back, told in ((0.4, True), (0.33, False)):
        padded["given_back"] = given_back
        print_benchmark(report)
        printed = capsys.readouterr().out
        assert "pruned: FLOPs at batch 1 / 8 / 32: 50% / 61% / 70%\n" in printed
        assert (f"{sentence}counts with tokens, or run smaller batches" in printed) == told
        assert ("give back" in printed) == told
    report["models"][1]["tokens"]["padded"] = None
    print_benchmark(report)
    assert "FLOPs at" not in capsys.readouterr().out


def test_what_a_prune_layer_costs_is_said_as_far_as_it_is_known(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quick(exported, iterations=1, warm_up=0)
    row = report["models"][1]
    said = "a prune layer costs"
    for share, low, high, told in (
        (0.0049, 0.0021, 0.0078, "0.5% (0.2% to 0.8%)"),
        (-0.0004, -0.0031, 0.0019, "0.0% (-0.3% to 0.2%)"),
        (0.012, None, None, "1.2%"),
    ):
        row["layer_cost"] = {"share": share, "low": low, "high": high}
        print_benchmark(report)
        printed = capsys.readouterr().out
        assert f"pruned: {said} {told} of the dense model's time here\n" in printed
    row["layer_cost"] = None
    print_benchmark(report)
    assert said not in capsys.readouterr().out


def shell(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simprune_deploy", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_for_people_and_for_programs(exported: Path) -> None:
    call = ["bench", str(exported), "--backend", "onnxruntime", "--threads", "1", "--warm-up", "0"]
    call += ["--iterations", "1", "--thresholds", "0.9,0.8"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    for text in ("ONNX Runtime", "golden cases", "pruned at 0.8", "allowed", "memory in MB"):
        assert text in result.stdout
    assert "too few blocks for an interval: raise --iterations" in result.stdout
    result = CliRunner().invoke(app, [*call, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert next(row["name"] for row in json.loads(result.stdout)["models"]) == "dense"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--backend", "tensorrt"],
            "'--backend': 'tensorrt' is not one of 'engine', 'onnxruntime'",
        ),
        (["--batch", "5"], "--batch 5 is outside 1..4, which this export takes"),
        (["--thresholds", "high"], "--thresholds 'high' is not understood: write 0.95,0.9"),
        (["--thresholds", "3"], "threshold 3.0 is outside [-1, 2]"),
        (["--thresholds", "nan"], "threshold nan is not a number"),
        (["--thresholds", ",".join(["0.9"] * 17)], "17 thresholds are too many"),
        (["--iterations", "0"], "--iterations 0 is not between 1 and"),
        (["--warm-up", "-1"], "--warm-up -1 is not between 0 and"),
        (["--threads", "0"], "--threads 0 is not between 1 and"),
        (["--images", "/nowhere"], "/nowhere does not exist"),
        (["--force"], "--force is for --backend engine"),
        (["--plugin", "x.so"], "--plugin is for --backend engine"),
        (["--cuda-graph"], "--cuda-graph is for --backend engine"),
    ],
)
def test_bad_calls_are_one_line(exported: Path, arguments: list[str], says: str) -> None:
    assert says in cli("bench", exported, "--backend", "onnxruntime", *arguments).line


def test_a_fixed_threshold_and_a_model_without_pruning(tmp_path: Path, pictures: Path) -> None:
    vit = sd.load(DEMO / "vit")
    sd.export(sd.prune(vit, threshold=0.9, layers=[1]), tmp_path / "a", verify=False)
    with pytest.raises(SimpruneError, match=r"fixed at 0\.9: export with runtime_threshold=True"):
        quick(tmp_path / "a", thresholds=(0.8,))
    with pytest.raises(SimpruneError, match=r"without golden cases|golden\.npz does not exist"):
        quick(
            tmp_path / "a",
        )
    # as an export at a threshold above 1 would be
    model, manifest = tmp_path / "a" / "model.onnx", tmp_path / "a" / "manifest.json"
    model.write_bytes(dense(load_graph(model)).SerializeToString())
    written = json.loads(manifest.read_text(encoding="utf-8"))
    size = model.stat().st_size
    written["files"]["model.onnx"] = {"bytes": size, "sha256": sha256(model)}
    write_json(manifest, written)
    with pytest.raises(SimpruneError, match="prunes nothing"):
        quick(
            tmp_path / "a",
        )


def test_without_tensorrt_or_a_gpu_the_way_out_is_named(exported: Path) -> None:
    try:
        load_module("tensorrt")
        find_gpu()
    except (SimpruneError, NoGpuError):
        done = shell(exported)
    else:
        pytest.skip("TensorRT and a GPU are here")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "--backend onnxruntime times the ONNX file on the CPU" in done.stderr


# --- engines, on stand-ins ------------------------------------------------------------------------


@pytest.fixture
def on_orin(
    exported: Path, tmp_path: Path, stand_in: Cuda, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[Any]]:
    """Return a folder with an engine for the stand-in, and what the builder is asked for."""
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    profile = {
        "images": {"min": [1, 1, 28, 28], "opt": [2, 1, 28, 28], "max": [4, 1, 28, 28]},
        "threshold": {"min": [1], "opt": [1], "max": [4]},
    }
    (folder / "engines").mkdir()
    asked: list[Any] = []

    def write(name: str, data: bytes, **changes: Any) -> BuiltEngine:
        path = folder / "engines" / name
        path.write_bytes(data)
        onnx_file = FileStamp.of(folder / "model.onnx")
        metadata = metadata_of(path, plugin=None, profile=profile, onnx=onnx_file, **changes)
        write_json(metadata_path(path), metadata.to_dict())
        return BuiltEngine(path, metadata, cached=False, trtexec=None)

    def build(model: Path, builder: Any, options: Any, *, of: str, progress: Any) -> BuiltEngine:
        asked.append((builder, options, of))
        graph = dense(load_graph(model)).SerializeToString()
        return write("model-dense-trt-sm87.engine", graph, of="dense")

    write("model-trt-sm87.engine", (folder / "model.onnx").read_bytes())
    monkeypatch.setattr(models, "build_engine", build)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(stand_in, profile))
    return folder, asked


def test_engines_are_timed_beside_a_dense_one_like_them(
    on_orin: tuple[Path, list[Any]], stand_in: Cuda
) -> None:
    folder, asked = on_orin
    request = BenchRequest(folder, iterations=8, warm_up=0, thresholds=(0.9, 0.7), batch=2)
    report = bench(request).to_dict()
    ((builder, wanted, of),) = asked
    assert (builder.flavour, builder.version, of) == ("tensorrt", "10.3.0", "dense")
    assert (wanted.batch, wanted.opt_batch, wanted.workspace_mib) == ((1, 4), 2, 512)
    rows = report["models"]
    assert [row["name"] for row in rows] == ["dense", "pruned at 0.9", "pruned at 0.7"]
    assert all(row["gpu_ms"]["mean"] == 1.25 for row in rows)
    assert rows[1]["gpu_speedup"]["ratio"] == 1
    for row in rows:
        assert row["memory_bytes"]["scratch"] == 4096
        assert row["memory_bytes"]["engine file"] > 1_000_000
    assert report["environment"]["tuned_for"] == "batch 2"
    assert report["environment"]["plugin_layers"] == "3 of 3 prune layers"
    assert report["environment"]["cuda_graphs"] == "none"
    first, second = report["trtexec"]
    engine = folder / "engines" / "model-trt-sm87.engine"
    assert first == (
        f"trtexec --loadEngine={engine} --shapes=images:2x1x28x28,threshold:1 "
        "--loadInputs=images:images.raw,threshold:threshold.raw --warmUp=500"
    )
    assert "model-dense-trt-sm87.engine" in second
    assert stand_in.memory == stand_in.handles == {}


def test_graphs_are_recorded_of_what_has_fixed_sizes(on_orin: tuple[Path, list[Any]]) -> None:
    """This export's token counts depend on the image, so only the dense engine is replayed."""
    folder, _ = on_orin
    report = bench(folder, iterations=1, warm_up=0, cuda_graph=True).to_dict()
    assert report["environment"]["cuda_graphs"] == ["dense"]
    print_benchmark(report)


def test_an_engine_for_other_batches(on_orin: tuple[Path, list[Any]], stand_in: Cuda) -> None:
    folder, _ = on_orin
    with pytest.raises(SimpruneError, match=r"5 is outside 1\.\.4"):
        bench(folder, iterations=1, batch=5)
    assert stand_in.memory == stand_in.handles == {}
