"""``plugin build``: compile the CUDA kernels and the TensorRT plugin for the GPUs at hand.

CMake does the work (``plugins/CMakeLists.txt``, which also works by itself); this module finds what
it needs, says in one line what is missing, and holds the result against what was asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from simprune_deploy.common.errors import (
    DestinationError,
    InvalidArgumentError,
    RequirementError,
    ToolFailedError,
    argument,
)
from simprune_deploy.common.files import as_user_error, staged_file
from simprune_deploy.common.progress import Progress
from simprune_deploy.common.versions import __version__
from simprune_deploy.engine.plugin.cross import (
    CrossTools,
    check_cross,
    find_cross_tools,
    jetson_architectures,
)
from simprune_deploy.engine.plugin.toolchain import (
    CMake,
    Nvcc,
    TensorRTHeaders,
    check_host_compiler,
    choose_architectures,
    find_cmake,
    find_nvcc,
    find_tensorrt_headers,
)
from simprune_deploy.pruning.kernel_library import LibraryInfo, read_info

DEFAULT_OUTPUT = Path("simprune-plugin")

SOURCES = ("CMakeLists.txt", "README.md", "version.txt", "cmake/*.cmake", "include/*.h", "src/*")
"""What a build takes, in the source folder; as pyproject.toml has it for the package."""

_NOT_FOR_CMAKE = re.compile(
    # those of a make that runs us: they name its job server
    r"MAKEFLAGS|MAKELEVEL|MFLAGS|GNUMAKEFLAGS"
    # options for nvcc, such as -use_fast_math: they would change results unnoticed
    r"|CUDAFLAGS|CUDAARCHS|NVCC_APPEND_FLAGS|NVCC_PREPEND_FLAGS"
    # CMake's own settings, but for a compiler cache
    r"|CMAKE_(?!\w+_LAUNCHER$)\w+"
)
"""Variables that a build does not pass on; the host's CXX, CXXFLAGS and LDFLAGS it does."""

_FOR_THIS_MACHINE = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX")
"""Variables that a build for another processor does not pass on either."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        arch: "native", "all" or a list such as "87,110". Default: native where there is a GPU,
            else all; Jetson Orin and Thor for another processor.
        output: The folder for the library. Default "simprune-plugin".
        kernels_only: Leave the TensorRT plugin out, which needs no TensorRT headers. Default False.
        nvcc: The CUDA compiler. Default: looked for.
        tensorrt_include: The folder of TensorRT's headers. Default: looked for.
        force: Replace a library that is there. Default False.
        cross: The processor to build for, "aarch64". Default: this machine's.
        cuda_lib: With `cross`, the folder of that processor's static CUDA runtime. Default: looked
            for.
    """

    arch: str | None = None
    output: Path = DEFAULT_OUTPUT
    kernels_only: bool = False
    nvcc: Path | None = None
    tensorrt_include: Path | None = None
    force: bool = False
    cross: str | None = None
    cuda_lib: Path | None = None

    @property
    def library(self) -> Path:
        """The file to write."""
        return self.output / f"lib{self.target}.so"

    @property
    def target(self) -> str:
        """The CMake target that makes it."""
        return "simprune_kernels" if self.kernels_only else "simprune_plugin"


@dataclasses.dataclass(frozen=True)
class BuiltLibrary:
    """What a build gave, and with what.

    Attributes:
        info: The library, read back from its file.
        nvcc: The CUDA compiler that made it.
        tensorrt: The TensorRT headers it was compiled against; None without the plugin.
        seconds: How long it took.
    """

    info: LibraryInfo
    nvcc: Nvcc
    tensorrt: TensorRTHeaders | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {
            "library": self.info.to_dict(),
            "nvcc": {"path": str(self.nvcc.path), "version": self.nvcc.version},
            "tensorrt_headers": self.tensorrt
            and {"folder": str(self.tensorrt.folder), "version": self.tensorrt.version},
            "seconds": round(self.seconds, 1),
        }


def build(options: BuildOptions, progress: Progress | None = None) -> BuiltLibrary:
    """Compile the library and put it in place; everything that can be missing is looked for first.

    Args:
        options: What to build.
        progress: Called with a line of text whenever there is something new to show.

    Raises:
        SimpruneError: something is missing, an option is wrong, or the compilation failed; the
            message then quotes the log and says where it is kept.
        SystemExit: SIGTERM or SIGHUP came, with 128 and its number; what the build had started is
            ended, and nothing of it is left.
    """
    with _stopping_cleanly():
        return _build(options, progress)


