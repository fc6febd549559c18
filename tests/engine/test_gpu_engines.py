"""Real engines on a real GPU: built, loaded by our runtime, held to PyTorch's golden cases.

`make test-gpu` runs this where TensorRT or TensorRT-RTX is installed. Everything it needs is
imported in the tests, so that a machine with less says what it lacks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

DEMO = ROOT / "examples" / "fashion_mnist" / "vit"
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
LAYERS = [1, 3]
CLOSE = 2e-3
"""On logits of about 10, in float32 without TF32."""

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@dataclasses.dataclass(frozen=True)
class Built:
    """An exported folder with its engine."""

    folder: Path
    engine: Path
    plugin: Path | None


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt, the function", "tensorrt-rtx"])
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Built]:
    """Return what exports the demo model and builds its engine with one of the flavours."""
    from simprune_deploy.engine.gpu import NoGpuError, find_gpu

    try:
        gpu = find_gpu()
    except NoGpuError as error:
        pytest.skip(str(error))
    flavour, _, how = request.param.partition(", ")
    for package in (MODULES[flavour], "cuda.bindings", "timm", "onnxscript", "onnxruntime"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is None:
            pytest.skip(f"{package} is not installed")
    made: dict[Any, Built] = {}

    def build(**options: Any) -> Built:
        import simprune_deploy as sd
        from simprune_deploy.engine import flavours
        from simprune_deploy.engine.build import build_engine
        from simprune_deploy.engine.builders import Builder, for_this_gpu
        from simprune_deploy.engine.libraries import find_library

        key = tuple(sorted(options.items()))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("gpu") / "out"
        tokens = options.pop("tokens", None)
        pruned = sd.prune(sd.load(DEMO), threshold=0.9, layers=LAYERS, tokens=tokens)
        sd.export(pruned, folder, sd.ExportOptions(**options))
        plugin = None
        if flavour == "tensorrt":
            plugin = None if how else find_library(folder, None)
            if not how and plugin is None:
                pytest.skip("SIMPRUNE_LIBRARY names no plugin")
            builder = for_this_gpu(folder, plugin=plugin, use_plugin=not how)
        else:
            trt = flavours.load_module(flavour)
            if not hasattr(trt.ComputeCapability, f"SM{gpu.sm}"):
                pytest.skip(f"tensorrt_rtx {trt.__version__} does not know SM {gpu.sm}")
            builder = Builder(flavour, str(trt.__version__), (gpu.compute_capability,))
        built = build_engine(folder / "model.onnx", builder)
        counted = len(LAYERS) if plugin is not None else 0
        assert (built.metadata.plugin_layers, built.metadata.prune_layers) == (counted, len(LAYERS))
        made[key] = Built(folder, built.path, plugin)
        return made[key]

    return build


def golden_of(built: Built) -> Any:
    from simprune_deploy.parity.golden import load_golden

    return load_golden(built.folder / "golden.npz", LAYERS)


def assert_golden(found: np.ndarray, golden: Any, rows: list[int]) -> None:
    """An image whose decision float noise turns has another output, rightly: at most one may."""
    far = np.abs(found - golden.reference.outputs[rows]).max(axis=1) > CLOSE
    assert far.sum() <= (1 if len(rows) > 1 else 0), far


def test_golden_cases_in_any_batch(build: Callable[..., Built]) -> None:
    from simprune_deploy.engine.loaded_engine import Engine

    built = build(runtime_threshold=True, batch=(1, 4))
    golden = golden_of(built)
    with Engine(built.engine, plugin=built.plugin) as engine:
        for rows in ([0, 1, 2, 3], [2, 1], [0, 1, 2, 3]):
            feed = {"images": golden.images[rows], "threshold": golden.thresholds[rows]}
            assert_golden(engine.run(feed)["logits"], golden, rows)
            assert engine.milliseconds > 0
        assert engine.memory.taken > 0


def test_a_graph_gives_what_a_launch_gives(build: Callable[..., Built]) -> None:
    from simprune_deploy.engine.loaded_engine import Engine

    built = build(tokens=60, batch=(2, 2))
    golden = golden_of(built)
    with (
        Engine(built.engine, plugin=built.plugin) as plain,
        Engine(built.engine, plugin=built.plugin, cuda_graph=True) as replayed,
    ):
        for rows in ([0, 1], [2, 3], [1, 0]):
            feed = {"images": golden.images[rows]}
            expected = plain.run(feed)["logits"]
            assert_golden(expected, golden, rows)
            np.testing.assert_array_equal(replayed.run(feed)["logits"], expected)


def test_a_graph_of_sizes_that_depend_on_the_image(build: Callable[..., Built]) -> None:
    """TensorRT says no, in one line; TensorRT-RTX leaves out what it cannot record."""
    from simprune_deploy.common.errors import SimpruneError
    from simprune_deploy.engine.loaded_engine import Engine

    built = build(runtime_threshold=True, batch=(1, 4))
    golden = golden_of(built)
    feed = {"images": golden.images[:2], "threshold": golden.thresholds[:2]}
    with Engine(built.engine, plugin=built.plugin, cuda_graph=True) as engine:
        if engine.metadata.flavour == "tensorrt":
            with pytest.raises(SimpruneError, match="no CUDA graph can be recorded"):
                engine.run(feed)
        else:
            assert_golden(engine.run(feed)["logits"], golden, [0, 1])
    with Engine(built.engine, plugin=built.plugin) as engine:
        assert_golden(engine.run(feed)["logits"], golden, [0, 1])


def test_tensors_of_torch_on_its_stream(build: Callable[..., Built]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU that torch can use")
    from simprune_deploy.engine.loaded_engine import Engine

    built = build(runtime_threshold=True, batch=(1, 4))
    golden = golden_of(built)
    rows = [0, 1, 2, 3]
    images = torch.from_numpy(golden.images).cuda()
    limits = torch.from_numpy(golden.thresholds.astype(np.float32)).cuda()
    logits = torch.zeros(4, 10, device="cuda")
    stream = torch.cuda.Stream()
    with (
        torch.cuda.stream(stream),
        Engine(built.engine, plugin=built.plugin, stream=stream.cuda_stream) as engine,
    ):
        # the work before and after is torch's own, on the same stream: nobody waits in between
        feed = {"images": images * 2 / 2, "threshold": limits}
        found = engine.run(feed, {"logits": logits})["logits"]
        doubled = found * 2
        stream.synchronize()
    assert found is logits
    assert_golden(doubled.cpu().numpy() / 2, golden, rows)


def test_outputs_of_unknown_size(build: Callable[..., Built]) -> None:
    from simprune_deploy.engine.loaded_engine import Engine

    built = build(emit_assignments=True, batch=(1, 4))
    golden = golden_of(built)
    with Engine(built.engine, plugin=built.plugin) as engine:
        found = engine.run({"images": golden.images})
    _, *decisions = found
    assert len(decisions) == len(LAYERS)
    wrong = 0
    for row in range(4):
        for name, layer in zip(decisions, LAYERS, strict=True):
            got = found[name][row]
            want = golden.reference.records[layer][row].valid_assignment()
            if got[got >= 0].tolist() != want.tolist():
                wrong += 1
                break
    assert wrong <= 1  # float noise may turn one image's decisions


def test_bench(build: Callable[..., Built]) -> None:
    from typer.testing import CliRunner

    from simprune_deploy.cli import app

    built = build(runtime_threshold=True, batch=(1, 4))
    call = ["bench", str(built.folder), "--iterations", "40", "--thresholds", "0.9,0.7", "--json"]
    if built.plugin is not None:
        call += ["--plugin", str(built.plugin)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["models"][0]["name"] == "dense"
    assert all(row["gpu_ms"]["mean"] > 0 for row in report["models"])
    assert all(row["memory_bytes"]["taken of the GPU"] > 0 for row in report["models"])
