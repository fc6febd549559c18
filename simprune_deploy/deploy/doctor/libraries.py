"""Compiled things: TensorRT in C++, what builds the plugin, the plugin, engines. Do they fit?"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from simprune_deploy.common.errors import ArtifactError, SimpruneError
from simprune_deploy.common.versions import is_older, major
from simprune_deploy.deploy.doctor.findings import Finding, one_line
from simprune_deploy.deploy.doctor.machine import UPDATE_DRIVER, Facts, Machine
from simprune_deploy.engine.compatibility import Here, misfit
from simprune_deploy.engine.engine_metadata import (
    NAMES,
    TENSORRT,
    TENSORRT_RTX,
    EngineMetadata,
    read_engine_metadata,
)
from simprune_deploy.engine.plugin import toolchain
from simprune_deploy.pruning.kernel_library import LIBRARY_VARIABLE, read_info

PLUGINS = (
    Path("plugin", "libsimprune_plugin.so"),
    Path("plugin", "prebuilt", "libsimprune_plugin.so"),
)
"""Where a folder for a device has the plugin's library: compiled there, or come along."""

BUILD_PLUGIN = "simprune-deploy plugin build"


def examine_tools(machine: Machine) -> list[Finding]:
    """Look for TensorRT's C++ library, nvcc and TensorRT's headers."""
    library = _examine_tensorrt_library(machine)
    return [library, _examine_nvcc(), _examine_tensorrt_headers()]


def _examine_tensorrt_library(machine: Machine) -> Finding:
    """Return the version of libnvinfer, from the name that the linker's cache leads to."""
    finding = Finding(
        name="TensorRT library",
        state="optional",
        version="",
        needed_for="C++ programs and trtexec",
        remedy="sudo apt-get install "
        + ("nvidia-jetpack" if toolchain.on_jetson() else "tensorrt"),
        needed=False,
    )
    listed = re.findall(
        r"^\s*libnvinfer\.so\.\d+ .*=> (\S+)$", machine.run(("ldconfig", "-p")) or "", re.M
    )
    for path in listed:
        real = machine.root / path.lstrip("/")
        match = re.search(r"libnvinfer\.so\.([\d.]+)$", str(real.resolve()))
        if match:
            version = match[1]
            too_old = is_older(version, "10.0")
            return dataclasses.replace(
                finding,
                state="too old" if too_old else "ok",
                version=version,
                remedy=finding.remedy if too_old else "",
                detail=path,
            )
    return finding


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
        return dataclasses.replace(finding, detail=one_line(error))
    except SimpruneError as error:
        return dataclasses.replace(finding, state="broken", detail=one_line(error))
    return dataclasses.replace(finding, state="ok", version=version, remedy="", detail=str(place))


def examine_library(
    name: str, path: str | Path, facts: Facts, tensorrt: str, elsewhere: str
) -> Finding:
    """Say what a library of ours is, and whether it fits GPU and driver.

    Args:
        name: What the finding is called.
        path: The library.
        facts: Of this machine's GPU; what is unknown is not compared.
        tensorrt: TensorRT's version here, "" if there is none.
        elsewhere: What else would help beside building it: ", or unset ...".
    """
    finding = Finding(name, "ok", "", "pruning CUDA tensors with its kernels", "")
    remedy = BUILD_PLUGIN + elsewhere
    try:
        info = read_info(path)
        if info.machine != facts.processor:
            raise ArtifactError(
                f"{path} is for {info.machine}, and this machine is {facts.processor}"
            )
        if not info.device_code.sms:
            raise ArtifactError(f"{path} is a {info.kind} library, without code for GPUs")
    except SimpruneError as error:
        return dataclasses.replace(finding, state="broken", remedy=remedy, detail=one_line(error))
    detail = f"{path}: {info.device_code}"
    finding = dataclasses.replace(finding, version=info.version, detail=detail)
    sm = "".join(map(str, facts.capability or ()))
    if sm and not info.device_code.runs_on(sm):
        detail += f", and this GPU is SM {sm}"
        remedy = f"{BUILD_PLUGIN} --arch {sm}{elsewhere}"
        return dataclasses.replace(finding, state="broken", remedy=remedy, detail=detail)
    built, known = major(info.cuda), major(facts.cuda)
    if built is not None and known is not None and known < built:
        detail += f", compiled with CUDA {info.cuda}, and this driver knows CUDA {facts.cuda}"
        remedy = f"{UPDATE_DRIVER}, or {BUILD_PLUGIN} with CUDA {known}'s nvcc"
        return dataclasses.replace(finding, state="broken", remedy=remedy, detail=detail)
    headers = major(info.tensorrt_headers)
    if headers is not None and tensorrt and major(tensorrt) != headers:
        detail += (
            f"; compiled with the headers of TensorRT {headers}, it loads into {tensorrt} but "
            "does not register itself there (SIMPRUNE_REGISTER)"
        )
    return dataclasses.replace(finding, detail=detail)


