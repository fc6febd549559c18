"""The libraries of ``plugins/`` as the tests need them, compiled once and kept in build/test-cache.

What is kept is found again by a hash of the sources, the settings and the compilers, so a change of
any of them compiles anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from places import ROOT

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.engine.plugin import cross, toolchain

PLUGINS = ROOT / "plugins"
CACHE = ROOT / "build" / "test-cache"
HEADERS = PLUGINS / "tests" / "headers.txt"
JSON = PLUGINS / "tests" / "nlohmann-json.txt"
CPP_EXAMPLE = ROOT / "examples" / "cpp"
CUDA_RUNTIME = PLUGINS / "tests" / "cuda-runtime-aarch64.txt"
KEPT = 3
"""How many versions of one thing stay in the cache."""


class UnavailableError(Exception):
    """This machine lacks something that a build needs."""


def made(make: Callable[[], Path]) -> Path:
    """Return what `make` makes; without its tools skip the test, or in CI let it fail."""
    try:
        return make()
    except UnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def tensorrt_headers() -> Path:
    """Return a folder of TensorRT's headers, downloaded once."""

    def download(folder: Path) -> None:
        with zipfile.ZipFile(download_pinned(folder, HEADERS)) as archive:
            for name in archive.namelist():
                if name.startswith("kernel_lens/include/tensorrt/") and name.endswith(".h"):
                    (folder / Path(name).name).write_bytes(archive.read(name))

    return cached("headers", [HEADERS.read_bytes()], download)


def cuda_runtime_for_aarch64() -> Path:
    """Return the folder of the static CUDA runtime for 64-bit Arm, downloaded once."""

    def download(folder: Path) -> None:
        wheel = download_pinned(folder, CUDA_RUNTIME, "manylinux2014_aarch64")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".a"):
                    (folder / Path(name).name).write_bytes(archive.read(name))

    return cached("aarch64-runtime", [CUDA_RUNTIME.read_bytes()], download)


def host_library() -> Path:
    """Return libsimprune_host.so."""
    return cmake_build(
        "host", ["simprune_host"], {"SIMPRUNE_CUDA": "OFF", "SIMPRUNE_HOST": "ON"}
    ).joinpath("libsimprune_host.so")


def plugin_library() -> Path:
    """Return libsimprune_plugin.so for every kept architecture, built by the command line.

    What the command printed (JSON) stands beside it in build.json.
    """
    _need(toolchain.find_nvcc, toolchain.find_cmake, toolchain.check_host_compiler)
    return _built_by_the_command("plugin", "--arch", "all")


def jetson_library() -> Path:
    """Return libsimprune_plugin.so for Jetson, cross-compiled by the command line.

    What the command printed (JSON) stands beside it in build.json.
    """
    _need(toolchain.find_nvcc, toolchain.find_cmake)
    if shutil.which(cross.COMPILER) is None:
        raise UnavailableError(f"no {cross.COMPILER}: plugins/tests/install_cross_tools.sh")
    runtime = str(cuda_runtime_for_aarch64())
    return _built_by_the_command("aarch64", "--cross", "aarch64", "--cuda-lib", runtime)


