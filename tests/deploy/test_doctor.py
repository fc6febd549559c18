"""The doctor names what is missing, too old or broken, and the command that puts it right."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import stat
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import simprune_deploy
from simprune_deploy.common.versions import is_older
from simprune_deploy.deploy.doctor import (
    Finding,
    Machine,
    all_needed_present,
    examine,
    libraries,
    packages,
)
from simprune_deploy.deploy.doctor.machine import Facts
from simprune_deploy.engine.gpu import NoGpuError
from simprune_deploy.engine.plugin import toolchain

GOOD = {
    "numpy": "2.0.0",
    "onnx": "1.20.0",
    "onnxruntime": "1.25.0",
    "onnxscript": "0.7.0",
    "polygraphy": "0.53.6",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "timm": "1.0.31",
    "torch": "2.14.1+cpu",
    "torchvision": "0.29.1",
    "typer": "0.29.0",
}
MadeUp = Callable[..., dict[str, Finding]]
NO_GPU = Facts(platform.machine(), (), None, None, None, "no GPU was found")


def nowhere() -> Any:
    raise toolchain.NotFoundError("looked everywhere")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Return a function that examines a made-up machine."""

    def examine_it(
        versions: dict[str, str | None] | None = None,
        failing: dict[str, Exception] | None = None,
        modules: dict[str, Any] | None = None,
        jetson: bool = False,
    ) -> dict[str, Finding]:
        installed = {**GOOD, **(versions or {})}
        made_up = {
            "torch": SimpleNamespace(
                version=SimpleNamespace(cuda="13.0"),
            ),
            "onnxruntime": SimpleNamespace(
                get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
            ),
            **(modules or {}),
        }

        def version(name: str) -> str | None:
            if installed.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        def import_module(name: str) -> Any:
            if failing and name in failing:
                raise failing[name]
            return made_up.get(name, SimpleNamespace())

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(toolchain, "find_nvcc", nowhere)
        monkeypatch.setattr(toolchain, "find_tensorrt_headers", nowhere)
        monkeypatch.setattr(toolchain, "on_jetson", lambda: jetson)
        monkeypatch.delenv("SIMPRUNE_LIBRARY", raising=False)

        def no_gpu() -> Any:
            raise NoGpuError("no GPU was found")

        bare = Machine(Path("/nowhere"), lambda command: None, no_gpu)
        return {finding.name: finding for finding in examine(machine=bare)}

    return examine_it


def test_this_machine() -> None:
    findings = {finding.name: finding for finding in examine()}
    assert findings["python"].state == "ok"
    assert findings["numpy"].version == metadata.version("numpy")
    assert "CPUExecutionProvider" in findings["onnxruntime"].detail
    for finding in findings.values():
        assert finding.needed_for
        assert finding.state == "ok" or finding.remedy
        assert "\n" not in finding.detail


def test_import_is_cheap() -> None:
    code = (
        "import sys, simprune_deploy.deploy.doctor\nprint(*{'torch', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_a_complete_machine(machine: MadeUp) -> None:
    findings = machine()
    assert all_needed_present(list(findings.values()))
    assert {name for name, finding in findings.items() if finding.state == "optional"} == {
        "tensorrt", "tensorrt_rtx", "cuda-bindings", "cuda-core", "CUDA GPU", "TensorRT library",
        "nvcc", "TensorRT headers",
    }  # fmt: skip
    assert findings["onnxruntime"].detail == "CUDAExecutionProvider, CPUExecutionProvider"
    assert findings["CUDA GPU"].detail == "no GPU was found"
    assert "NVIDIA driver" not in findings


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("torch", "pip install 'simprune-deploy[export]'"),
        ("timm", "pip install 'simprune-deploy[export]'"),
        ("onnxscript", "pip install 'simprune-deploy[export]'"),
        ("onnx", "pip install 'onnx>=1.18'"),
        ("rich", "pip install rich"),
    ],
)
def test_missing(machine: MadeUp, name: str, remedy: str) -> None:
    findings = machine({name: None})
    assert findings[name].state == "missing"
    assert findings[name].version == ""
    assert findings[name].remedy == remedy
    assert not all_needed_present(list(findings.values()))