def _build(options: BuildOptions, progress: Progress | None) -> BuiltLibrary:
    step = progress or (lambda _: None)
    if sys.platform != "linux":
        raise RequirementError(f"the plugin is built on Linux, and this is {sys.platform}")
    if options.cross is not None:
        check_cross(options.cross)
        if options.arch == "native":
            raise InvalidArgumentError(
                f"{argument('arch', 'native')} is this machine's GPU: with {argument('cross')} "
                f"write 87,110"
            )
    elif options.cuda_lib is not None:
        raise InvalidArgumentError(
            f"{argument('cuda_lib')} is for {argument('cross')}: drop it, or write "
            f"{argument('cross', 'aarch64')}"
        )
    _check_target(options.library, options.force)
    source = source_folder()
    step("looking for nvcc, TensorRT's headers and CMake")
    nvcc = find_nvcc(options.nvcc)
    wish = options.arch
    if wish is None and options.cross is not None:
        wish = jetson_architectures(nvcc)
    architectures = choose_architectures(wish, nvcc)
    if not architectures:
        raise RequirementError(
            f"CUDA {nvcc.version} ({nvcc.path}) knows none of the kept architectures: name some "
            f"with {argument('arch')}; it compiles for {', '.join(nvcc.architectures)}"
        )
    tensorrt = None
    if not options.kernels_only:
        tensorrt = find_tensorrt_headers(options.tensorrt_include)
    cmake = find_cmake()
    cross = None
    if options.cross is not None:
        cross = find_cross_tools(options.cross, nvcc, options.cuda_lib)
    else:
        check_host_compiler()

    began = time.monotonic()
    with _build_folder() as folder:
        configure = _configuration(source, folder, cmake, nvcc, architectures, tensorrt, cross)
        compile_it = [
            *(
                str(cmake.path),
                "--build",
                str(folder),
                "--target",
                options.target,
            ),
            *("--parallel", str(os.cpu_count() or 1)),
        ]
        _run_logged(
            [configure, compile_it],
            _environment(folder, nvcc, cross),
            lambda line: step(_progress_text(architectures, line)),
        )
        info = _check_result(folder / options.library.name, options, nvcc, architectures, tensorrt)
        _put_in_place(info.path, options)
    info = dataclasses.replace(info, path=options.library.absolute())
    return BuiltLibrary(info, nvcc, tensorrt, time.monotonic() - began)


def source_folder() -> Path:
    """Return the C++ sources: part of an installed package, beside the package in a checkout."""
    for folder in (Path(__file__).parent / "source", Path(__file__).parents[3] / "plugins"):
        if (folder / "CMakeLists.txt").is_file():
            return folder
    raise RequirementError(
        "the plugin's C++ sources are missing from this installation: install simprune-deploy again"
    )


def source_files() -> dict[str, Path]:
    """Return the C++ sources that a build takes, by their place in :func:`source_folder`."""
    folder = source_folder()
    found = (path for pattern in SOURCES for path in folder.glob(pattern))
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(found)
        if path.is_file() and not path.name.startswith(".")
    }


def _check_target(library: Path, force: bool) -> None:
    folder = library.parent
    if folder.exists() and not folder.is_dir():
        raise DestinationError(
            f"{folder} is not a folder: give another one with {argument('output')}"
        )
    if library.is_dir():
        raise DestinationError(
            f"{library} is a folder: give another place with {argument('output')}"
        )
    if library.exists() and not force:
        raise DestinationError(
            f"{library} already exists: replace it with {argument('force', True)}, or give "
            f"{argument('output', 'DIR')}"
        )
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DestinationError(
            f"{parent} is not a writable folder: give another place with {argument('output')}"
        )


@contextlib.contextmanager
def _stopping_cleanly() -> Iterator[None]:
    """Let the signals that end a process raise SystemExit, so that everything is cleaned up."""
    stopping = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:  # a second one would interrupt the cleaning up
            stopping = True
            raise SystemExit(128 + number)

    replaced: list[signal.Signals] = []
    try:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for each in (signal.SIGTERM, signal.SIGHUP):
                # one that is ignored (nohup) or that the calling program handles stays so
                if signal.getsignal(each) is signal.SIG_DFL:
                    replaced.append(each)
                    signal.signal(each, stop)
        yield
    finally:
        for each in replaced:
            signal.signal(each, signal.SIG_DFL)


