"""NVIDIA's registries and parsers, from wheels that need no GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_build import PLUGINS, UnavailableError, cached

PROBE = Path(__file__).parent / "registry_probe.py"
LEAN_VERSIONS = ["10.16.1", "11.0.0", "11.4.0"]

FIELDS = {
    "num_prefix_tokens": "INT32",
    "selection": "CHAR",
    "reduction": "CHAR",
    "capacity": "INT32",
    "multiple_of": "INT32",
    "opt_tokens": "INT32",
    "max_tokens": "INT32",
}
DEFAULTS = {
    "num_prefix_tokens": 1,
    "selection": "cover",
    "reduction": "merge",
    "capacity": 0,
    "multiple_of": 1,
    "opt_tokens": 0,
    "max_tokens": 0,
}
ONE_PREFIX = ["num_prefix_tokens", "INT32", 1]

# name -> fields, and what the plugin made from them serializes
GOOD: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "defaults": ([ONE_PREFIX], DEFAULTS),
    "int64": ([["num_prefix_tokens", "INT64", 1]], DEFAULTS),
    "list of one": ([["num_prefix_tokens", "INT32", [1]]], DEFAULTS),
    "strings with NUL": (
        [ONE_PREFIX, ["selection", "CHAR", "redundancy\0"], ["reduction", "CHAR", "drop\0"]],
        {**DEFAULTS, "selection": "redundancy", "reduction": "drop"},
    ),
    "the node's names": ([ONE_PREFIX, ["plugin_version", "CHAR", "1"]], DEFAULTS),
    "all": (
        [
            ["num_prefix_tokens", "INT32", 5],
            ["selection", "CHAR", "redundancy"],
            ["reduction", "CHAR", "drop"],
            ["capacity", "INT32", 64],
            ["multiple_of", "INT32", 8],
            ["opt_tokens", "INT32", 300],
            ["max_tokens", "INT32", 577],
        ],
        {
            "num_prefix_tokens": 5,
            "selection": "redundancy",
            "reduction": "drop",
            "capacity": 64,
            "multiple_of": 8,
            "opt_tokens": 300,
            "max_tokens": 577,
        },
    ),
}

# name -> fields, and the message
BAD: dict[str, tuple[list[Any], str]] = {
    "no fields": ([], "num_prefix_tokens is missing"),
    "negative": ([["num_prefix_tokens", "INT32", -1]], "num_prefix_tokens -1 is outside"),
    "two values": ([["num_prefix_tokens", "INT32", [1, 2]]], "num_prefix_tokens has 2 values"),
    "float": ([["num_prefix_tokens", "FLOAT32", 1.0]], "num_prefix_tokens is of type float32"),
    "string": ([["num_prefix_tokens", "CHAR", "1"]], "num_prefix_tokens is of type string"),
    "unknown selection": ([ONE_PREFIX, ["selection", "CHAR", "nearest"]], 'selection "nearest" is'),
    "unknown reduction": ([ONE_PREFIX, ["reduction", "CHAR", "mean"]], 'reduction "mean" is'),
    "number as selection": ([ONE_PREFIX, ["selection", "INT32", 0]], "selection is of type int32"),
    "capacity": ([ONE_PREFIX, ["capacity", "INT32", 5000]], "capacity 5000 is outside [0, 4096]"),
    "multiple_of": ([ONE_PREFIX, ["multiple_of", "INT32", 0]], "multiple_of 0 is outside [1, "),
    "unknown field": ([ONE_PREFIX, ["treshold", "FLOAT32", 0.9]], 'field "treshold" is not known'),
    "twice": ([ONE_PREFIX, ONE_PREFIX], "num_prefix_tokens is given twice"),
}

LINEAR = [
    ["float32", "float16", "bfloat16"],  # tokens
    ["float32"],  # log_size
    ["float32"],  # threshold
    ["float32"],  # kept_tokens, where the tokens are float32
    ["float32"],  # kept_log_size
    ["int64"],  # kept_index
    ["int64"],  # assignment
    ["int32"],  # the size tensor
]

pytestmark = pytest.mark.timeout(3600)


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
