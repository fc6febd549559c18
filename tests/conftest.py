"""Fixtures that more than one file of tests needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import plugin_build
import pytest

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


def made(make: Callable[[], Path]) -> Path:
    """Return what `make` makes; without its tools skip the test, or in CI let it fail."""
    try:
        return make()
    except plugin_build.UnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tensorrt_headers() -> Path:
    """Return a folder of TensorRT's headers."""
    return made(plugin_build.tensorrt_headers)


@pytest.fixture(scope="session")
def host_library() -> Path:
    """Return libsimprune_host.so: the kernels and the plugin on the CPU."""
    return made(plugin_build.host_library)


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    """Return libsimprune_plugin.so for every kept architecture, as `plugin build` made it."""
    return made(plugin_build.plugin_library)


@pytest.fixture(scope="session")
def jetson_library() -> Path:
    """Return libsimprune_plugin.so for Jetson, as `plugin build --cross aarch64` made it."""
    return made(plugin_build.jetson_library)
