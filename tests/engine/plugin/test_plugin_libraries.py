"""The plugin's libraries: the C++ tests, what is in the built files, and the library for Jetson."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from plugin_build import PLUGINS, cmake_build

from simprune_deploy.onnx.function_body import ATTRIBUTES, OP_TYPE
from simprune_deploy.pruning.kernel_library import read_info

ENTRIES = {
    "getCreators",
    "setLoggerFinder",
    "simprune_check",
    "simprune_enqueue",
    "simprune_error",
    "simprune_info",
    "simprune_workspace_bytes",
}
"""What a library shows to its loader: the plugin's two entries and the C interface."""
KEPT_ARCHITECTURES = ["75", "80", "86", "87", "89", "90", "100", "110", "120", "121"]
JETSON = ["87", "110"]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sanitize", ["", "address,undefined"])
def test_the_plugin_in_cpp(tensorrt_headers: Path, sanitize: str) -> None:
    """getOutputShapes with a mock IExprBuilder, fields, formats, logging, enqueue on the CPU."""
    folder = cmake_build(
        "cpp-tests" + "-sanitized" * bool(sanitize),
        ["all"],
        {
            "SIMPRUNE_CUDA": "OFF",
            "SIMPRUNE_HOST": "ON",
            "SIMPRUNE_TESTS": "ON",
            "SIMPRUNE_SANITIZE": sanitize,
        },
    )
    said = run("ctest", "--test-dir", folder, "--output-on-failure")
    assert int(re.search(r"0 tests failed out of (\d+)", said)[1]) >= 5  # type: ignore[index]


def test_the_library_has_code_for_every_kept_architecture(plugin_library: Path) -> None:
    info = read_info(plugin_library)
    assert list(info.architectures) == KEPT_ARCHITECTURES
    assert list(info.device_code.sms) == KEPT_ARCHITECTURES


def test_the_library_needs_neither_tensorrt_nor_cuda_to_load(plugin_library: Path) -> None:
    dynamic = run("objdump", "-p", plugin_library)
    needed = set(re.findall(r"NEEDED +(\S+)", dynamic))
    system = ("ld-linux", "libc.so", "libdl.so", "libgcc_s.so", "libm.so", "libstdc++.so")
    assert all(name.startswith(system) for name in needed), needed
    shown = {
        line.split()[-1] for line in run("nm", "-D", "--defined-only", plugin_library).splitlines()
    }
    assert shown == ENTRIES


def test_the_library_for_jetson(jetson_library: Path) -> None:
    """Cross-compiled by `plugin build --cross aarch64`, for Orin and Thor by default."""
    info = read_info(jetson_library)
    assert info.machine == "aarch64"
    assert list(info.device_code.sms) == JETSON
    shown = run("aarch64-linux-gnu-nm", "-D", "--defined-only", jetson_library).splitlines()
    assert {line.split()[-1] for line in shown} == ENTRIES
    # Ubuntu 22.04 of JetPack 6 has glibc 2.35
    versions = re.findall(r"GLIBC_2\.(\d+)", run("aarch64-linux-gnu-objdump", "-p", jetson_library))
    assert max(map(int, versions)) <= 35
    built = json.loads(jetson_library.with_name("build.json").read_text(encoding="utf-8"))
    assert built["library"]["sha256"] == info.sha256


def test_an_arm_processor_loads_the_library_for_jetson(
    jetson_library: Path, tensorrt_headers: Path, tmp_path: Path
) -> None:
    """Loaded by an emulated processor, its creators listed, plugins created."""
    if shutil.which("qemu-aarch64") is None:
        reason = "no qemu-aarch64: apt-get install qemu-user"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    info = read_info(jetson_library)
    program = tmp_path / "list_creators"
    run(
        "aarch64-linux-gnu-g++",
        *("-std=c++17", "-Wall", "-Wextra", "-Werror"),
        *("-isystem", tensorrt_headers, "-isystem", "/usr/local/cuda/include"),
        *(f"-I{PLUGINS / 'include'}", PLUGINS / "tests" / "list_creators.cpp"),
        *("-o", program, "-ldl"),
    )
    (creator,) = json.loads(
        run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, jetson_library)
    )
    assert (creator["name"], creator["version"], creator["namespace"]) == (
        "SimilarityPrune",
        "2",
        "",
    )
    assert creator["fields"] == info.fields
    assert creator["created_from_good_fields"]
    assert not creator["created_from_bad_fields"]


def test_the_plugin_is_the_node_by_name_and_fields(plugin_library: Path) -> None:
    """TensorRT puts the plugin in a node's place by its op_type, and reads attributes by name."""
    info = read_info(plugin_library)
    assert info.operator == OP_TYPE
    assert sorted(info.fields) == sorted(ATTRIBUTES)
    assert info.operator_version == "2"
    for name, kind in info.fields.items():
        assert kind == ("string" if name in ("selection", "reduction") else "int32")
