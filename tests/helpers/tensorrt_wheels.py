"""NVIDIA's registries and parsers, from wheels that need no GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from plugin_build import PLUGINS, UnavailableError, cached


def installed_rtx() -> Path:
    spec = importlib.util.find_spec("tensorrt_rtx")
    if spec is None or spec.origin is None:
        raise UnavailableError("no tensorrt_rtx: pip install tensorrt-rtx")
    return Path(spec.origin).parent


def installed_lean(version: str) -> Path:
    """Return a folder with the lean runtime of that TensorRT, downloaded once."""
    pins = PLUGINS / "tests" / f"tensorrt-{version}.txt"

    def install(folder: Path) -> None:
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
            *("-r", str(pins), "--target", str(folder)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UnavailableError(
                f"TensorRT {version} cannot be downloaded: {done.stderr.strip()}"
            )

    tag = f"{sys.version_info.major}.{sys.version_info.minor}".encode()
    return cached(f"tensorrt-{version}", [pins.read_bytes(), tag], install)
