"""What is installed, what is missing, and the command that installs it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from simprune_deploy.errors import SimpruneError
from simprune_deploy.plugin import LIBRARY_VARIABLE, toolchain
from simprune_deploy.plugin.info import read_info

State = Literal["ok", "missing", "too old", "broken", "optional"]

MINIMUM_VERSIONS = {
    "python": "3.10",
    "numpy": "1.26",
    "onnx": "1.18",
    "onnxruntime": "1.20",
    "onnxscript": "0.5",
    "polygraphy": "0.53",
    "safetensors": "0.4",
    # IPluginV3, which the plugin implements, begins with TensorRT 10
    "tensorrt": "10.0",
    "timm": "1.0.31",
    "torch": "2.14",
}
"""The oldest version of each that works; what is not listed may have any version."""

EXPORT_EXTRA = "pip install 'simprune-deploy[export]'"
MATCHING_TORCHVISION = "pip install --force-reinstall torch torchvision"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: What was looked for.
        state: "ok"; "missing", "too old" or "broken"; "optional" for what is not there and need
            not be.
        version: What was found, "" if nothing.
        needed_for: What does not work without it.
        remedy: The command that puts it right, "" if nothing is to be done.
        detail: What else there is to know, in one line; "" if nothing.
        needed: False for what only some users need, whatever its state. Default True.
    """

    name: str
    state: State
    version: str
    needed_for: str
    remedy: str
    detail: str = ""
    needed: bool = True


@dataclasses.dataclass(frozen=True)
class _Package:
    """A Python package to look for.

    Attributes:
        name: As in MINIMUM_VERSIONS; its module is called the same.
        needed_for: What does not work without it.
        remedy: The command that installs it, if it is missing.
        imported: Only an import tells whether it works: it has compiled parts that may not fit.
        distributions: What pip may call it, if not `name`.
        needed: False for what only some users need. Default True.
    """

    name: str
    needed_for: str
    remedy: str
    imported: bool = False
    distributions: tuple[str, ...] = ()
    needed: bool = True


def _core(name: str, needed_for: str, **details: Any) -> _Package:
    minimum = MINIMUM_VERSIONS.get(name)
    wish = f"'{name}>={minimum}'" if minimum else name
    return _Package(name, needed_for, f"pip install {wish}", **details)


def _packages() -> list[_Package]:
    tensorrt = (
        "sudo apt-get install nvidia-jetpack" if toolchain.on_jetson() else "pip install tensorrt"
    )
    return [
        _core("numpy", "everything", imported=True),
        _core("onnx", "writing and reading ONNX files", imported=True),
        _core(
            "onnxruntime",
            "running ONNX files, the reference of every check",
            imported=True,
            distributions=("onnxruntime", "onnxruntime-gpu"),
        ),
        _core("polygraphy", "comparing runtimes"),
        _core("typer", "the command line"),
        _core("rich", "the command line"),
        _Package("torch", "pruning and exporting models", EXPORT_EXTRA, imported=True),
        _Package("torchvision", "timm, which imports it", EXPORT_EXTRA),
        _Package("timm", "the models and their transforms", EXPORT_EXTRA),
        _Package("onnxscript", "exporting models", EXPORT_EXTRA),
        _Package("safetensors", "reading checkpoints", EXPORT_EXTRA),
        _Package(
            "tensorrt",
            "building engines on the device they run on",
            tensorrt,
            imported=True,
            needed=False,
        ),
        _Package(
            "tensorrt_rtx",
            "building TensorRT-RTX engines, also without a GPU",
            "pip install tensorrt-rtx",
            imported=True,
            distributions=("tensorrt-rtx",),
            needed=False,
        ),
    ]


def examine() -> list[Finding]:
    """Look for everything this project can use, and return one finding for each."""
    findings = {"python": _examine_python()}
    for package in _packages():
        findings[package.name] = _examine_package(package)
    torch_works = findings["torch"].state == "ok"
    if torch_works and findings["torchvision"].state == "ok":
        findings["torchvision"] = _try_torchvision(findings["torchvision"])
    if findings["onnxruntime"].state == "ok":
        findings["onnxruntime"] = _with_providers(findings["onnxruntime"])
    return [
        *findings.values(),
        _examine_gpu(torch_works),
        _examine_nvcc(),
        _examine_tensorrt_headers(),
        *_examine_library(),
    ]


def all_needed_present(findings: list[Finding]) -> bool:
    """Return whether nothing is missing, too old or broken that every user needs."""
    return all(finding.state in ("ok", "optional") for finding in findings if finding.needed)


def _examine_python() -> Finding:
    version = platform.python_version()
    minimum = MINIMUM_VERSIONS["python"]
    if is_older(version, minimum):
        remedy = f"install Python {minimum} or later, and make a new virtual environment with it"
        return Finding("python", "too old", version, "everything", remedy, f"needs {minimum}")
    return Finding("python", "ok", version, "everything", "")


def _examine_package(package: _Package) -> Finding:
    finding = Finding(
        package.name, "ok", _find_version(package), package.needed_for, "", needed=package.needed
    )
    if not finding.version:
        state: State = "missing" if package.needed else "optional"
        return dataclasses.replace(finding, state=state, remedy=package.remedy)
    minimum = MINIMUM_VERSIONS.get(package.name, "0")
    if is_older(finding.version, minimum):
        return dataclasses.replace(
            finding,
            state="too old",
            remedy=_upgrade_command(package, minimum),
            detail=f"needs {minimum} or later",
        )
    if package.imported and (problem := _import_problem(package.name)):
        distribution = _distribution(package)
        return dataclasses.replace(
            finding,
            state="broken",
            remedy=f"pip install --force-reinstall {distribution}",
            detail=problem,
        )
    return finding