def examine_named_library(facts: Facts, tensorrt: str) -> Iterator[Finding]:
    """Yield what the library is that SIMPRUNE_LIBRARY names, if it names one."""
    path = os.environ.get(LIBRARY_VARIABLE)
    if path:
        unset = f", or unset {LIBRARY_VARIABLE}"
        yield examine_library(LIBRARY_VARIABLE, path, facts, tensorrt, unset)


def examine_folder(folder: Path, facts: Facts, versions: dict[str, str]) -> Iterator[Finding]:
    """Yield what an exported folder holds: its files, a plugin, engines, and whether they fit.

    Args:
        folder: The folder.
        facts: Of this machine's GPU.
        versions: Of each flavour of TensorRT that is installed.
    """
    from simprune_deploy.engine import ENGINES
    from simprune_deploy.onnx.exported_folder import MANIFEST, read_manifest

    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder: give one that `simprune-deploy` wrote")
    if (folder / MANIFEST).exists():
        export = Finding("export", "ok", "", "verifying and building", "")
        try:
            export = dataclasses.replace(export, version=str(read_manifest(folder)["verdict"]))
        except SimpruneError as error:
            export = dataclasses.replace(
                export,
                state="broken",
                remedy="simprune-deploy export, or copy the folder again",
                detail=one_line(error),
            )
        yield export
    there = [each for each in PLUGINS if (folder / each).is_file()]
    digest = None
    if there:
        library = folder / there[0]
        tensorrt = versions.get(TENSORRT, "")
        found = examine_library(str(there[0]), library, facts, tensorrt, "")
        yield found
        if found.version:
            digest = read_info(library).sha256
    elif named := os.environ.get(LIBRARY_VARIABLE):
        try:
            digest = read_info(named).sha256
        except SimpruneError:
            digest = None  # reported where the variable is
    for engine in sorted((folder / ENGINES).glob("*.engine")):
        yield _examine_engine(engine, facts, versions, digest)


def _examine_engine(
    engine: Path, facts: Facts, versions: dict[str, str], plugin: str | None
) -> Finding:
    name = engine.name if engine.name.isprintable() else ascii(engine.name)
    finding = Finding(name, "ok", "", "running this engine", "")
    try:
        said = read_engine_metadata(engine)
    except SimpruneError as error:
        return dataclasses.replace(
            finding, state="broken", remedy=_build(engine, None), detail=one_line(error)
        )
    sms = ", ".join(said.compute_capabilities)
    finding = dataclasses.replace(finding, version=f"{said.title} for SM {sms}")
    if facts.capability is None:
        # built ahead for another machine, as it should be
        detail = "not compared: no GPU was found here"
        return dataclasses.replace(finding, detail=detail)
    here = Here(
        flavour=said.flavour,
        version=versions.get(said.flavour),
        compute_capability=facts.capability,
        cuda=facts.cuda,
        plugin=plugin,
    )
    problem = misfit(said, here)
    if problem is None:
        return finding
    if here.version is None:
        remedy = {TENSORRT: "pip install tensorrt", TENSORRT_RTX: "pip install tensorrt-rtx"}
        detail = f"{NAMES[said.flavour]} is not installed here"
        return dataclasses.replace(
            finding, state="broken", remedy=remedy[said.flavour], detail=detail
        )
    return dataclasses.replace(
        finding, state="broken", remedy=_build(engine, said), detail=f"it {problem}"
    )


def _build(engine: Path, said: EngineMetadata | None) -> str:
    """Return the command that builds an engine again."""
    command = f"simprune-deploy build {engine.parent.parent}"
    if said is not None and said.flavour == TENSORRT_RTX and said.targets:
        command += f" --target {','.join(said.targets)}"
    return command