def _built_by_the_command(name: str, *options: str) -> Path:
    headers = tensorrt_headers()

    def build(folder: Path) -> None:
        command = [
            *(sys.executable, "-m", "simprune_deploy", "plugin", "build", *options),
            *("--tensorrt-include", str(headers), "--output", str(folder / "new"), "--json"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stderr == ""
        assert [path.name for path in (folder / "new").iterdir()] == ["libsimprune_plugin.so"]
        (folder / "new" / "libsimprune_plugin.so").rename(folder / "libsimprune_plugin.so")
        (folder / "new").rmdir()
        (folder / "build.json").write_text(result.stdout)

    package = ROOT / "simprune_deploy"
    tools = [
        package / "engine" / "plugin" / f"{each}.py" for each in ("build", "cross", "toolchain")
    ]
    tools.append(package / "pruning" / "kernel_library.py")
    key = [json.dumps(options).encode(), *(each.read_bytes() for each in tools)]
    key += [*_sources(tests=False), _versions(), headers.name.encode()]
    return cached(name, key, build) / "libsimprune_plugin.so"


def cmake_build(name: str, targets: list[str], settings: dict[str, str]) -> Path:
    """Build targets of plugins/CMakeLists.txt, and return the build folder.

    Args:
        name: What it is called in the cache.
        targets: CMake's names.
        settings: What CMake is given with -D; TensorRT's headers are added.
    """
    _need(toolchain.find_cmake, toolchain.check_host_compiler)
    headers = tensorrt_headers()
    given = {"SIMPRUNE_TENSORRT_INCLUDE": str(headers), **settings}

    def build(folder: Path) -> None:
        _run_cmake(PLUGINS, folder, given, *targets)

    key = [json.dumps([targets, given]).encode(), _versions()]
    return cached(name, [*key, *_sources(tests=given.get("SIMPRUNE_TESTS") == "ON")], build)


def json_headers() -> Path:
    """Return the folder of nlohmann/json.hpp, downloaded once."""

    def download(folder: Path) -> None:
        with zipfile.ZipFile(download_pinned(folder, JSON)) as archive:
            archive.extractall(folder)

    return cached("json", [JSON.read_bytes()], download) / "nlohmann_json" / "include"


def cpp_example(tensorrt: Path) -> Path:
    """Build examples/cpp, linked with a lean runtime of TensorRT, and return the build folder."""
    _need(toolchain.find_cmake, toolchain.check_host_compiler, toolchain.find_nvcc)
    (library,) = (tensorrt / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    headers = tensorrt_headers()
    settings = {"JSON_INCLUDE": str(json_headers()), "TENSORRT_NAMES": "nvinfer_lean"}

    def build(folder: Path) -> None:
        # as TensorRT's own archive has it
        root = folder / "tensorrt"
        (root / "lib").mkdir(parents=True)
        (root / "include").symlink_to(headers)
        for name in (library.name, "libnvinfer_lean.so"):
            (root / "lib" / name).symlink_to(library)
        _run_cmake(CPP_EXAMPLE, folder, {"TENSORRT_ROOT": str(root), **settings})

    sources = [path.read_bytes() for path in sorted(CPP_EXAMPLE.iterdir())]
    key = [json.dumps([settings, str(library), str(headers)]).encode(), _versions(), *sources]
    return cached("cpp-example", key, build)


def _run_cmake(source: Path, folder: Path, settings: dict[str, str], *targets: str) -> None:
    configure = ["cmake", "-S", str(source), "-B", str(folder)]
    configure += [f"-D{key}={value}" for key, value in settings.items()]
    compile_it = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, [*compile_it, *(("--target", *targets) if targets else ())]):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert result.returncode == 0, result.stdout[-8000:]


def download_pinned(folder: Path, pins: Path, platform: str = "") -> Path:
    """Return the wheel that a requirements file pins by hash, downloaded into the folder."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
        *("-r", str(pins), "-d", str(folder)),
        *(("--platform", platform) if platform else ()),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UnavailableError(f"what {pins.name} pins cannot be downloaded: {result.stderr}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _need(*searches: Callable[[], object]) -> None:
    for search in searches:
        try:
            search()
        except SimpruneError as error:
            raise UnavailableError(str(error)) from None


def _sources(tests: bool) -> Iterator[bytes]:
    for path in sorted(PLUGINS.rglob("*")):
        inside = path.relative_to(PLUGINS)
        if path.is_file() and path.suffix != ".md" and (tests or inside.parts[0] != "tests"):
            yield str(inside).encode()
            yield path.read_bytes()


def _versions() -> bytes:
    """Return what the compilers say they are."""
    said = []
    for program in ("c++", cross.COMPILER, "nvcc", "cmake"):
        found = shutil.which(program)
        if found:
            said.append(subprocess.run([found, "--version"], capture_output=True).stdout)
    return b"".join(said)


def cached(name: str, key: list[bytes], make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` filled, now or earlier; other processes wait for the first."""
    digest = hashlib.sha256()
    for part in key:
        digest.update(len(part).to_bytes(8, "little") + part)
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    complete = folder / ".complete"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _lock(CACHE / f"{name}.lock"):
        if not complete.exists():
            # not made elsewhere and moved: what CMake builds knows its own place
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
            of_this_name = CACHE.glob(f"{name}-{'?' * 16}")
            for old in sorted(of_this_name, key=lambda path: path.stat().st_mtime)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