def _find_version(package: _Package) -> str:
    """Return the version, "" if it is not installed, "unknown" if it does not tell."""
    for distribution in package.distributions or (package.name,):
        with contextlib.suppress(metadata.PackageNotFoundError):
            # None where an uninstall left a folder without metadata behind
            if version := metadata.version(distribution):
                return version
    # system packages and hand-made builds may come without metadata
    if importlib.util.find_spec(package.name) is None or _import_problem(package.name):
        return ""
    return str(getattr(sys.modules[package.name], "__version__", "unknown"))


def _distribution(package: _Package) -> str:
    """Return pip's name of the installed package: onnxruntime may be onnxruntime-gpu."""
    names = package.distributions or (package.name,)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            if metadata.version(name):
                return name
    return names[0]


def _upgrade_command(package: _Package, minimum: str) -> str:
    if package.name == "tensorrt" and toolchain.on_jetson():
        return package.remedy
    # torchvision is built for one torch, and follows it
    also = " torchvision" if package.name == "torch" else ""
    return f"pip install --upgrade '{_distribution(package)}>={minimum}'{also}"


def is_older(version: str, minimum: str) -> bool:
    """Compare the numbers at the start of versions; one without numbers counts as new enough."""
    numbers = _numbers(version)
    return bool(numbers) and numbers < _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()  # 10 is as new as 10.0
    return tuple(numbers)


def _import_problem(module: str) -> str:
    """Return why a module cannot be imported, in one line; "" if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    # a compiled package that does not fit raises ImportError, OSError, RuntimeError, ...
    except Exception as error:
        return _one_line(error)
    return ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _try_torchvision(finding: Finding) -> Finding:
    """Import torchvision, which fails where its compiled part was built for another torch."""
    problem = _import_problem("torchvision")
    if not problem:
        return finding
    if "torchvision::nms" in problem:
        problem = (
            "its compiled part does not fit this torch (a CUDA build beside a CPU torch, or "
            f"another version), so timm cannot be imported: {problem}"
        )
    return dataclasses.replace(finding, state="broken", remedy=MATCHING_TORCHVISION, detail=problem)


def _with_providers(finding: Finding) -> Finding:
    providers = importlib.import_module("onnxruntime").get_available_providers()
    return dataclasses.replace(finding, detail=", ".join(providers))


def _examine_gpu(torch_works: bool) -> Finding:
    """Return the GPUs that torch sees, or why it sees none."""
    finding = Finding(
        name="CUDA GPU",
        state="optional",
        version="",
        needed_for="running engines and timing them",
        remedy="install NVIDIA's driver (nvidia-smi must list the GPU)",
        needed=False,
    )
    if not torch_works:
        return dataclasses.replace(finding, detail="not looked for: torch does not work")
    torch = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visible = torch.cuda.is_available()
    if not visible:
        if torch.version.cuda is None:
            return dataclasses.replace(
                finding, detail="this torch is a CPU build", remedy=MATCHING_TORCHVISION
            )
        return dataclasses.replace(finding, detail="torch sees none")
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"{name} (compute capability {major}.{minor})")
    return dataclasses.replace(finding, state="ok", version=", ".join(names), remedy="")


def _examine_nvcc() -> Finding:
    """Return the CUDA compiler's version; only its own words tell that it runs."""
    finding = Finding(
        name="nvcc",
        state="optional",
        version="",
        needed_for="building the TensorRT plugin from source",
        remedy=toolchain.remedy_for_nvcc(),
        needed=False,
    )

    def find() -> tuple[str, Path]:
        nvcc = toolchain.find_nvcc()
        return nvcc.version, nvcc.path

    return _looked_for(finding, find)


def _examine_tensorrt_headers() -> Finding:
    """Return the version of TensorRT's C++ headers, which its Python packages do not bring."""
    finding = Finding(
        name="TensorRT headers",
        state="optional",
        version="",
        needed_for="building the TensorRT plugin from source",
        remedy=toolchain.remedy_for_headers(),
        needed=False,
    )

    def find() -> tuple[str, Path]:
        headers = toolchain.find_tensorrt_headers()
        return headers.version, headers.folder

    return _looked_for(finding, find)


def _looked_for(finding: Finding, find: Callable[[], tuple[str, Path]]) -> Finding:
    """Return the finding with the version and the place that `find` gives, or why it gives none."""
    try:
        version, place = find()
    except toolchain.NotFoundError as error:
        return dataclasses.replace(finding, detail=_one_line(error))
    except SimpruneError as error:
        return dataclasses.replace(finding, state="broken", detail=_one_line(error))
    return dataclasses.replace(finding, state="ok", version=version, remedy="", detail=str(place))


def _examine_library() -> Iterator[Finding]:
    """Yield what the library is that SIMPRUNE_LIBRARY names, if it names one."""
    path = os.environ.get(LIBRARY_VARIABLE)
    if not path:
        return
    finding = Finding(
        name=LIBRARY_VARIABLE,
        state="ok",
        version="",
        needed_for="pruning CUDA tensors with its kernels",
        remedy="",
    )
    try:
        info = read_info(path)
        if info.machine != platform.machine():
            raise SimpruneError(
                f"{path} is for {info.machine}, and this machine is {platform.machine()}"
            )
        if not info.device_code.sms:
            raise SimpruneError(f"{path} is a {info.kind} library, without code for GPUs")
    except SimpruneError as error:
        remedy = f"simprune-deploy plugin build, or unset {LIBRARY_VARIABLE}"
        yield dataclasses.replace(finding, state="broken", remedy=remedy, detail=_one_line(error))
        return
    yield dataclasses.replace(finding, version=info.version, detail=f"{path}: {info.device_code}")
