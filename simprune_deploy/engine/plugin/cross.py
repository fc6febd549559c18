"""``plugin build --cross``: what compiling for a Jetson on another machine needs beside nvcc."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    RequirementError,
    argument,
)
from simprune_deploy.engine.plugin.toolchain import CUDA_FOLDER, THOR, NotFoundError, Nvcc
from simprune_deploy.pruning.kernel_library import MACHINES

AARCH64 = "aarch64"
COMPILER = "aarch64-linux-gnu-g++"
CUDA_RUNTIME = "libcudart_static.a"
JETSONS = ("87", "110")
"""What a library for Jetson is built for if nobody says otherwise: Orin and Thor."""

_ELF = b"\x7fELF\x02\x01"
_FIRST_MEMBERS = 1 << 22
"""How much of an archive is looked through for its first object file."""


@dataclasses.dataclass(frozen=True)
class CrossTools:
    """What a build for another processor takes.

    Attributes:
        machine: The processor: "aarch64".
        compiler: The C++ compiler for it.
        cuda_lib: The folder of the static CUDA runtime for it.
        cuda_home: The CUDA whose headers nvcc uses: the folder that has ``include``.
    """

    machine: str
    compiler: Path
    cuda_lib: Path
    cuda_home: Path


def find_cross_tools(machine: str, nvcc: Nvcc, cuda_lib: Path | None = None) -> CrossTools:
    """Find what a build for another processor needs.

    Args:
        machine: The processor; "aarch64" is the one that is known.
        nvcc: The CUDA compiler that will be used.
        cuda_lib: The folder of ``libcudart_static.a``, if the user named it.

    Raises:
        SimpruneError: something is missing; the message has the command that installs it.
    """
    check_cross(machine)
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise NotFoundError(
            f"no {COMPILER} found in PATH: "
            "sudo apt-get install g++-aarch64-linux-gnu libc6-dev-arm64-cross"
        )
    home = _cuda_home(nvcc)
    return CrossTools(machine, Path(compiler), _find_cuda_lib(nvcc, home, cuda_lib), home)


def check_cross(machine: str) -> None:
    """Refuse a processor that is not known, or that is this machine's own."""
    if machine != AARCH64:
        raise InvalidArgumentError(
            f"{argument('cross')} {machine!r} is not known: write {argument('cross', AARCH64)}"
        )
    if platform.machine() == machine:
        raise RequirementError(
            f"this machine is {machine} itself: build without {argument('cross')}"
        )


def jetson_architectures(nvcc: Nvcc) -> str:
    """Return what to build for by default, in this CUDA's own numbers."""
    own = (each if each in nvcc.architectures else THOR.get(each, each) for each in JETSONS)
    return ",".join(own)


def remedy_for_cuda_runtime(nvcc: Nvcc) -> str:
    """Return the commands that fetch the static CUDA runtime; ``pip install`` takes no other
    machine's package."""
    major, minor = nvcc.version.split(".")[:2]
    package = "nvidia-cuda-runtime" if int(major) > 12 else f"nvidia-cuda-runtime-cu{major}"
    inside = f"cu{major}/lib" if int(major) > 12 else "cuda_runtime/lib"
    return (
        "pip download -d cudart --no-deps --only-binary :all: --platform manylinux2014_aarch64 "
        f"'{package}=={major}.{minor}.*' && python -m zipfile -e cudart/*.whl cudart, "
        f"then --cuda-lib cudart/nvidia/{inside}"
    )


def _cuda_home(nvcc: Nvcc) -> Path:
    """Ask nvcc for its headers: it may be a script that calls another one."""
    command = [
        str(nvcc.path),
        "--dryrun",
        "-x",
        "cu",
        "-c",
        os.devnull,
        "-o",
        os.devnull,
    ]
    said = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    ).stderr
    for folder in re.findall(r'"-I([^"]+)"', said):
        if Path(folder, "cuda_runtime.h").is_file():
            return Path(folder).resolve().parent
    raise RequirementError(
        f"{nvcc.path} has no cuda_runtime.h of its own: name an nvcc of a whole CUDA toolkit with "
        f"{argument('nvcc')} (its headers are the same for both machines)"
    )


def _find_cuda_lib(nvcc: Nvcc, home: Path, named: Path | None) -> Path:
    if named is not None:
        if not (named / CUDA_RUNTIME).is_file():
            raise InvalidArgumentError(
                f"{argument('cuda_lib')} {named} holds no {CUDA_RUNTIME}: "
                f"{remedy_for_cuda_runtime(nvcc)}"
            )
        _check_runtime(named, nvcc)
        return named.absolute()
    # NVIDIA's packages for cross-compiling put it beside the CUDA of this machine
    root = home.parents[1] if home.parent.name == "targets" else home
    usual = [
        each / "targets" / f"{kind}-linux" / "lib"
        for each in dict.fromkeys([root, CUDA_FOLDER.resolve()])
        for kind in ("aarch64", "sbsa")
    ]
    for folder in usual:
        if (folder / CUDA_RUNTIME).is_file():
            _check_runtime(folder, nvcc)
            return folder
    raise NotFoundError(
        f"no {CUDA_RUNTIME} for {AARCH64} found ({', '.join(map(str, usual))}): "
        f"{remedy_for_cuda_runtime(nvcc)}"
    )


def _check_runtime(folder: Path, nvcc: Nvcc) -> None:
    """Refuse another processor's runtime, or another CUDA's where that can be seen."""
    path = folder / CUDA_RUNTIME
    try:
        with path.open("rb") as file:
            start = file.read(_FIRST_MEMBERS)
        header = folder.parent / "include" / "cuda_runtime_api.h"
        text = header.read_text(encoding="utf-8", errors="replace") if header.is_file() else ""
    except OSError as error:
        raise RequirementError(f"cannot read {path}: {error.strerror or error}") from None
    at = start.find(_ELF)
    number = struct.unpack_from("<H", start, at + 18)[0] if 0 <= at <= len(start) - 20 else None
    machine = MACHINES.get(number or 0, "no known processor")
    if not start.startswith(b"!<arch>\n") or machine != AARCH64:
        raise RequirementError(
            f"{path} is for {machine}, not for {AARCH64}: {remedy_for_cuda_runtime(nvcc)}"
        )
    version = re.search(r"^\s*#\s*define\s+CUDART_VERSION\s+(\d+)", text, re.M)
    major = nvcc.version.split(".")[0]
    if version is not None and int(version[1]) // 1000 != int(major):
        raise RequirementError(
            f"{path} is of CUDA {int(version[1]) // 1000}, and nvcc of CUDA {nvcc.version}: "
            f"{remedy_for_cuda_runtime(nvcc)}"
        )