def test_nothing_else_is_imported_without_torch(machine: MadeUp) -> None:
    findings = machine(
        {"torch": None},
        failing={name: AssertionError("imported") for name in ("torch", "torchvision", "timm")},
    )
    assert findings["torchvision"].state == "ok"
    assert findings["torch"].state == "missing"


@pytest.mark.parametrize(
    ("name", "version", "remedy"),
    [
        ("torch", "2.9.1+cu128", "pip install --upgrade 'torch>=2.14' torchvision"),
        ("timm", "1.0.9", "pip install --upgrade 'timm>=1.0.31'"),
        ("onnx", "1.17.0", "pip install --upgrade 'onnx>=1.18'"),
        ("numpy", "1.25.2", "pip install --upgrade 'numpy>=1.26'"),
    ],
)
def test_too_old(machine: MadeUp, name: str, version: str, remedy: str) -> None:
    findings = machine({name: version})
    assert findings[name].state == "too old"
    assert findings[name].version == version
    assert findings[name].remedy == remedy
    assert packages.MINIMUM_VERSIONS[name] in findings[name].detail
    assert not all_needed_present(list(findings.values()))


def test_what_is_too_old_is_what_pip_would_not_install() -> None:
    asked = [each.split(";")[0].strip() for each in metadata.requires("simprune-deploy") or ()]
    oldest = dict(each.split(">=") for each in asked if ">=" in each and "," not in each)
    oldest["python"] = metadata.metadata("simprune-deploy")["Requires-Python"].removeprefix(">=")
    known = {name: oldest[name] for name in packages.MINIMUM_VERSIONS if name in oldest}
    assert known == {n: v for n, v in packages.MINIMUM_VERSIONS.items() if n != "tensorrt"}


def test_torchvision_of_another_torch(machine: MadeUp) -> None:
    error = RuntimeError("operator torchvision::nms does not exist")
    findings = machine(failing={"torchvision": error})
    found = findings["torchvision"]
    assert found.state == "broken"
    assert "does not fit this torch" in found.detail
    assert "torchvision::nms" in found.detail
    assert found.remedy == "pip install --force-reinstall torch torchvision"
    assert not all_needed_present(list(findings.values()))


def test_broken_for_another_reason(machine: MadeUp) -> None:
    error = ImportError("libcudart.so.13:\n cannot open " + "x" * 300)
    findings = machine(failing={"onnxruntime": error, "torchvision": error})
    for name in ("onnxruntime", "torchvision"):
        assert findings[name].state == "broken"
        assert findings[name].detail.startswith("libcudart.so.13: cannot open")
        assert len(findings[name].detail) <= 200
    assert findings["onnxruntime"].remedy == "pip install --force-reinstall onnxruntime"


def test_onnxruntime_gpu_is_onnxruntime(machine: MadeUp) -> None:
    findings = machine({"onnxruntime": None, "onnxruntime-gpu": "1.19.2"})
    assert findings["onnxruntime"].state == "too old"
    assert "'onnxruntime-gpu>=1.21.1'" in findings["onnxruntime"].remedy


def test_broken_tensorrt_does_not_count(machine: MadeUp) -> None:
    findings = machine({"tensorrt": "10.16.1"}, failing={"tensorrt": OSError("libnvinfer.so.10")})
    assert findings["tensorrt"].state == "broken"
    assert all_needed_present(list(findings.values()))


def test_tensorrt_of_jetpack_5(machine: MadeUp) -> None:
    findings = machine({"tensorrt": "8.5.2"}, jetson=True)
    assert findings["tensorrt"].state == "too old"
    assert findings["tensorrt"].remedy == "sudo apt-get install nvidia-jetpack"


