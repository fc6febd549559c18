"""Engine: what it takes, and the calls it makes of CUDA and TensorRT, on stand-ins for a GPU."""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running_double
import torch
from made_up_engine import metadata_of
from places import ROOT
from running_double import CAPTURE_REFUSED, Cuda, Device

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import write_json
from simprune_deploy.engine import cuda, flavours, loading
from simprune_deploy.engine.engine_metadata import metadata_path
from simprune_deploy.engine.gpu import NoGpuError, find_gpu
from simprune_deploy.engine.loaded_engine import Engine
from simprune_deploy.engine.tensors import Tensor, check_inputs
from simprune_deploy.onnx.metadata import load_graph
from simprune_deploy.parity.golden import Golden, load_golden

LAYERS = [1, 3]


# --- which arrays an engine takes -----------------------------------------------------------------

F32 = np.dtype(np.float32)
INPUTS = [
    Tensor("images", F32, (2, 3, 8, 8), (6, 3, 8, 8)),
    Tensor("threshold", F32, (1,), (6,)),
]


@pytest.mark.parametrize("thresholds", [1, 4])
def test_a_threshold_is_one_or_one_for_each_image(thresholds: int) -> None:
    check_inputs(INPUTS, {"images": ((4, 3, 8, 8), F32), "threshold": ((thresholds,), F32)})


@pytest.mark.parametrize(
    ("images", "threshold", "says"),
    [
        (((1, 3, 8, 8), F32), ((1,), F32), "1 rows of images are outside 2..6"),
        (((7, 3, 8, 8), F32), ((1,), F32), "7 rows of images are outside 2..6, .* split the batch"),
        (((4, 3, 8, 9), F32), ((1,), F32), r"images is \[4, 3, 8, 9\], .* \[2\.\.6, 3, 8, 8\]"),
        (((3, 8, 8), F32), ((1,), F32), r"images is \[3, 8, 8\]"),
        (((4, 3, 8, 8), np.dtype(np.uint8)), ((1,), F32), "images is uint8, and .* takes float32"),
        (((4, 3, 8, 8), F32), ((3,), F32), "threshold has 3 values for 4 images: give one"),
        (((4, 3, 8, 8), F32), ((7,), F32), r"7 rows of threshold are outside 1\.\.6"),
        (((4, 3, 8, 8), F32), None, "the inputs images were given, .* takes images, threshold"),
        (None, ((1,), F32), "the inputs threshold were given"),
        (None, None, "the inputs none were given"),
    ],
)
def test_other_arrays_are_refused(images: Any, threshold: Any, says: str) -> None:
    given = {"images": images, "threshold": threshold}
    with pytest.raises(SimpruneError, match=says):
        check_inputs(INPUTS, {name: each for name, each in given.items() if each is not None})


# --- running, on stand-ins ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(deciding_demo: Path) -> Golden:
    return load_golden(deciding_demo / "golden.npz", LAYERS)


