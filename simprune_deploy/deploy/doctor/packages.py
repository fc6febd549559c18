"""Python and its packages: what is installed, what is missing, and the command that installs it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import platform
import sys
import warnings
from importlib import metadata
from typing import Any

from simprune_deploy.common.versions import is_older
from simprune_deploy.deploy.doctor.findings import Finding, State, one_line
from simprune_deploy.engine.plugin import toolchain

MINIMUM_VERSIONS = {
    "python": "3.10",
    "numpy": "1.26",
    "onnx": "1.18",
    "onnxruntime": "1.21.1",
    "onnxscript": "0.5",
    "polygraphy": "0.53",
    "safetensors": "0.4.5",
    # IPluginV3, which the plugin implements, begins with TensorRT 10
    "tensorrt": "10.0",
    "timm": "1.0.31",
    "torch": "2.14",
}
"""The oldest version of each that works; what is not listed may have any version."""

EXPORT_EXTRA = "pip install 'simprune-deploy[export]'"
ENGINE_EXTRA = "pip install 'simprune-deploy[engine]'"
MATCHING_TORCHVISION = "pip install --force-reinstall torch torchvision"


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
        _Package("cuda-bindings", "running engines", ENGINE_EXTRA, needed=False),
        _Package("cuda-core", "running engines", ENGINE_EXTRA, needed=False),
    ]


def examine_packages() -> list[Finding]:
    """Look for Python and every package this project can use."""
    findings = {"python": _examine_python()}
    for package in _packages():
        findings[package.name] = _examine_package(package)
    if findings["torch"].state == "ok":
        findings["torch"] = _with_cuda(findings["torch"])
        if findings["torchvision"].state == "ok":
            findings["torchvision"] = _try_torchvision(findings["torchvision"])
    if findings["onnxruntime"].state == "ok":
        findings["onnxruntime"] = _with_providers(findings["onnxruntime"])
    return list(findings.values())


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


def _import_problem(module: str) -> str:
    """Return why a module cannot be imported, in one line; "" if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    # a compiled package that does not fit raises ImportError, OSError, RuntimeError, ...
    except Exception as error:
        return one_line(error)
    return ""


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


def _with_cuda(finding: Finding) -> Finding:
    """Say which CUDA torch was built for; a CPU build exports and verifies as well."""
    cuda = importlib.import_module("torch").version.cuda
    built = f"built for CUDA {cuda}" if cuda else "a CPU build, which runs nothing on a GPU"
    return dataclasses.replace(finding, detail=built)
