"""The plugin's library that an engine is built with: which one, and whether it can work here.

It is read, not loaded: a library for another machine or GPU is refused with a sentence.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from simprune_deploy.common.errors import ArtifactError, SimpruneError, argument
from simprune_deploy.common.progress import Progress
from simprune_deploy.engine.gpu import Gpu
from simprune_deploy.engine.plugin.build import BuildOptions, build
from simprune_deploy.engine.plugin.toolchain import (
    check_host_compiler,
    find_cmake,
    find_nvcc,
    find_tensorrt_headers,
)
from simprune_deploy.pruning.kernel_library import (
    ABI_VERSION,
    LIBRARY_VARIABLE,
    LibraryInfo,
    read_info,
)

PLUGIN_FOLDER = "plugin"
LIBRARY = "libsimprune_plugin.so"
PREBUILT = Path(PLUGIN_FOLDER, "prebuilt", LIBRARY)
"""The library that came along in a device's bundle, compiled on another machine."""


def find_library(folder: Path | None, named: Path | None) -> Path | None:
    """Return the library that was named, or the folder's own, or SIMPRUNE_LIBRARY's.

    Args:
        folder: An exported folder, whose ``plugin`` is looked in: for what was compiled here, and
            last for what came along. None: there is none yet.
        named: By the user. Default: looked for.
    """
    if named is not None:
        return named
    if folder is not None and (folder / PLUGIN_FOLDER / LIBRARY).exists():
        return folder / PLUGIN_FOLDER / LIBRARY
    variable = os.environ.get(LIBRARY_VARIABLE)
    if variable:
        return Path(variable)
    return folder / PREBUILT if folder is not None and (folder / PREBUILT).exists() else None


def make_library(folder: Path, progress: Progress) -> Path:
    """Compile the library for the GPU here, into the folder's ``plugin``.

    Raises:
        SimpruneError: nvcc, CMake or TensorRT's headers are missing, or the compilation failed.
    """
    _check_tools(folder)
    return build(BuildOptions(output=folder / PLUGIN_FOLDER), progress).info.path


def check_can_be_made() -> None:
    """Refuse now what :func:`make_library` would refuse later.

    Raises:
        SimpruneError: nvcc, CMake or TensorRT's headers are missing.
    """
    _check_tools(None)


def _check_tools(folder: Path | None) -> None:
    try:
        find_nvcc()
        find_tensorrt_headers()
        find_cmake()
        check_host_compiler()
    except SimpruneError as error:
        where = f" -o {folder / PLUGIN_FOLDER}" if folder is not None else ""
        raise ArtifactError(
            f"the plugin's library is missing, and cannot be built here: {error}; name one with "
            f"{argument('plugin')}, or build it elsewhere with `simprune-deploy plugin "
            f"build{where}`"
        ) from error


def check_library(path: Path, gpu: Gpu) -> LibraryInfo:
    """Read a library and refuse one that cannot work on this machine's GPU.

    Raises:
        SimpruneError: it is missing, damaged, for another processor or GPU, without the TensorRT
            plugin, or of another version of the operator's interface.
    """
    info = read_info(path)
    again = f"`simprune-deploy plugin build -o {path.parent} --force` on this machine"
    if info.kind != "plugin" or info.tensorrt_headers is None:
        raise ArtifactError(f"{path} has no TensorRT plugin in it ({info.kind}): name {LIBRARY}")
    if info.machine != platform.machine():
        raise ArtifactError(
            f"{path} is for {info.machine}, and this machine is {platform.machine()}: {again}"
        )
    if info.abi != ABI_VERSION:
        raise ArtifactError(
            f"{path} has C interface {info.abi} (simprune-deploy {info.version}), and this version "
            f"speaks {ABI_VERSION}: {again}"
        )
    if info.cuda is not None and int(info.cuda.split(".")[0]) > int(gpu.cuda.split(".")[0]):
        raise ArtifactError(
            f"{path} was compiled with CUDA {info.cuda}, and the driver here knows CUDA "
            f"{gpu.cuda}: {again}"
        )
    if not info.device_code.runs_on(gpu.sm):
        raise ArtifactError(
            f"{path} has code for {info.device_code}, and the GPU here ({gpu.name}) is "
            f"SM {gpu.sm}: {again}"
        )
    return info
