"""Fixtures that more than one file of tests needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import plugin_build
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # before anything imports torch: the workers share the cores, and threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

COMPILED = {
    "tensorrt_headers": 600,
    "host_library": 1200,
    "jetson_library": 1200,
    "plugin_library": 3600,
}
"""Fixtures that download or compile, once, and how many seconds the first test may wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = COMPILED.keys() & set(getattr(item, "fixturenames", ()))
        if needed and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(max(COMPILED[name] for name in needed)))


@pytest.fixture(scope="session")
def tensorrt_headers() -> Path:
    """Return a folder of TensorRT's headers."""
    return plugin_build.made(plugin_build.tensorrt_headers)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the stand-in for CUDA, with an Orin in place of this machine's GPU."""
    import running_double

    from simprune_deploy.engine import builders, cuda
    from simprune_deploy.engine.gpu import Gpu
    from simprune_deploy.evaluate.bench import models

    found = running_double.Cuda(12_060)
    monkeypatch.setattr(cuda, "_bindings", lambda: found)

    def orin() -> Gpu:
        return Gpu("Orin", (8, 7), "12.6", 8 << 30)

    for module in (builders, cuda, models):
        monkeypatch.setattr(module, "find_gpu", orin)
    monkeypatch.setattr("cuda.core.utils.StridedMemoryView", running_double.View)
    return found


@pytest.fixture(scope="session")
def deciding_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo model, exported and verified: run-time threshold, batch 1..4, assignments."""
    import simprune_deploy as sd

    folder = tmp_path_factory.mktemp("deciding") / "out"
    vit = sd.load(plugin_build.ROOT / "examples" / "fashion_mnist" / "vit")
    pruned = sd.prune(vit, threshold=0.9, layers=[1, 3])
    options = sd.ExportOptions(runtime_threshold=True, batch=(1, 4), emit_assignments=True)
    result = sd.export(pruned, folder, options)
    assert result.verdict is not None
    assert result.verdict.status == "passed"
    return folder


@pytest.fixture(scope="session")
def host_library() -> Path:
    """Return libsimprune_host.so: the kernels and the plugin on the CPU."""
    return plugin_build.made(plugin_build.host_library)


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    """Return libsimprune_plugin.so for every kept architecture, as `plugin build` made it."""
    return plugin_build.made(plugin_build.plugin_library)


@pytest.fixture(scope="session")
def jetson_library() -> Path:
    """Return libsimprune_plugin.so for Jetson, as `plugin build --cross aarch64` made it."""
    return plugin_build.made(plugin_build.jetson_library)
