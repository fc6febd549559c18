"""What a build of the plugin needs, and where machines keep it: nvcc, TensorRT's headers, CMake.

Every search says where it looked, and takes the user's word (a flag, then an environment variable)
before what it finds by itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    RequirementError,
    SimpruneError,
    ToolFailedError,
    argument,
)

KEPT_ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "110", "120", "121")
"""What "all" builds for, as far as the nvcc at hand knows it."""

OLDEST_CMAKE = (3, 18)
OLDEST_CUDA = (12, 0)
OLDEST_TENSORRT = (10, 0)

CUDA_FOLDER = Path("/usr/local/cuda")
TENSORRT_FOLDERS = ("/usr/local/tensorrt", "/usr/local/TensorRT", "/opt/tensorrt", "/opt/TensorRT")
SYSTEM_INCLUDE = Path("/usr/include")
DEVICE_TREE = Path("/proc/device-tree/compatible")

JETSONS = {"tegra234": "87", "tegra264": "110"}
"""GPU architectures of the Jetsons with TensorRT 10 or later (Orin, Thor) by their chip's name."""

THOR = {"101": "110", "110": "101"}
"""Jetson Thor's architecture is 101 for CUDA 12 and 110 from CUDA 13 on."""


class NotFoundError(SimpruneError):
    """What was looked for is nowhere, and the user named no place for it."""


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler.

    Attributes:
        path: The program.
        version: Such as "13.0.88".
        architectures: The GPU architectures it compiles for, such as ("75", "80").
    """

    path: Path
    version: str
    architectures: tuple[str, ...]

    @property
    def unknown_library_folder(self) -> Path | None:
        """Where the CUDA runtime is, if this nvcc does not know.

        NVIDIA's Python wheels keep it in lib, and their nvcc looks in lib64.
        """
        root = self.path.resolve().parent.parent
        if (root / "lib" / "libcudart_static.a").is_file() and not (root / "lib64").exists():
            return root / "lib"
        return None


@dataclasses.dataclass(frozen=True)
class TensorRTHeaders:
    """A folder of TensorRT's headers and their version, such as "10.14"."""

    folder: Path
    version: str


@dataclasses.dataclass(frozen=True)
class CMake:
    """A CMake, and the generator it is to use."""

    path: Path
    version: str
    generator: str


# --- nvcc -----------------------------------------------------------------------------------------


def find_nvcc(path: Path | None = None) -> Nvcc:
    """Find the CUDA compiler and ask it what it is.

    Args:
        path: The program, if the user named it.

    Raises:
        SimpruneError: there is none, or it does not answer.
    """
    return ask_nvcc(locate_nvcc(path))


def locate_nvcc(path: Path | None = None) -> Path:
    """Return where nvcc is, without running it. Arguments and errors: :func:`find_nvcc`."""
    for named, source in ((path, "--nvcc"), (os.environ.get("CUDACXX"), "CUDACXX")):
        if named:
            found = shutil.which(named)
            if found is None:
                raise RequirementError(f"{source} {named} is not a program: name nvcc itself")
            return Path(found).absolute()
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += ["nvcc", str(CUDA_FOLDER / "bin" / "nvcc"), *map(str, _nvcc_wheels())]
    found = next((found for name in candidates if (found := shutil.which(name))), None)
    if found is None:
        raise NotFoundError(
            f"no nvcc found ({argument('nvcc')}, CUDACXX, CUDA_HOME, PATH, "
            f"{CUDA_FOLDER / 'bin'}): {remedy_for_nvcc()}, or name it with {argument('nvcc')}"
        )
    return Path(found).absolute()