def test_package_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", refuse)
    findings = {finding.name: finding for finding in examine()}
    assert findings["numpy"].state == "ok"
    assert findings["numpy"].version == sys.modules["numpy"].__version__


def test_uninstalled_package_that_left_a_folder(machine: MadeUp) -> None:
    assert machine({"onnx": ""})["onnx"].state == "missing"


def test_old_python(machine: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.9.18")
    findings = machine()
    assert findings["python"].state == "too old"
    assert "3.10" in findings["python"].remedy
    assert not all_needed_present(list(findings.values()))


@pytest.mark.parametrize(
    ("cuda", "says"), [("13.0", "built for CUDA 13.0"), (None, "a CPU build, which runs nothing")]
)
def test_torch_says_what_it_was_built_for(machine: MadeUp, cuda: str | None, says: str) -> None:
    torch = SimpleNamespace(version=SimpleNamespace(cuda=cuda))
    found = machine(modules={"torch": torch})["torch"]
    assert found.state == "ok"
    assert found.detail.startswith(says)


@pytest.mark.parametrize(
    ("script", "state", "version", "detail"),
    [
        ("echo 'release 13.0, V13.0.88'; echo compute_87", "ok", "13.0.88", "bin/nvcc"),
        ("echo hello", "broken", "", "names no CUDA release"),
        ("exit 1", "broken", "", "--version failed"),
    ],
)
def test_nvcc(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    state: str,
    version: str,
    detail: str,
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = libraries._examine_nvcc()
    assert (found.state, found.version) == (state, version)
    assert detail in found.detail


def test_missing_nvcc_and_headers_name_the_remedy(machine: MadeUp) -> None:
    for jetson, package in ((False, "pip install 'cuda-toolkit["), (True, "nvidia-jetpack")):
        findings = machine(jetson=jetson)
        assert package in findings["nvcc"].remedy
        assert findings["nvcc"].detail == "looked everywhere"
        assert findings["TensorRT headers"].remedy == "sudo apt-get install libnvinfer-headers-dev"


def test_tensorrt_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_INCLUDE", str(tmp_path))
    for major, state in ((10, "ok"), (8, "broken")):
        (tmp_path / "NvInferVersion.h").write_text(
            f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR 5\n"
        )
        assert libraries._examine_tensorrt_headers().state == state


def test_library_that_is_named(
    machine: MadeUp, monkeypatch: pytest.MonkeyPatch, plugin_library: Path, host_library: Path
) -> None:
    assert "SIMPRUNE_LIBRARY" not in machine()
    (found,) = findings_with(plugin_library, monkeypatch)
    assert (found.state, found.version) == ("ok", simprune_deploy.__version__)
    assert "SM 75, 80" in found.detail
    for path, reason in (
        (host_library, "without code for GPUs"),
        (Path("/nowhere.so"), "does not exist"),
        (Path(__file__), "not a shared library"),
    ):
        (found,) = findings_with(path, monkeypatch)
        assert found.state == "broken"
        assert reason in found.detail
        assert "simprune-deploy plugin build" in found.remedy
        assert not all_needed_present([found])


def findings_with(library: Path, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    monkeypatch.setenv("SIMPRUNE_LIBRARY", str(library))
    return list(libraries.examine_named_library(NO_GPU, ""))


@pytest.mark.parametrize(
    ("version", "minimum", "older"),
    [
        ("2.9.1", "2.14", True),
        ("2.14.0a0+git1234", "2.14", False),
        ("2.14", "2.14", False),
        ("1.0.31.dev0", "1.0.31", False),
        ("1.0.9", "1.0.31", True),
        ("2", "1.26", False),
        ("10", "10.0", False),
        ("unknown", "1.26", False),
    ],
)
def test_is_older(version: str, minimum: str, older: bool) -> None:
    assert is_older(version, minimum) is older