def written(
    folder: Path, onnx_bytes: bytes, stand_in: Cuda, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Write an "engine" for the stand-in of TensorRT, and put that in place."""
    path = folder / "model.engine"
    path.write_bytes(onnx_bytes)
    profile = {
        "images": {"min": [1, 1, 28, 28], "opt": [1, 1, 28, 28], "max": [4, 1, 28, 28]},
        "threshold": {"min": [1], "opt": [1], "max": [4]},
    }
    write_json(metadata_path(path), metadata_of(path, plugin=None, profile=profile).to_dict())
    monkeypatch.setitem(sys.modules, "tensorrt", running_double.tensorrt(stand_in, profile))
    return path


@pytest.fixture
def path(
    deciding_demo: Path, tmp_path: Path, stand_in: Cuda, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return an engine with one output, whose size is known."""
    graph = load_graph(deciding_demo / "model.onnx")
    del graph.graph.output[1:]
    return written(tmp_path, graph.SerializeToString(), stand_in, monkeypatch)


@pytest.fixture
def deciding(
    deciding_demo: Path, tmp_path: Path, stand_in: Cuda, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return an engine that also gives assignments, whose size depends on the images."""
    return written(tmp_path, (deciding_demo / "model.onnx").read_bytes(), stand_in, monkeypatch)


def inputs_of(golden: Golden, *rows: int) -> dict[str, np.ndarray]:
    chosen = list(rows) or list(range(len(golden.images)))
    return {"images": golden.images[chosen], "threshold": golden.thresholds[chosen]}


def assert_golden(found: np.ndarray, golden: Golden, *rows: int) -> None:
    chosen = list(rows) or list(range(len(golden.images)))
    np.testing.assert_allclose(found, golden.reference.outputs[chosen], atol=1e-4)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_golden_cases_in_any_batch(path: Path, golden: Golden, cuda_graph: bool) -> None:
    with Engine(path, cuda_graph=cuda_graph) as engine:
        assert list(engine.inputs) == ["images", "threshold"]
        assert list(engine.outputs) == ["logits"]
        for rows in ((0, 1, 2, 3), (2,), (1,), (3, 0), (0, 1, 2, 3)):
            found = engine.run(inputs_of(golden, *rows))
            assert list(found) == ["logits"]
            assert_golden(found["logits"], golden, *rows)
        assert engine.milliseconds == 1.25


def test_arrays_of_torch_and_others_without_a_copy_in_between(path: Path, golden: Golden) -> None:
    with Engine(path) as engine:
        feed = inputs_of(golden)
        tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
        assert_golden(engine.run(tensors)["logits"], golden)
        apart = np.asfortranarray(feed["images"])
        assert_golden(engine.run({**feed, "images": apart})["logits"], golden)


def test_results_go_where_they_are_wanted(path: Path, golden: Golden, stand_in: Cuda) -> None:
    feed = inputs_of(golden)
    mine = np.zeros((4, 10), np.float32)
    theirs = Device(stand_in, mine)
    with Engine(path) as engine:
        found = engine.run(feed, {"logits": mine})
        assert found["logits"] is mine
        assert_golden(mine, golden)
        device = {name: Device(stand_in, array) for name, array in feed.items()}
        running_double.View.streams.clear()
        assert engine.run(device, {"logits": theirs})["logits"] is theirs
        # the engine's own stream, which nobody else can wait for: it is there on return
        assert_golden(theirs.numpy(), golden)
        assert set(running_double.View.streams) == {engine._stream}


def test_a_stream_that_is_given_is_not_waited_for(
    path: Path, golden: Golden, stand_in: Cuda
) -> None:
    theirs = Device(stand_in, np.zeros((4, 10), np.float32))
    with Engine(path, stream=77) as engine:
        stand_in.calls.clear()
        engine.run(inputs_of(golden), {"logits": theirs})
        assert "cudaStreamSynchronize" not in stand_in.calls
        assert not theirs.numpy().any()
        stand_in.cudaStreamSynchronize(77)
        assert_golden(theirs.numpy(), golden)
        assert_golden(engine.run(inputs_of(golden))["logits"], golden)  # numpy: waited for
    assert "cudaStreamDestroy" not in stand_in.calls


def test_stream_0_is_called_by_its_other_name(path: Path, golden: Golden, stand_in: Cuda) -> None:
    feed = {name: Device(stand_in, array) for name, array in inputs_of(golden).items()}
    with Engine(path, stream=0) as engine:
        running_double.View.streams.clear()
        engine.run(feed)
    assert set(running_double.View.streams) == {1}
    for stream in (0, 1):
        with pytest.raises(SimpruneError, match="cannot be recorded on stream 0"):
            Engine(path, stream=stream, cuda_graph=True)


def test_memory_is_taken_once_and_given_back(path: Path, golden: Golden, stand_in: Cuda) -> None:
    engine = Engine(path)
    images, threshold, logits = 4 * 28 * 28 * 4, 4 * 4, 4 * 10 * 4
    assert engine.memory.arrays == images + threshold + logits
    assert engine.memory.taken == engine.memory.arrays
    assert engine.memory.scratch == 4096
    held = set(stand_in.memory)
    for rows in ((0,), (0, 1, 2, 3), (1, 2)):
        engine.run(inputs_of(golden, *rows))
        assert set(stand_in.memory) == held
    engine.close()
    engine.close()
    assert stand_in.memory == stand_in.handles == {}
    with pytest.raises(SimpruneError, match="the engine is closed"):
        engine.run(inputs_of(golden))


def test_memory_goes_with_an_engine_that_nobody_closes(path: Path, stand_in: Cuda) -> None:
    engine = Engine(path, cuda_graph=True)
    assert stand_in.memory
    del engine
    gc.collect()
    assert stand_in.memory == stand_in.handles == {}


@pytest.mark.parametrize("call", ["cudaEventCreate", "cudaMalloc", "cudaMemGetInfo"])
def test_an_engine_that_does_not_load_keeps_nothing(path: Path, stand_in: Cuda, call: str) -> None:
    stand_in.fails[call] = 2
    with pytest.raises(SimpruneError, match=f"{call} failed: some error"):
        Engine(path)
    assert stand_in.memory == stand_in.handles == {}


def names(calls: list[str]) -> list[str]:
    return [name.removeprefix("cuda") for name in calls if not name.startswith("cudaEvent")]


def test_a_graph_is_recorded_once_for_a_shape(path: Path, golden: Golden, stand_in: Cuda) -> None:
    copies = ["MemcpyAsync"] * 2
    ends = ["MemcpyAsync", "StreamSynchronize"]
    recorded = ["StreamSynchronize", "StreamBeginCapture", "StreamEndCapture"]
    recorded += ["GraphInstantiate", "GraphDestroy"]
    with Engine(path, cuda_graph=True) as engine:
        for rows, before in (
            ((0, 1), [*copies, *recorded]),
            ((2, 3), copies),  # other images: replayed
            ((1,), ["GraphExecDestroy", *copies, *recorded]),  # another shape: recorded again
            ((2,), copies),
        ):
            stand_in.calls.clear()
            assert_golden(engine.run(inputs_of(golden, *rows))["logits"], golden, *rows)
            assert names(stand_in.calls) == [*before, "GraphLaunch", *ends]
    assert stand_in.graphs == {}


def test_what_cannot_be_recorded_is_one_line(
    deciding: Path, golden: Golden, stand_in: Cuda
) -> None:
    with Engine(deciding, cuda_graph=True) as engine:
        for _ in range(2):
            with pytest.raises(SimpruneError, match=r"no CUDA graph .* \(export with tokens='K'\)"):
                engine.run(inputs_of(golden))
            assert stand_in.recording is None  # the stream takes other work again
    assert stand_in.memory == stand_in.handles == {}


def test_a_recording_that_breaks_late_is_one_line(
    path: Path, golden: Golden, stand_in: Cuda
) -> None:
    stand_in.fails["cudaStreamEndCapture"] = CAPTURE_REFUSED
    with (
        Engine(path, cuda_graph=True) as engine,
        pytest.raises(SimpruneError, match=r"no CUDA graph .* cudaStreamEndCapture failed: not"),
    ):
        engine.run(inputs_of(golden))


def test_outputs_of_unknown_size(deciding: Path, golden: Golden, stand_in: Cuda) -> None:
    with Engine(deciding) as engine:
        first, *decisions = engine.outputs
        assert (first, len(decisions)) == ("logits", len(LAYERS))
        for rows in ((0, 1, 2, 3), (1,)):
            found = engine.run(inputs_of(golden, *rows))
            assert_golden(found["logits"], golden, *rows)
            for name, layer in zip(decisions, LAYERS, strict=True):
                for got, row in zip(found[name], rows, strict=True):
                    want = golden.reference.records[layer][row].valid_assignment()
                    assert got[got >= 0].tolist() == want.tolist()
        with pytest.raises(SimpruneError, match="cannot be written to: give logits"):
            engine.run(inputs_of(golden), {decisions[1]: np.zeros(1)})


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"logits": np.zeros((3, 10), np.float32)}, r"float32\[3, 10\], and .* float32\[4, 10\]"),
        ({"logits": np.zeros((4, 10))}, r"float64\[4, 10\]"),
        ({"logits": np.zeros((10, 4), np.float32).T}, "cannot be written in one piece"),
        ({"scores": np.zeros((4, 10), np.float32)}, "scores cannot be written to: give logits"),
        ({"logits": [0.0]}, "logits is a list, and engines take numpy arrays, torch tensors"),
    ],
)
def test_bad_outputs(path: Path, golden: Golden, outputs: dict[str, Any], says: str) -> None:
    with Engine(path) as engine:
        with pytest.raises(SimpruneError, match=says):
            engine.run(inputs_of(golden), outputs)
        assert_golden(engine.run(inputs_of(golden))["logits"], golden)


def test_bad_inputs(path: Path, golden: Golden, stand_in: Cuda) -> None:
    feed = inputs_of(golden)
    gaps = Device(stand_in, feed["images"])
    gaps.strides = (784, 784, 1, 28)
    with Engine(path) as engine:
        for images, says in (
            (feed["images"].tolist(), "images is a list"),
            (torch.from_numpy(feed["images"]).requires_grad_(), "does not hand out its memory"),
            (gaps, "images has gaps in its memory: make it contiguous first"),
            (np.concatenate([feed["images"]] * 2), "8 rows of images are outside 1..4"),
        ):
            with pytest.raises(SimpruneError, match=says):
                engine.run({**feed, "images": images})
        gaps.strides = (784, 5, 28, 1)  # the stride of a dimension of one row says nothing
        assert_golden(engine.run({**feed, "images": gaps})["logits"], golden)


def test_cuda_that_fails_while_running(path: Path, golden: Golden, stand_in: Cuda) -> None:
    with Engine(path) as engine:
        stand_in.fails["cudaStreamSynchronize"] = 700
        with pytest.raises(SimpruneError, match="cudaStreamSynchronize failed: an illegal memory"):
            engine.run(inputs_of(golden))


def test_the_example_of_the_page(
    deciding_demo: Path,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engines = tmp_path / "model-pruned" / "engines"
    engines.mkdir(parents=True)
    named = engines / "model-trt-sm87.engine"
    metadata_path(path).rename(metadata_path(named))
    path.rename(named)
    (engines.parent / "golden.npz").symlink_to(deciding_demo / "golden.npz")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "runtime.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- test: stand-ins -->\n```python\n(.*?)```", text, re.S)
    exec(compile(example, "runtime.md", "exec"), {})
    assert "Memory(scratch=4096" in capsys.readouterr().out


# --- what does not fit ----------------------------------------------------------------------------


def test_the_metadata_is_asked_first(path: Path) -> None:
    metadata = metadata_of(path, plugin=None, version="10.7.0")
    write_json(metadata_path(path), metadata.to_dict())
    with pytest.raises(SimpruneError, match=r"with TensorRT 10\.7\.0; this is SM 8\.7 with"):
        Engine(path)
    path.write_bytes(b"changed")
    with pytest.raises(SimpruneError, match="is not the engine that was built"):
        Engine(path)


def test_bytes_that_tensorrt_does_not_take(path: Path, stand_in: Cuda) -> None:
    path.write_bytes(b"nothing")
    write_json(metadata_path(path), metadata_of(path, plugin=None).to_dict())
    with pytest.raises(SimpruneError, match=r"does not load .*: Serialization: the magic tag is w"):
        Engine(path)
    assert stand_in.memory == stand_in.handles == {}


def test_bindings_of_a_newer_cuda_than_the_drivers(path: Path, stand_in: Cuda) -> None:
    stand_in.version = 13_050
    with pytest.raises(SimpruneError, match=r"for CUDA 13, .* pip install 'cuda-bindings<13'"):
        Engine(path)


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, path: Path, golden: Golden) -> None:
    with Engine(path) as engine:
        images = Device(cuda._bindings(), golden.images)
        monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
        with pytest.raises(SimpruneError, match=r"cuda-core, .* pip install 'simprune-deploy\[eng"):
            engine.run({**inputs_of(golden), "images": images})
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(SimpruneError, match=r"cuda-bindings, .* pip install 'simprune-deploy\[eng"):
        cuda.call("cudaFree", 0)


def test_cuda_itself_without_a_gpu() -> None:
    """NVIDIA's own cuda-bindings, as far as a machine without a GPU lets them."""
    try:
        find_gpu()
    except NoGpuError:
        with pytest.raises(SimpruneError, match="cudaMalloc failed: "):
            cuda.call("cudaMalloc", 16)
        with pytest.raises(NoGpuError, match="no GPU was found"):
            cuda.check_bindings()
        assert cuda.constant("cudaStreamNonBlocking") == 1
        assert int(cuda.call("cudaRuntimeGetVersion")) >= 12_000
    else:
        pytest.skip("there is a GPU")


# --- NVIDIA's own deserializer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def rtx_engine() -> bytes:
    """Return a small real engine of TensorRT-RTX, built for an RTX card."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    value = network.add_input("x", trt.float32, (2, 3))
    network.mark_output(network.add_activation(value, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.parametrize("part", ["whole", "cut off", "empty"])
def test_tensorrt_rtx_says_why_it_does_not_load(
    rtx_engine: bytes, tmp_path: Path, part: str
) -> None:
    try:
        find_gpu()
    except NoGpuError:
        pass
    else:
        pytest.skip("there is a GPU")
    import tensorrt_rtx as trt

    path = tmp_path / "model.engine"
    path.write_bytes({"whole": rtx_engine, "cut off": rtx_engine[:900], "empty": b""}[part])
    errors: list[str] = []
    logger = flavours.error_logger(trt, errors)
    with pytest.raises(SimpruneError) as raised:
        loading.load(trt.Runtime(logger), errors, path, "TensorRT-RTX 1.7.1")
    said = str(raised.value)
    assert said.startswith(f"TensorRT-RTX 1.7.1 does not load {path}: ")
    assert "\n" not in said
    assert ("cudaError" in said) == (part == "whole")  # only what is whole gets as far as the GPU