def _nvcc_wheels() -> Iterator[Path]:
    """Yield where NVIDIA's Python wheels would have put nvcc."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
        yield Path(folder, "cuda_nvcc", "bin", "nvcc")


def ask_nvcc(path: Path) -> Nvcc:
    """Return the version and the architectures of the nvcc at `path`."""
    match = re.search(r"release \d+\.\d+, V((\d+)\.(\d+)\.\d+)", _ask(path, "--version"))
    if match is None:
        raise RequirementError(f"{path} --version names no CUDA release: is it NVIDIA's nvcc?")
    version = match[1]
    if (int(match[2]), int(match[3])) < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise RequirementError(
            f"CUDA {version} ({path}) is older than {oldest}: {remedy_for_nvcc()}, or name a newer "
            f"nvcc with {argument('nvcc')}"
        )
    known = re.findall(r"^compute_(\d+)$", _ask(path, "--list-gpu-arch"), re.M)
    if not known:
        raise RequirementError(
            f"{path} --list-gpu-arch names no architecture: is it NVIDIA's nvcc?"
        )
    return Nvcc(path, version, tuple(sorted(set(known), key=int)))


def remedy_for_nvcc() -> str:
    """Return the command that installs nvcc on this kind of machine."""
    if on_jetson():
        return "sudo apt-get install nvidia-jetpack"
    return "pip install 'cuda-toolkit[nvcc,cudart,cccl]'"


def _ask(program: Path, option: str) -> str:
    """Return what a program prints; nothing may be waiting for an answer from a terminal."""
    try:
        return subprocess.run(
            [program, option],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        said = " ".join(f"{error.stdout} {error.stderr}".split())[:200]
        raise ToolFailedError(f"{program} {option} failed: {said or error}") from None
    except OSError as error:
        raise ToolFailedError(f"cannot run {program}: {error.strerror or error}") from None


# --- architectures --------------------------------------------------------------------------------


def choose_architectures(wish: str | None, nvcc: Nvcc) -> tuple[str, ...]:
    """Return the GPU architectures to build for.

    Args:
        wish: "native" (the GPUs of this machine), "all" (every kept one that nvcc knows), or a
            list such as "87,110"; None: native where there is a GPU, else all.
        nvcc: The compiler that must know them.

    Raises:
        SimpruneError: the wish is not understood, no GPU is found for "native", or nvcc does not
            know an architecture.
    """
    if wish is None:
        native = native_architectures(nvcc)
        wish = ",".join(native) if native else "all"
    elif wish == "native":
        wish = ",".join(native_architectures(nvcc))
        if not wish:
            raise InvalidArgumentError(
                f"{argument('arch', 'native')}: no GPU found (nvidia-smi lists none, and this is "
                f"no Jetson Orin or "
                f"Thor): name the GPU's architecture, such as {argument('arch', '87')}, or say "
                f"{argument('arch', 'all')}"
            )
    if wish == "all":
        kept = [
            each if each in nvcc.architectures else THOR.get(each, each)
            for each in KEPT_ARCHITECTURES
        ]
        return tuple(each for each in kept if each in nvcc.architectures)
    return _check_architectures(wish, nvcc)


def _check_architectures(wish: str, nvcc: Nvcc) -> tuple[str, ...]:
    chosen = set()
    for part in wish.split(","):
        match = re.fullmatch(r"(?:sm_)?(\d+)(?:\.(\d))?", part.strip())
        if match is None:
            raise InvalidArgumentError(
                f"{argument('arch')} {wish!r} is not understood: write 'native', 'all', or GPU "
                f"architectures "
                "such as 87,110 (Jetson Orin, Thor)"
            )
        name = "".join(match.groups(default=""))
        if name not in nvcc.architectures:
            other = THOR.get(name)
            raise InvalidArgumentError(
                f"{argument('arch')} {name} is not known to CUDA {nvcc.version} ({nvcc.path}), "
                f"which compiles "
                f"for {', '.join(nvcc.architectures)}: "
                + (
                    f"write {other} for Jetson Thor"
                    if other in nvcc.architectures
                    else f"choose among these, or name another CUDA with {argument('nvcc')}"
                )
            )
        chosen.add(name)
    return tuple(sorted(chosen, key=int))


def native_architectures(nvcc: Nvcc) -> tuple[str, ...]:
    """Return the architectures of this machine's GPUs, none if it has no GPU."""
    found = set()
    for name in re.findall(r"tegra\d+", _read_device_tree()):
        if name in JETSONS:
            own = JETSONS[name]
            found.add(own if own in nvcc.architectures else THOR.get(own, own))
    program = shutil.which("nvidia-smi")
    if program is not None:
        # fails where there is no driver, and prints "[N/A]" for a Jetson's own GPU
        with_driver = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if with_driver.returncode == 0:
            found |= {
                major + minor
                for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", with_driver.stdout, re.M)
            }
    return tuple(sorted(found, key=int))


def on_jetson() -> bool:
    """Return whether this is a Jetson."""
    return Path("/etc/nv_tegra_release").exists() or "nvidia,tegra" in _read_device_tree()


def _read_device_tree() -> str:
    try:
        return DEVICE_TREE.read_bytes().decode("ascii", "replace")
    except OSError:
        return ""


# --- TensorRT's headers ---------------------------------------------------------------------------