@contextlib.contextmanager
def _build_folder() -> Iterator[Path]:
    """Yield a temporary folder for CMake and for the compilers' own temporary files."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="simprune-plugin-"))
    except OSError as error:
        raise as_user_error(error, Path(tempfile.gettempdir())) from error
    try:
        yield folder
    finally:
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.05)  # a compiler that was just killed had made one more file


def _configuration(
    source: Path,
    folder: Path,
    cmake: CMake,
    nvcc: Nvcc,
    architectures: tuple[str, ...],
    tensorrt: TensorRTHeaders | None,
    cross: CrossTools | None,
) -> list[str]:
    settings: dict[str, object] = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": nvcc.path,
        # machine code only: what has not been compiled here would be compiled by some driver
        "CMAKE_CUDA_ARCHITECTURES": ";".join(f"{each}-real" for each in architectures),
        "SIMPRUNE_CUDA": "ON",
        "SIMPRUNE_HOST": "OFF",
        "SIMPRUNE_TESTS": "OFF",
        "SIMPRUNE_TENSORRT": "ON" if tensorrt else "OFF",
    }
    if tensorrt:
        settings["SIMPRUNE_TENSORRT_INCLUDE"] = tensorrt.folder
    if cross:
        settings["CMAKE_TOOLCHAIN_FILE"] = source / "cmake" / f"{cross.machine}-linux-gnu.cmake"
        settings["SIMPRUNE_CUDA_TARGET_LIB"] = cross.cuda_lib
    return [
        *(str(cmake.path), "-S", str(source), "-B", str(folder), "-G", cmake.generator),
        *(f"-D{name}={value}" for name, value in settings.items()),
    ]


def _progress_text(architectures: tuple[str, ...], line: str) -> str:
    match = re.match(r"\[ *(\d+)%\]", line)
    done = f" ({match[1]} %)" if match else ""
    return f"compiling for SM {', '.join(architectures)}{done}"


def _environment(folder: Path, nvcc: Nvcc, cross: CrossTools | None) -> dict[str, str]:
    """Return the environment for CMake and what it runs."""
    environment = {
        name: value for name, value in os.environ.items() if not _NOT_FOR_CMAKE.fullmatch(name)
    }
    # the compilers' temporary files go with the folder; messages stay in one language
    environment.update(TMPDIR=str(folder), LC_ALL="C")
    if cross:
        for name in _FOR_THIS_MACHINE:
            environment.pop(name, None)
        # where the toolchain file looks for the headers
        environment["CUDA_HOME"] = str(cross.cuda_home)
    elif nvcc.unknown_library_folder:
        known = environment.get("LIBRARY_PATH")
        folders = [str(nvcc.unknown_library_folder), *([known] if known else [])]
        environment["LIBRARY_PATH"] = os.pathsep.join(folders)
    return environment


def _run_logged(
    commands: list[list[str]], environment: dict[str, str], on_line: Callable[[str], None]
) -> None:
    """Run the commands with their output in a log, which is kept if one of them fails."""
    handle, name = tempfile.mkstemp(prefix="simprune-plugin-", suffix=".log")
    log = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for command in commands:
                file.write(f"$ {' '.join(command)}\n")
                code = _run_one(command, environment, file, on_line)
                if code != 0:
                    break
    except BaseException:
        log.unlink(missing_ok=True)
        raise
    if code != 0:
        why = _meaning(log.read_text(encoding="utf-8")) or f"{command[0]} ended with {code}"
        raise ToolFailedError(f"the build failed: {why} (whole log: {log})")
    log.unlink()


def _run_one(
    command: list[str], environment: dict[str, str], log: IO[str], on_line: Callable[[str], None]
) -> int:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        # a group of its own, to end everything it started together
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            log.write(line)
            on_line(line)
        return process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _meaning(log: str) -> str:
    """Return what of a log says why it failed, in one line."""
    # commands, make's own lines (they only say that something failed), quoted source
    noise = r"(\$ |(g?make|ninja)(\[\d+\])?: |\d* *\|)"
    lines = [text for line in log.splitlines() if (text := line.strip())]
    lines = [line for line in lines if not re.match(noise, line)]
    pattern = r"\b(error|fatal|undefined reference|no space left|killed)\b"
    hits = [index for index, line in enumerate(lines) if re.search(pattern, line, re.I)]
    chosen = lines[hits[0] : hits[0] + 4] if hits else lines[-4:]
    text = " | ".join(" ".join(line.split()) for line in chosen)
    return text if len(text) <= 500 else text[:499] + "…"


def _check_result(
    library: Path,
    options: BuildOptions,
    nvcc: Nvcc,
    architectures: tuple[str, ...],
    tensorrt: TensorRTHeaders | None,
) -> LibraryInfo:
    """Hold the library against what was asked for."""
    info = read_info(library)
    for name, got, asked in (
        ("kind", info.kind, "kernels" if options.kernels_only else "plugin"),
        ("version", info.version, __version__),
        ("machine", info.machine, options.cross or platform.machine()),
        ("CUDA", info.cuda, nvcc.version),
        ("TensorRT headers", info.tensorrt_headers, tensorrt.version if tensorrt else None),
        ("architectures", info.architectures, architectures),
        ("GPU code", info.device_code.sms, architectures),
    ):
        if got != asked:
            raise ToolFailedError(
                f"the library that was built is not what was asked for: {name} {got}, not {asked}: "
                f"the C++ sources in {source_folder()} do not belong to this version"
            )
    return info


def _put_in_place(built: Path, options: BuildOptions) -> None:
    folder = options.output
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged_file(options.library) as staging:
            shutil.copyfile(built, staging)
    except BaseException as error:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise as_user_error(error, options.library) from error
        raise