def find_tensorrt_headers(folder: Path | None = None) -> TensorRTHeaders:
    """Find TensorRT's headers, 10.0 or later.

    Args:
        folder: Where they are, if the user said so: the folder itself or TensorRT's root.

    Raises:
        SimpruneError: there are none, or only older ones.
    """
    named: list[tuple[str, Path | str | None]] = [("--tensorrt-include", folder)]
    for variable in ("TENSORRT_INCLUDE", "TENSORRT_ROOT", "TRT_ROOT"):
        named.append((variable, os.environ.get(variable)))
    for source, place in named:
        if place:
            found = _headers_below(Path(place))
            if found is None:
                raise RequirementError(
                    f"{source} {place} holds no NvInferRuntime.h (also not in its include folder): "
                    "name the folder of TensorRT's C++ headers"
                )
            return _check_version(found)

    usual = [SYSTEM_INCLUDE / _triplet(), SYSTEM_INCLUDE, *map(Path, TENSORRT_FOLDERS)]
    too_old: SimpruneError | None = None
    for place in usual:
        found = _headers_below(place)
        if found is not None:
            try:
                return _check_version(found)
            except SimpruneError as error:
                too_old = too_old or error
    raise too_old or NotFoundError(
        "no TensorRT headers (NvInferRuntime.h) found in TENSORRT_INCLUDE, TENSORRT_ROOT, "
        f"{', '.join(map(str, usual))}: {remedy_for_headers()}, or unpack TensorRT and name its "
        f"include folder with {argument('tensorrt_include')}; {argument('kernels_only', True)} "
        f"builds without them"
    )


def remedy_for_headers() -> str:
    """Return the command that installs TensorRT's headers where NVIDIA's packages are known."""
    return "sudo apt-get install libnvinfer-headers-dev"


def _triplet() -> str:
    return f"{platform.machine()}-linux-gnu"


def _headers_below(place: Path) -> Path | None:
    for folder in (place, place / "include", place / "include" / _triplet()):
        if (folder / "NvInferRuntime.h").is_file():
            return folder.absolute()
    return None


def _check_version(folder: Path) -> TensorRTHeaders:
    path = folder / "NvInferVersion.h"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequirementError(f"cannot read {path}: {error.strerror or error}") from None
    numbers = []
    for part in ("MAJOR", "MINOR"):
        # where both are there, NV_TENSORRT_* refers to the other one by name
        match = re.search(
            rf"^\s*#\s*define\s+(?:TRT_{part}_ENTERPRISE|NV_TENSORRT_{part})\s+(\d+)", text, re.M
        )
        if match is None:
            raise RequirementError(
                f"{path} does not tell TensorRT's version: are these its headers?"
            )
        numbers.append(int(match.group(1)))
    version = ".".join(map(str, numbers))
    if tuple(numbers) < OLDEST_TENSORRT:
        raise RequirementError(
            f"TensorRT {version} in {folder} is too old: its plugins have no IPluginV3, which "
            "begins with 10.0 (JetPack 6; JetPack 5 has TensorRT 8 and cannot load this plugin)"
        )
    return TensorRTHeaders(folder, version)


# --- CMake and the host's compiler ----------------------------------------------------------------


def find_cmake() -> CMake:
    """Find CMake, in PATH or as a Python wheel, and the tool that it drives.

    Raises:
        SimpruneError: there is none, it is too old, or there is neither make nor ninja.
    """
    oldest = ".".join(map(str, OLDEST_CMAKE))
    remedy = f"`pip install cmake`, or sudo apt-get install cmake ({oldest} or later)"
    candidates = [path for path in (shutil.which("cmake"), _cmake_wheel()) if path]
    too_old = ""
    for path in candidates:
        match = re.search(r"cmake version ((\d+)\.(\d+)\S*)", _ask(Path(path), "--version"))
        if match is None:
            too_old = too_old or f"{path} --version names no version"
        elif (int(match[2]), int(match[3])) < OLDEST_CMAKE:
            too_old = too_old or f"CMake {match[1]} ({path}) is older than {oldest}"
        else:
            return CMake(Path(path), match[1], _find_generator())
    raise RequirementError(f"{too_old or 'no CMake found in PATH'}: {remedy}")


def _cmake_wheel() -> str | None:
    """Return the program inside the cmake wheel, which PATH need not lead to."""
    spec = importlib.util.find_spec("cmake")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = shutil.which(str(Path(folder, "data", "bin", "cmake")))
        if found:
            return found
    return None


def _find_generator() -> str:
    if shutil.which("make"):
        return "Unix Makefiles"
    if shutil.which("ninja"):
        return "Ninja"
    raise RequirementError("neither make nor ninja found: sudo apt-get install build-essential")


def check_host_compiler() -> str:
    """Return the C++ compiler that CMake will take.

    Raises:
        SimpruneError: there is none, or CXX names none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise RequirementError(
                f"CXX {named[0]} is not a program: name a C++ compiler, or unset it"
            )
        return named[0]
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise RequirementError("no C++ compiler found: sudo apt-get install g++")
