"""Building, reading and calling the libraries of plugins/: the Python side and the command line.

Machines that are not at hand are made up: scripts that answer as nvcc, CMake and nvidia-smi do,
folders with headers of any version, and ELF files written byte by byte. What must be real is real:
the libraries come from :mod:`plugin_build`, which calls the command line itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import plugin_build
import pytest
from made_up_library import FACTS, elf, fatbin, written
from places import ROOT
from typer.testing import CliRunner

import simprune_deploy
from simprune_deploy.cli import app
from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import sha256
from simprune_deploy.common.versions import is_older
from simprune_deploy.deploy.bundle import own_wheel
from simprune_deploy.engine.plugin import build, cross, toolchain
from simprune_deploy.engine.plugin.build import BuildOptions
from simprune_deploy.pruning.kernel_library import LARGEST_FILE, MARK, read_info

FIELDS = {
    "num_prefix_tokens": "int32",
    "selection": "string",
    "reduction": "string",
    "capacity": "int32",
    "multiple_of": "int32",
    "opt_tokens": "int32",
    "max_tokens": "int32",
}


def run(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; an error that it did not expect is raised."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refusal(*arguments: object) -> str:
    """Check that a command refused with one line on stderr, and return the line."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# --- reading a library ----------------------------------------------------------------------------


def test_every_fact_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "lib.so", elf(gpu_code=fatbin((2, 87, 0x11), (2, 110, 0x1000011))))
    info = read_info(path)
    assert info.to_dict() == {
        **FACTS,
        "architectures": ("87", "110"),
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "machine": "aarch64",
        "device_code": {"sms": ("87", "110"), "ptx": ()},
    }
    json.dumps(info.to_dict())


@pytest.mark.parametrize(
    ("number", "name"), [(62, "x86_64"), (183, "aarch64"), (243, "ELF machine 243")]
)
def test_machines(tmp_path: Path, number: int, name: str) -> None:
    assert read_info(written(tmp_path / "lib.so", elf(number))).machine == name


def test_none_in_the_file_is_none(tmp_path: Path) -> None:
    facts = {**FACTS, "cuda": "none", "architectures": "none", "tensorrt_headers": "none"}
    info = read_info(written(tmp_path / "lib.so", elf(facts=facts)))
    assert (info.cuda, info.architectures, info.tensorrt_headers) == (None, (), None)
    assert str(info.device_code) == "none"


@pytest.mark.parametrize(
    ("section", "sms", "ptx"),
    [
        (b"", (), ()),
        (bytes(16), (), ()),
        (fatbin(), (), ()),
        (fatbin((2, 75, 0), (1, 121, 0)), ("75",), ("121",)),
        # in numeric order, each once, from all containers and with padding between them
        (fatbin((2, 110, 0), (2, 87, 0)) + bytes(8) + fatbin((2, 87, 0)), ("87", "110"), ()),
        (fatbin((2, 90, 0x100000), (2, 120, 0x200000), header=96), ("90a", "120f"), ()),
        # compressed code, and kinds of code that run nowhere by themselves
        (fatbin((2, 89, 0x8011), (4, 80, 0)), ("89",), ()),
    ],
)
def test_gpu_code(
    tmp_path: Path, section: bytes, sms: tuple[str, ...], ptx: tuple[str, ...]
) -> None:
    code = read_info(written(tmp_path / "lib.so", elf(gpu_code=section))).device_code
    assert (code.sms, code.ptx) == (sms, ptx)


@pytest.mark.parametrize(
    "section",
    [
        b"\x01" + bytes(15),
        fatbin((2, 87, 0))[:-1],
        fatbin((2, 87, 0))[:40],
        fatbin((2, 87, 0)) + b"\x50\xed",
        fatbin((2, 87, 0)) + bytes(8) + b"\1" + bytes(7) + fatbin((2, 90, 0)),
        # far more pieces than any library has: reading them all would take its time
        fatbin() * 70_000,
        fatbin(*[(2, 87, 0)] * 70_000),
        fatbin((2, 87, 0), header=40),
        struct.pack("<IHHQ", 0xBA55ED50, 1, 0, 0),
        struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + struct.pack("<HHIQ48x", 2, 1, 64, 1 << 60),
        struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64) + bytes(64),
    ],
)
def test_damaged_gpu_code_is_refused(tmp_path: Path, section: bytes) -> None:
    path = written(tmp_path / "lib.so", elf(gpu_code=section))
    with pytest.raises(SimpruneError, match=r"GPU code .* is damaged"):
        read_info(path)


WHOLE = elf(gpu_code=fatbin((2, 87, 0)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a shared library"),
        (b"hello", "not a shared library"),
        (MARK + b"{}", "not a shared library"),
        (b"!<arch>\nfile", "is a static archive: name the shared library"),
        (b"\x7fELF", "is cut short"),
        (WHOLE[:63], "is cut short"),
        (WHOLE[:-1], "is cut short"),
        (WHOLE[:4] + b"\x01" + WHOLE[5:], "not a 64-bit little-endian library"),
        (WHOLE[:5] + b"\x02" + WHOLE[6:], "not a 64-bit little-endian library"),
        (WHOLE[:40] + bytes(8) + WHOLE[48:], "has no section headers"),
        (WHOLE[:58] + bytes(2) + WHOLE[60:], "has no section headers"),
        (WHOLE[:62] + b"\xff\xff", "is cut short"),
        (elf(facts=b"nothing of ours"), "is not a library of ours"),
        (elf(facts=MARK + b"not JSON\0"), "is not a library of ours"),
        (elf(facts=MARK + b'{"kind": \0'), "its description is damaged"),
        (elf(facts=MARK + b'{"kind": "\xff"}\0'), "its description is damaged"),
        (elf(facts={**FACTS, "abi": "1"}), "no usable 'abi'"),
        (elf(facts={**FACTS, "abi": True}), "no usable 'abi'"),
        (elf(facts={**FACTS, "abi": 10**4000}), "no usable 'abi'"),
        (elf(facts={**FACTS, "abi": -1}), "no usable 'abi'"),
        (elf(facts={**FACTS, "fields": []}), "no usable 'fields'"),
        (elf(facts={**FACTS, "fields": {"a": 1}}), "no usable 'fields'"),
        # what would steer a terminal, break the line or not be printed at all
        (elf(facts={**FACTS, "version": "\x1b[31m1"}), "no usable 'version'"),
        (elf(facts={**FACTS, "version": "\ud800"}), "no usable 'version'"),
        (elf(facts={**FACTS, "architectures": "87\n99"}), "no usable 'architectures'"),
        (elf(facts={**FACTS, "namespace": "a\u202eb"}), "no usable 'namespace'"),
        (elf(facts={**FACTS, "fields": {"a\tb": "int32"}}), "no usable 'fields'"),
        (elf(facts={**FACTS, "fields": {"a": "\x07"}}), "no usable 'fields'"),
        # brackets in one another, an endless description, one without its end
        (elf(facts=MARK + b'{"kind": ' + b"[" * 60_000 + b"\0"), "its description is damaged"),
        (
            elf(facts=MARK + b'{"a": "' + b"x" * 70_000 + b'", ' + json.dumps(FACTS).encode()[1:]),
            "its description is damaged",
        ),
        (elf(facts={k: v for k, v in FACTS.items() if k != "cuda"}), "no usable 'cuda'"),
    ],
)
def test_what_is_no_library_of_ours_is_refused_in_one_line(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = written(tmp_path / "lib.so", data)
    line = refusal("plugin", "info", path)
    assert message in line
    assert str(path) in line


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in refusal("plugin", "info", tmp_path / "no.so")
    assert "is a folder: name the library in it" in refusal("plugin", "info", tmp_path)
    assert "not a shared library" in refusal("plugin", "info", "/dev/null")


@pytest.mark.parametrize("opened", [False, True])
def test_a_pipe_does_not_block(tmp_path: Path, opened: bool) -> None:
    """Neither at the first look nor, where it has since taken a file's place, when opened."""
    pipe = tmp_path / "lib.so"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "simprune_deploy", "plugin", "info", str(pipe)]
    if opened:
        code = (
            "import stat, sys; stat.S_ISREG = lambda mode: True\n"
            f"sys.argv[1:] = {command[3:]}\nfrom simprune_deploy.cli import main; main()"
        )
        command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 2
    (line,) = answer.stderr.splitlines()
    assert f"{pipe} is not a shared library" in line


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path / "lib.so", WHOLE)
    os.truncate(path, LARGEST_FILE + 1)  # without taking that much of the disk
    line = refusal("plugin", "info", path)
    assert f"{path} has {LARGEST_FILE + 1} bytes, more than the {LARGEST_FILE}" in line


def test_reading_takes_little_time_and_memory(tmp_path: Path) -> None:
    """4000 sections, each the whole file of 6 MB, and GPU code that is 64 MB of nothing."""
    size, count = 6_000_000, 4000
    names = b"".join(b"\0s%d" % index for index in range(count))
    headers = b"".join(
        struct.pack("<IIQQQQ24x", names.find(b"s%d" % index), 1, 0, 0, 0, size)
        for index in range(count - 1)
    )
    headers += struct.pack("<IIQQQQ24x", 0, 3, 0, 0, 64, len(names))
    head = elf()[:40] + struct.pack("<QIHHHHHH", size, 0, 64, 0, 0, 64, count, count - 1)
    body = head + names + MARK + json.dumps(FACTS).encode()
    many = written(tmp_path / "many.so", body.ljust(size, b"\0") + headers)
    zeros = written(tmp_path / "zeros.so", elf(gpu_code=bytes(64 << 20)))
    for path in (many, zeros):
        tracemalloc.start()
        try:
            assert read_info(path).version == "0.1.0"
            assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size
        finally:
            tracemalloc.stop()
    began = time.process_time()
    read_info(zeros)
    # to find its hash takes the most of it, in the same time anywhere
    hashing = time.process_time()
    sha256(zeros)
    done = time.process_time()
    assert hashing - began < 4 * (done - hashing) + 0.5


def test_two_sections_of_gpu_code_are_refused(tmp_path: Path) -> None:
    data = elf(gpu_code=fatbin((2, 87, 0)))
    # .rodata (its name is the second) takes the other's name
    table = struct.unpack_from("<Q", data, 40)[0]
    name = struct.unpack_from("<I", data, table + 2 * 64)[0]
    data = data[: table + 64] + struct.pack("<I", name) + data[table + 68 :]
    with pytest.raises(SimpruneError, match=r"GPU code .* is damaged"):
        read_info(written(tmp_path / "lib.so", data))


def test_no_damage_makes_reading_fail_otherwise(host_library: Path, tmp_path: Path) -> None:
    """A file cut anywhere is refused; with a byte changed anywhere it is read or refused."""
    data = host_library.read_bytes()
    choose = random.Random(0)
    path = tmp_path / "lib.so"
    for _ in range(300):
        written(path, data[: choose.randrange(len(data))])
        with pytest.raises(SimpruneError, match=r"cut short|not a shared library"):
            read_info(path)
    synthetic = elf(gpu_code=fatbin((2, 87, 0), (1, 90, 0)) + bytes(8) + fatbin((2, 110, 0)))
    for _ in range(3000):
        changed = bytearray(synthetic)
        changed[choose.randrange(len(changed))] = choose.randrange(256)
        written(path, bytes(changed))
        with contextlib.suppress(SimpruneError):
            read_info(path)


def test_the_host_library(host_library: Path) -> None:
    info = read_info(host_library)
    assert info.kind == "host"
    assert info.version == simprune_deploy.__version__
    assert info.machine == platform.machine()
    assert (info.cuda, info.architectures, info.device_code.sms) == (None, (), ())
    assert info.tensorrt_headers == "10.14"
    assert info.fields == FIELDS


def test_the_file_says_what_the_loaded_library_says(host_library: Path) -> None:
    library = ctypes.CDLL(str(host_library))
    library.simprune_info.restype = ctypes.c_char_p
    said = json.loads(library.simprune_info())
    info = read_info(host_library)
    assert said.keys() == FACTS.keys()
    for name in ("kind", "version", "abi", "operator", "operator_version", "namespace", "fields"):
        assert getattr(info, name) == said[name]
    assert said["cuda"] == said["architectures"] == "none"


@pytest.fixture(scope="module")
def nvcc() -> toolchain.Nvcc:
    try:
        return toolchain.find_nvcc()
    except toolchain.NotFoundError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.parametrize("compression", ["none", "size", "speed"])
def test_gpu_code_is_what_the_compiler_was_asked_for(
    nvcc: toolchain.Nvcc, tmp_path: Path, compression: str
) -> None:
    """With variants and PTX, which our own libraries do not have, in two object files."""
    wanted = {"75": "sm_75", "87": "sm_87", "90a": "sm_90a", "120f": "sm_120f", "80": "compute_80"}
    if not {name.rstrip("af") for name in wanted} <= set(nvcc.architectures):
        pytest.skip(f"CUDA {nvcc.version} does not know all of {list(wanted)}")
    mark = json.dumps((MARK + json.dumps(FACTS).encode()).decode())
    (tmp_path / "one.cu").write_text(
        f"__attribute__((used)) extern const char mark[] = {mark};\n"
        "__global__ void one(float* x) { *x += 1; }\nvoid go(float* x) { one<<<1, 1>>>(x); }\n"
    )
    (tmp_path / "two.cu").write_text(
        "__global__ void two(int* x) { *x += 1; }\nvoid go2(int* x) { two<<<1, 1>>>(x); }\n"
    )
    generated = [f"arch=compute_{name},code={code}" for name, code in wanted.items()]
    subprocess.run(
        [
            *(nvcc.path, "-shared", "-Xcompiler", "-fPIC", f"-compress-mode={compression}"),
            *(flag for each in generated for flag in ("-gencode", each)),
            *("one.cu", "two.cu", "-o", "lib.so"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    code = read_info(tmp_path / "lib.so").device_code
    assert code.sms == ("75", "87", "90a", "120f")
    assert code.ptx == ("80",)


# --- the tools of a build -------------------------------------------------------------------------

ANSWER = "echo 'Cuda compilation tools, release {0}, V{0}.88'; echo compute_75; echo compute_87"


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it; programs can be put into its bin, which PATH names."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "TENSORRT_INCLUDE", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TRT_ROOT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "CUDA_FOLDER", tmp_path / "cuda")
    monkeypatch.setattr(toolchain, "SYSTEM_INCLUDE", tmp_path / "include")
    monkeypatch.setattr(toolchain, "TENSORRT_FOLDERS", (str(tmp_path / "tensorrt"),))
    monkeypatch.setattr(toolchain, "DEVICE_TREE", tmp_path / "compatible")
    monkeypatch.setattr(toolchain, "_nvcc_wheels", lambda: iter([tmp_path / "wheel" / "nvcc"]))
    monkeypatch.setattr(toolchain, "_cmake_wheel", lambda: None)
    return tmp_path


def an_nvcc(version: str, *architectures: int) -> toolchain.Nvcc:
    return toolchain.Nvcc(Path("/cuda/bin/nvcc"), version, tuple(map(str, architectures)))


CUDA_12 = an_nvcc("12.8.93", 50, 75, 80, 86, 87, 89, 90, 100, 101, 120)
CUDA_13 = an_nvcc("13.0.88", 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


def test_nvcc_is_looked_for_in_this_order(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "wheel/nvcc": None,
        "cuda/bin/nvcc": None,
        "bin/nvcc": None,
        "path/bin/nvcc": ("CUDA_PATH", "path"),
        "home/bin/nvcc": ("CUDA_HOME", "home"),
        "named/nvcc": ("CUDACXX", "named/nvcc"),
    }
    with pytest.raises(
        toolchain.NotFoundError, match=r"no nvcc found .*pip install .*name it with nvcc"
    ):
        toolchain.find_nvcc()
    for place, variable in places.items():
        program(empty_machine / place, ANSWER.format("13.0"))
        if variable:
            monkeypatch.setenv(variable[0], str(empty_machine / variable[1]))
        assert toolchain.find_nvcc().path == empty_machine / place
    flag = program(empty_machine / "flag" / "nvcc", ANSWER.format("12.6"))
    found = toolchain.find_nvcc(flag)
    assert found == toolchain.Nvcc(flag, "12.6.88", ("75", "87"))


def test_the_wheel_of_nvcc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = program(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc", ANSWER.format("13.0"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert nvcc in list(toolchain._nvcc_wheels())
    assert toolchain.ask_nvcc(nvcc).unknown_library_folder is None
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir()
    (folder / "libcudart_static.a").touch()
    assert toolchain.ask_nvcc(nvcc).unknown_library_folder == folder


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo hello", "names no CUDA release"),
        ("echo 'release 13.0, V13.0.88'", "names no architecture"),
        (
            "echo 'release 11.8, V11.8.89'; echo compute_87",
            "CUDA 11.8.89 ({path}) is older than 12.0",
        ),
        ("echo no licence >&2; exit 3", "--version failed: no licence"),
        ("kill -9 $$", "--version failed"),
    ],
)
def test_an_nvcc_that_does_not_answer(tmp_path: Path, script: str, message: str) -> None:
    nvcc = program(tmp_path / "nvcc", script)
    assert message.format(path=nvcc) in refusal(
        "plugin", "build", "--nvcc", nvcc, "-o", tmp_path / "out"
    )


def test_names_that_are_no_nvcc(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_it = ("plugin", "build", "-o", empty_machine / "out")
    assert "--nvcc /nowhere/nvcc is not a program" in refusal(*build_it, "--nvcc", "/nowhere/nvcc")
    broken = written(empty_machine / "nvcc", b"\x7fELF of another processor")
    broken.chmod(0o755)
    assert "cannot run" in refusal(*build_it, "--nvcc", broken)
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert "CUDACXX /nowhere/nvcc is not a program" in refusal(*build_it)


@pytest.mark.parametrize(
    ("wish", "nvcc", "architectures"),
    [
        ("87", CUDA_13, "87"),
        ("110,87", CUDA_13, "87,110"),
        ("8.7, 11.0", CUDA_13, "87,110"),
        ("sm_87,87", CUDA_13, "87"),
        ("12.1,10.3", CUDA_13, "103,121"),
        ("all", CUDA_13, "75,80,86,87,89,90,100,110,120,121"),
        # where it does not know some: those are left out, and Thor is 101
        ("all", CUDA_12, "75,80,86,87,89,90,100,101,120"),
        ("all", an_nvcc("12.0.76", 50, 75, 80, 86, 87, 89, 90), "75,80,86,87,89,90"),
        ("all", an_nvcc("12.0.76", 50), ""),
    ],
)
def test_architectures(wish: str, nvcc: toolchain.Nvcc, architectures: str) -> None:
    assert ",".join(toolchain.choose_architectures(wish, nvcc)) == architectures


@pytest.mark.parametrize(
    ("wish", "nvcc", "message"),
    [
        ("", CUDA_13, "arch '' is not understood"),
        (",", CUDA_13, "is not understood"),
        ("87,", CUDA_13, "is not understood"),
        ("orin", CUDA_13, r"'orin' is not understood: write 'native', 'all'"),
        ("90a", CUDA_13, "is not understood"),
        ("8.7.0", CUDA_13, "is not understood"),
        ("-87", CUDA_13, "is not understood"),
        ("70", CUDA_13, r"^arch 70 is not known to CUDA 13.0.88 .*75, 80"),
        ("87,999", CUDA_13, "arch 999 is not known"),
        ("110", CUDA_12, r"110 is not known .*: write 101 for Jetson Thor"),
        ("101", CUDA_13, r"101 is not known .*: write 110 for Jetson Thor"),
        ("11.0", an_nvcc("12.6.68", 87), r"110 is not known .* name another CUDA with nvcc"),
    ],
)
def test_architectures_that_are_refused(wish: str, nvcc: toolchain.Nvcc, message: str) -> None:
    with pytest.raises(SimpruneError, match=message):
        toolchain.choose_architectures(wish, nvcc)


@pytest.mark.parametrize(
    ("smi", "device_tree", "nvcc", "native"),
    [
        (None, None, CUDA_13, ""),
        ("exit 9", None, CUDA_13, ""),
        ("echo 'No devices were found'", None, CUDA_13, ""),
        ("echo 9.0", None, CUDA_13, "90"),
        ("echo 12.0; echo 8.6; echo 12.0", None, CUDA_13, "86,120"),
        (None, "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0", CUDA_12, "87"),
        ("echo '[N/A]'", "nvidia,p3768\0nvidia,tegra234\0", CUDA_12, "87"),
        (None, "nvidia,tegra264\0", CUDA_13, "110"),
        (None, "nvidia,tegra264\0", CUDA_12, "101"),
        (None, "raspberrypi,5-model-b\0", CUDA_13, ""),
        # an older Jetson: JetPack 5 at most
        (None, "nvidia,tegra194\0", CUDA_12, ""),
        ("echo 8.9", "nvidia,tegra234\0", CUDA_12, "87,89"),
    ],
)
def test_the_gpus_of_this_machine(
    empty_machine: Path,
    smi: str | None,
    device_tree: str | None,
    nvcc: toolchain.Nvcc,
    native: str,
) -> None:
    if smi is not None:
        program(empty_machine / "bin" / "nvidia-smi", smi)
    if device_tree is not None:
        (empty_machine / "compatible").write_text(device_tree)
    everything = toolchain.choose_architectures("all", nvcc)
    expected = tuple(native.split(",")) if native else ()
    assert toolchain.native_architectures(nvcc) == expected
    assert toolchain.choose_architectures(None, nvcc) == (expected or everything)
    if expected:
        assert toolchain.choose_architectures("native", nvcc) == expected
    else:
        with pytest.raises(SimpruneError, match="no GPU found"):
            toolchain.choose_architectures("native", nvcc)


def test_nvidia_smi_is_asked_for_the_architecture(empty_machine: Path) -> None:
    program(empty_machine / "bin" / "nvidia-smi", '[ "$1" = --query-gpu=compute_cap ] && echo 8.7')
    assert toolchain.native_architectures(CUDA_13) == ("87",)


def headers(folder: Path, text: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "NvInferRuntime.h").touch()
    if text is not None:
        (folder / "NvInferVersion.h").write_text(text)
    return folder


def version_of(major: int, minor: int) -> str:
    return f"#define NV_TENSORRT_MAJOR {major} //!< major\n#define NV_TENSORRT_MINOR {minor}\n"


ENTERPRISE = """
#define TRT_MAJOR_ENTERPRISE 11
#define TRT_MINOR_ENTERPRISE 4
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.
#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE //!< TensorRT minor version.
"""


@pytest.mark.parametrize(
    ("text", "version"),
    [(version_of(10, 0), "10.0"), (version_of(10, 16), "10.16"), (ENTERPRISE, "11.4")],
)
def test_versions_of_headers(tmp_path: Path, text: str, version: str) -> None:
    folder = headers(tmp_path / "include", text)
    found = toolchain.TensorRTHeaders(folder, version)
    assert toolchain.find_tensorrt_headers(folder) == found
    assert toolchain.find_tensorrt_headers(tmp_path) == found  # TensorRT's root


def test_headers_are_looked_for_in_this_order(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = f"include/{platform.machine()}-linux-gnu"
    places: list[tuple[str, str | None]] = [
        ("tensorrt/include", None),
        ("include", None),
        (system, None),
        ("trt/include", "TRT_ROOT"),
        (f"root/include/{platform.machine()}-linux-gnu", "TENSORRT_ROOT"),
        ("here", "TENSORRT_INCLUDE"),
    ]
    with pytest.raises(toolchain.NotFoundError, match=r"libnvinfer-headers-dev.*kernels_only=True"):
        toolchain.find_tensorrt_headers()
    for minor, (place, variable) in enumerate(places):
        if place == system:
            (empty_machine / place).mkdir(parents=True)
        folder = empty_machine / place
        if not folder.exists():
            headers(folder, version_of(10, minor))
        (folder / "NvInferRuntime.h").touch()
        (folder / "NvInferVersion.h").write_text(version_of(10, minor))
        if variable:
            monkeypatch.setenv(variable, str(empty_machine / place.split("/")[0]))
        found = toolchain.find_tensorrt_headers()
        assert found == toolchain.TensorRTHeaders(folder, f"10.{minor}")
    flag = headers(empty_machine / "flag", version_of(11, 0))
    assert toolchain.find_tensorrt_headers(flag).version == "11.0"


def test_old_headers_are_named_with_jetpack_5(empty_machine: Path) -> None:
    old = headers(empty_machine / "include", version_of(8, 5))
    message = rf"TensorRT 8.5 in {old} is too old.*JetPack 5"
    with pytest.raises(SimpruneError, match=message):
        toolchain.find_tensorrt_headers(old)
    with pytest.raises(SimpruneError, match=message):
        toolchain.find_tensorrt_headers()
    headers(empty_machine / "tensorrt" / "include", version_of(10, 3))
    assert toolchain.find_tensorrt_headers().version == "10.3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("", "does not tell TensorRT's version"),
        ("#define NV_TENSORRT_MAJOR 10\n", "does not tell TensorRT's version"),
        ("#define NV_TENSORRT_MAJOR SOMETHING\n", "does not tell TensorRT's version"),
    ],
)
def test_headers_without_a_version(tmp_path: Path, text: str | None, message: str) -> None:
    with pytest.raises(SimpruneError, match=message):
        toolchain.find_tensorrt_headers(headers(tmp_path / "include", text))


@pytest.mark.parametrize("variable", ["TENSORRT_INCLUDE", "TENSORRT_ROOT", "TRT_ROOT"])
def test_a_place_that_is_named_must_have_the_headers(
    empty_machine: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    headers(empty_machine / "include", version_of(10, 3))
    monkeypatch.setenv(variable, "/nowhere")
    with pytest.raises(SimpruneError, match=f"{variable} /nowhere holds no NvInferRuntime.h"):
        toolchain.find_tensorrt_headers()


def test_cmake(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimpruneError, match=r"no CMake found in PATH: `pip install cmake`"):
        toolchain.find_cmake()
    in_path = program(empty_machine / "bin" / "cmake", "echo cmake version 3.16.3")
    with pytest.raises(SimpruneError, match=r"CMake 3.16.3 .* is older than 3.18: `pip install"):
        toolchain.find_cmake()
    wheel = program(empty_machine / "wheel" / "cmake", "echo cmake version 4.1.0-rc1")
    monkeypatch.setattr(toolchain, "_cmake_wheel", lambda: str(wheel))
    with pytest.raises(SimpruneError, match=r"neither make nor ninja found: .*build-essential"):
        toolchain.find_cmake()
    program(empty_machine / "bin" / "ninja", "")
    assert toolchain.find_cmake() == toolchain.CMake(wheel, "4.1.0-rc1", "Ninja")
    program(empty_machine / "bin" / "make", "")
    program(in_path, "echo cmake version 3.18.4")
    assert toolchain.find_cmake() == toolchain.CMake(in_path, "3.18.4", "Unix Makefiles")


def test_the_wheel_of_cmake_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cmake = program(tmp_path / "cmake" / "data" / "bin" / "cmake", "echo cmake version 3.31.0")
    (tmp_path / "cmake" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "cmake", raising=False)
    assert toolchain._cmake_wheel() == str(cmake)


def test_the_hosts_compiler(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimpruneError, match=r"no C\+\+ compiler found: .*install g\+\+"):
        toolchain.check_host_compiler()
    program(empty_machine / "bin" / "g++", "")
    assert toolchain.check_host_compiler() == "g++"
    monkeypatch.setenv("CXX", "clang++-99 -O2")
    with pytest.raises(SimpruneError, match=r"CXX clang\+\+-99 is not a program"):
        toolchain.check_host_compiler()


# --- building -------------------------------------------------------------------------------------


@pytest.fixture
def made_up_tools(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that a build asks for, as scripts; what CMake does is up to the test (bin/cmake-does)."""
    program(empty_machine / "bin" / "nvcc", ANSWER.format("13.0"))
    program(
        empty_machine / "bin" / "cmake",
        f'[ "$1" = --version ] && echo cmake version 3.25.1 && exit\n'
        f'printf "%s\\n" "$@" >> {empty_machine}/arguments\n'
        f". {empty_machine}/bin/cmake-does",
    )
    program(empty_machine / "bin" / "make", "")
    program(empty_machine / "bin" / "g++", "")
    headers(empty_machine / "include", version_of(10, 3))
    (empty_machine / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(empty_machine / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return empty_machine


def cmake_does(machine: Path, script: str) -> None:
    # PATH is the made-up machine's; the shell's own needs are met from the real one
    (machine / "bin" / "cmake-does").write_text(f"PATH={os.defpath}\n{script}\n")


def cmake_makes(machine: Path, library: bytes, name: str = "libsimprune_plugin.so") -> None:
    written(machine / "made", library)
    cmake_does(machine, f'[ "$1" = --build ] && cp {machine}/made "$2/{name}"; true')


def our_library(**facts: Any) -> bytes:
    """What a build on this machine for SM 87 would give."""
    here = {"version": simprune_deploy.__version__, "tensorrt_headers": "10.3"}
    given = {**FACTS, **here, "architectures": "87", **facts}
    machine = {"x86_64": 62, "aarch64": 183}[platform.machine()]
    return elf(machine, given, fatbin((2, 87, 0)))


def test_a_build_with_made_up_tools(made_up_tools: Path) -> None:
    cmake_makes(made_up_tools, our_library())
    output = made_up_tools / "new" / "folder with spaces"
    steps: list[str] = []
    built = build.build(BuildOptions(arch="87", output=output), steps.append)
    assert [path.name for path in output.iterdir()] == ["libsimprune_plugin.so"]
    assert built.info == read_info(output / "libsimprune_plugin.so")
    assert built.info.path.is_absolute()
    assert built.nvcc.version == "13.0.88"
    assert built.tensorrt == toolchain.TensorRTHeaders(made_up_tools / "include", "10.3")
    assert list((made_up_tools / "tmp").iterdir()) == []
    arguments = (made_up_tools / "arguments").read_text().splitlines()
    assert f"-DCMAKE_CUDA_COMPILER={made_up_tools}/bin/nvcc" in arguments
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in arguments
    assert f"-DSIMPRUNE_TENSORRT_INCLUDE={made_up_tools}/include" in arguments
    assert arguments[arguments.index("--target") + 1] == "simprune_plugin"
    assert arguments[arguments.index("-S") + 1] == str(ROOT / "plugins")
    assert int(arguments[arguments.index("--parallel") + 1]) == os.cpu_count()


def test_kernels_alone_need_no_headers(made_up_tools: Path) -> None:
    shutil.rmtree(made_up_tools / "include")
    library = our_library(kind="kernels", tensorrt_headers="none")
    cmake_makes(made_up_tools, library, "libsimprune_kernels.so")
    output = made_up_tools / "out"
    code, out, err = run(
        "plugin", "build", "--kernels-only", "--arch", "87", "-o", output, "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["tensorrt_headers"] is None
    assert json.loads(out)["library"]["kind"] == "kernels"
    assert (output / "libsimprune_kernels.so").read_bytes() == library
    assert "-DSIMPRUNE_TENSORRT=OFF" in (made_up_tools / "arguments").read_text()
    assert "no TensorRT headers" in refusal("plugin", "build", "-o", made_up_tools / "out2")


def test_what_a_person_is_shown(made_up_tools: Path) -> None:
    cmake_makes(made_up_tools, our_library())
    code, out, err = run("plugin", "build", "--arch", "87", "-o", made_up_tools / "out")
    assert (code, err) == (0, "")
    for text in ("libsimprune_plugin.so (", "SM 87", "13.0.88", "10.3", "seconds"):
        assert text in out


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "kernels"}, "kind kernels, not plugin"),
        ({"version": "9.9.9"}, "version 9.9.9, not"),
        ({"cuda": "12.6.68"}, "CUDA 12.6.68, not 13.0.88"),
        ({"tensorrt_headers": "none"}, "TensorRT headers None, not 10.3"),
        ({"architectures": "87,110"}, r"architectures \('87', '110'\), not \('87',\)"),
    ],
)
def test_a_library_that_is_not_what_was_asked_for(
    made_up_tools: Path, facts: dict[str, Any], message: str
) -> None:
    cmake_makes(made_up_tools, our_library(**facts))
    with pytest.raises(SimpruneError, match=message):
        build.build(BuildOptions(arch="87", output=made_up_tools / "out"))
    assert not (made_up_tools / "out").exists()


def test_missing_gpu_code_is_noticed(made_up_tools: Path) -> None:
    """The description says 87; the code inside is for another GPU."""
    library = our_library().replace(fatbin((2, 87, 0)), fatbin((2, 75, 0)))
    cmake_makes(made_up_tools, library)
    with pytest.raises(SimpruneError, match=r"GPU code \('75',\), not \('87',\)"):
        build.build(BuildOptions(arch="87", output=made_up_tools / "out"))


def test_existing_libraries_are_replaced_only_with_force(made_up_tools: Path) -> None:
    cmake_makes(made_up_tools, our_library())
    output = made_up_tools / "out"
    output.mkdir()
    (output / "other").write_text("keep me")
    old = written(output / "libsimprune_plugin.so", b"old")
    line = refusal("plugin", "build", "--arch", "87", "-o", output)
    assert f"{old} already exists: replace it with --force" in line
    assert old.read_bytes() == b"old"
    assert run("plugin", "build", "--arch", "87", "-o", output, "--force")[0] == 0
    assert old.read_bytes() == our_library()
    assert {path.name for path in output.iterdir()} == {"other", "libsimprune_plugin.so"}
    assert old.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))


def test_a_failed_replacement_keeps_the_old_library(made_up_tools: Path) -> None:
    cmake_does(made_up_tools, "echo 'x.cu(1): error: no'; exit 1")
    old = written(made_up_tools / "libsimprune_plugin.so", b"old")
    refusal("plugin", "build", "--arch", "87", "-o", made_up_tools, "--force")
    assert old.read_bytes() == b"old"


def test_outputs_that_cannot_be(made_up_tools: Path) -> None:
    cmake_makes(made_up_tools, our_library())
    written(made_up_tools / "file", b"")
    (made_up_tools / "folder" / "libsimprune_plugin.so").mkdir(parents=True)
    build_it = ("plugin", "build", "--arch", "87", "--force", "-o")
    assert "is not a folder" in refusal(*build_it, made_up_tools / "file")
    assert "is not a writable folder" in refusal(*build_it, made_up_tools / "file" / "out")
    assert "is a folder" in refusal(*build_it, made_up_tools / "folder")
    assert not (made_up_tools / "arguments").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo '-- The CXX compiler'; echo 'CMake Error at CMakeLists.txt:9 (message):'; "
            "echo '  no such thing'; echo; echo '-- Configuring incomplete'; exit 1",
            "CMake Error at CMakeLists.txt:9 (message): | no such thing",
        ),
        (
            "echo '[ 50%] Building CUDA'; echo 'gram.h(3): error: expected a semicolon'; "
            "echo 'make[2]: *** [x.o] Error 2' >&2; echo 'make: *** [all] Error 2' >&2; exit 2",
            "the build failed: gram.h(3): error: expected a semicolon (whole log: ",
        ),
        ("echo 'ptxas fatal   : Value sm_99 is wrong'; exit 1", "ptxas fatal : Value sm_99"),
        ("echo; echo something; echo else; exit 1", "something | else"),
        ("kill -9 $$", "/bin/cmake ended with -9 (whole log: "),
        ("printf 'error: \\377\\n'; exit 1", "error: "),
        ("yes 'error: long' | head -500 | tr '\\n' ' '; exit 1", "… (whole log: "),
    ],
)
def test_a_failed_build_quotes_its_log_and_keeps_it(
    made_up_tools: Path, script: str, message: str
) -> None:
    cmake_does(made_up_tools, script)
    line = refusal("plugin", "build", "--arch", "87", "-o", made_up_tools / "out")
    assert message in line
    assert len(line) < 700
    (log,) = (made_up_tools / "tmp").iterdir()
    assert f"(whole log: {log})" in line
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in log.read_text()
    assert not (made_up_tools / "out").exists()


def test_settings_of_a_make_around_it_do_not_reach_cmake(
    made_up_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        *("MAKEFLAGS", "GNUMAKEFLAGS", "CUDAARCHS", "CUDAFLAGS"),
        *("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS"),
        *(
            "CMAKE_GENERATOR",
            "CMAKE_GENERATOR_PLATFORM",
            "CMAKE_TOOLCHAIN_FILE",
            "CMAKE_PREFIX_PATH",
        ),
    ):
        monkeypatch.setenv(name, "nonsense")
    monkeypatch.setenv("CXXFLAGS", "-passed-on")
    monkeypatch.setenv("CMAKE_CUDA_COMPILER_LAUNCHER", "a-cache")
    cmake_does(made_up_tools, "env; echo error; exit 1")
    line = refusal("plugin", "build", "--arch", "87", "-o", made_up_tools / "out")
    log = re.search(r"whole log: (\S+)\)", line)
    assert log
    environment = Path(log[1]).read_text()
    assert "nonsense" not in environment
    assert "CXXFLAGS=-passed-on\n" in environment
    assert "CMAKE_CUDA_COMPILER_LAUNCHER=a-cache\n" in environment


# --- for another processor ------------------------------------------------------------------------


def cuda_runtime(folder: Path, machine: int = 183, version: int | None = None) -> Path:
    """A static CUDA runtime: an archive whose first member is an object file."""
    folder.mkdir(parents=True)
    written(folder / "libcudart_static.a", b"!<arch>\n" + b"/".ljust(60) + elf(machine))
    if version is not None:
        (folder.parent / "include").mkdir()
        text = f"#define CUDART_VERSION  {version}\n"
        (folder.parent / "include" / "cuda_runtime_api.h").write_text(text)
    return folder


@pytest.fixture
def cross_tools(made_up_tools: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workstation with what a build for Jetson takes; CMake makes such a library."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cross, "CUDA_FOLDER", made_up_tools / "no-cuda")
    dryrun = f"""echo '#$ INCLUDES="-I{made_up_tools}/toolkit/include"' >&2"""
    # as here: a script that calls the nvcc of a toolkit elsewhere
    answer = ANSWER.format("13.0") + "; echo compute_110"
    script = f'[ "$1" = --dryrun ] && {dryrun} && exit\n{answer}'
    program(made_up_tools / "bin" / "nvcc", script)
    headers(made_up_tools / "toolkit" / "include", "")
    written(made_up_tools / "toolkit" / "include" / "cuda_runtime.h", b"")
    program(made_up_tools / "bin" / "aarch64-linux-gnu-g++", "")
    facts = {**FACTS, "version": simprune_deploy.__version__, "tensorrt_headers": "10.3"}
    code = fatbin((2, 87, 0), (2, 110, 0))
    library = elf(183, {**facts, "architectures": "87,110"}, code)
    cmake_makes(made_up_tools, library)
    return made_up_tools


def test_a_build_for_jetson_with_made_up_tools(
    cross_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-march=native")
    lib = cuda_runtime(cross_tools / "runtime" / "lib", version=13000)
    (cross_tools / "bin" / "g++").unlink()  # this machine's compiler has no part in it
    cmake_does = cross_tools / "bin" / "cmake-does"
    cmake_does.write_text(f"/usr/bin/env > {cross_tools}/environment\n{cmake_does.read_text()}")
    output = cross_tools / "out"
    built = build.build(BuildOptions(cross="aarch64", cuda_lib=lib, output=output))
    assert built.info.machine == "aarch64"
    assert built.info.device_code.sms == ("87", "110")
    arguments = (cross_tools / "arguments").read_text().splitlines()
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real;110-real" in arguments
    assert f"-DSIMPRUNE_CUDA_TARGET_LIB={lib}" in arguments
    settings = ROOT / "plugins" / "cmake" / "aarch64-linux-gnu.cmake"
    assert f"-DCMAKE_TOOLCHAIN_FILE={settings}" in arguments
    environment = (cross_tools / "environment").read_text()
    assert f"CUDA_HOME={cross_tools}/toolkit\n" in environment
    assert "march=native" not in environment


@pytest.mark.parametrize("place", ["targets/aarch64-linux/lib", "targets/sbsa-linux/lib"])
def test_the_runtime_of_nvidias_cross_packages_is_found(cross_tools: Path, place: str) -> None:
    cuda_runtime(cross_tools / "toolkit" / place)
    output = cross_tools / "out"
    assert run("plugin", "build", "--cross", "aarch64", "-o", output)[0] == 0
    wanted = f"-DSIMPRUNE_CUDA_TARGET_LIB={cross_tools}/toolkit/{place}"
    assert wanted in (cross_tools / "arguments").read_text()


def test_a_library_for_another_processor_is_noticed(cross_tools: Path) -> None:
    lib = cuda_runtime(cross_tools / "lib")
    cmake_makes(cross_tools, our_library(architectures="87,110"))
    line = refusal("plugin", "build", "--cross", "aarch64", "--cuda-lib", lib, "-o", lib / "out")
    assert "machine x86_64, not aarch64" in line


def test_what_a_build_for_jetson_lacks(cross_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = cuda_runtime(cross_tools / "lib")
    build_it = ("plugin", "build", "-o", cross_tools / "out", "--cross")
    fetch = "pip download -d cudart --no-deps --only-binary :all: --platform manylinux2014_aarch64"
    for arguments, says in (
        (("arm",), "--cross 'arm' is not known: write --cross aarch64"),
        (("aarch64", "--arch", "native"), "with --cross write 87,110"),
        (("aarch64", "--cuda-lib", cross_tools), f"holds no libcudart_static.a: {fetch}"),
        (("aarch64",), "targets/sbsa-linux/lib): pip download"),
        (("aarch64",), "nvidia-cuda-runtime==13.0.*"),
        (("aarch64",), "--cuda-lib cudart/nvidia/cu13/lib"),
    ):
        assert says in refusal(*build_it, *arguments)
    line = refusal("plugin", "build", "--cuda-lib", lib, "-o", cross_tools / "out")
    assert "--cuda-lib is for --cross" in line
    of_x86 = cuda_runtime(cross_tools / "x86" / "lib", machine=62)
    assert "is for x86_64, not for aarch64" in refusal(*build_it, "aarch64", "--cuda-lib", of_x86)
    no_archive = cuda_runtime(cross_tools / "text" / "lib")
    written(no_archive / "libcudart_static.a", b"text")
    line = refusal(*build_it, "aarch64", "--cuda-lib", no_archive)
    assert "is for no known processor" in line
    of_12 = cuda_runtime(cross_tools / "old" / "lib", version=12060)
    line = refusal(*build_it, "aarch64", "--cuda-lib", of_12)
    assert "is of CUDA 12, and nvcc of CUDA 13.0.88" in line
    (cross_tools / "toolkit" / "include" / "cuda_runtime.h").unlink()
    assert "has no cuda_runtime.h" in refusal(*build_it, "aarch64", "--cuda-lib", lib)
    (cross_tools / "bin" / "aarch64-linux-gnu-g++").unlink()
    line = refusal(*build_it, "aarch64", "--cuda-lib", lib)
    assert "sudo apt-get install g++-aarch64-linux-gnu" in line
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "this machine is aarch64 itself" in refusal(*build_it, "aarch64", "--cuda-lib", lib)
    assert not (cross_tools / "out").exists()
    assert not (cross_tools / "arguments").exists()


def test_cuda_12_calls_thor_101_and_has_other_packages() -> None:
    assert cross.jetson_architectures(CUDA_12) == "87,101"
    assert cross.jetson_architectures(CUDA_13) == "87,110"
    remedy = cross.remedy_for_cuda_runtime(CUDA_12)
    assert "nvidia-cuda-runtime-cu12==12.8.*" in remedy
    assert "cudart/nvidia/cuda_runtime/lib" in remedy


def test_no_kept_architecture(made_up_tools: Path) -> None:
    program(made_up_tools / "bin" / "nvcc", "echo 'release 12.0, V12.0.76'; echo compute_50")
    line = refusal("plugin", "build", "--arch", "all", "-o", made_up_tools / "out")
    assert "knows none of the kept architectures" in line
    assert "50" in line


def test_no_space_is_one_line(made_up_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cmake_makes(made_up_tools, our_library())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build.shutil, "copyfile", full)
    line = refusal("plugin", "build", "--arch", "87", "-o", made_up_tools / "out")
    assert "no space left to write" in line
    assert not (made_up_tools / "out").exists()


def start_slow_build(machine: Path) -> subprocess.Popen[str]:
    """Start a build in a process of its own that is not done in minutes; see `wait_for_child`."""
    cmake_does(
        machine,
        f'[ "$1" = --build ] || exit 0\ntouch "$2/half"; sleep 300 &\n'
        f"echo $! > {machine}/pid.new; mv {machine}/pid.new {machine}/pid; wait",
    )
    code = (
        f"from pathlib import Path; import simprune_deploy.engine.plugin.toolchain as t\n"
        f"t.SYSTEM_INCLUDE = Path({str(machine / 'include')!r})\n"
        "from simprune_deploy.cli import main; main()"
    )

    def as_by_default() -> None:
        # a test run in the background may have been told to ignore these, and would pass that on
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-c", code, "plugin", "build", "--arch", "87", "-o", "deep/out"],
        cwd=machine,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_by_default,
    )


def wait_for_child(machine: Path, process: subprocess.Popen[str]) -> Path:
    """Return the folder in /proc of a process that the build's CMake has started."""
    deadline = time.monotonic() + 60
    while not (machine / "pid").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return Path("/proc", (machine / "pid").read_text().strip())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_stopped_build_leaves_nothing(
    made_up_tools: Path, number: signal.Signals, code: int
) -> None:
    """The signal ends CMake and all it started, and leaves no file, no log and no folder."""
    process = start_slow_build(made_up_tools)
    try:
        child = wait_for_child(made_up_tools, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert not (made_up_tools / "deep").exists()
    assert list((made_up_tools / "tmp").iterdir()) == []
    deadline = time.monotonic() + 10
    while child.exists() and "sleep" in (child / "cmdline").read_text():
        assert time.monotonic() < deadline, "a process of the build is still running"
        time.sleep(0.05)


def test_a_second_signal_does_not_interrupt_the_cleaning_up() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cleaned_up = []

    @build._stopping_cleanly()
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            cleaned_up.append(True)

    try:
        with pytest.raises(SystemExit) as stopped:
            work()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 143
    assert cleaned_up


def test_handlers_of_signals_are_put_back(made_up_tools: Path) -> None:
    """And one that the calling program has set, or a signal that it ignores, is left alone."""
    seen = made_up_tools / "seen"
    cmake_makes(made_up_tools, our_library())
    options = BuildOptions(arch="87", output=made_up_tools / "out", force=True)
    names = (signal.SIGTERM, signal.SIGHUP)

    def now() -> list[Any]:
        return [signal.getsignal(each) for each in names]

    before = now()
    handlers: list[Any] = []
    try:
        for wanted in ((signal.SIG_DFL,) * 2, (lambda *_: seen.touch(), signal.SIG_IGN)):
            for each, handler in zip(names, wanted, strict=True):
                signal.signal(each, handler)
            during: list[list[Any]] = []
            build.build(options, lambda _, during=during: during.append(now()))
            assert now() == list(wanted)
            handlers.append(during[0])
            assert all(each == during[0] for each in during)
        assert signal.SIG_DFL not in handlers[0]
        assert handlers[1] == list(wanted)
    finally:
        for each, handler in zip(names, before, strict=True):
            signal.signal(each, handler)


def test_a_build_in_another_thread(made_up_tools: Path) -> None:
    """Only the main thread may set handlers."""
    cmake_makes(made_up_tools, our_library())
    with ThreadPoolExecutor(1) as pool:
        options = BuildOptions(arch="87", output=made_up_tools / "out")
        assert pool.submit(build.build, options).result().info.path.is_file()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom simprune_deploy.cli import main\ntry:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'numpy', 'onnx', 'ctypes'}\n"
        "    print('loaded', sorted(heavy & set(sys.modules)), end.code)"
    )
    for arguments in (["plugin", "--help"], ["plugin", "build", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert answer.stdout.rstrip().endswith("loaded [] 0"), answer.stdout


# --- the real thing -------------------------------------------------------------------------------


def test_the_library_for_every_architecture(plugin_library: Path) -> None:
    """What `plugin build --arch all` wrote and printed."""
    printed = json.loads(plugin_library.with_name("build.json").read_text())
    nvcc = toolchain.find_nvcc()
    info = read_info(plugin_library)
    wanted = tuple(each for each in toolchain.KEPT_ARCHITECTURES if each in nvcc.architectures)
    assert info.device_code.sms == wanted
    assert info.device_code.ptx == ()
    assert info.architectures == wanted
    if nvcc.version.startswith("13.0"):
        assert wanted == toolchain.KEPT_ARCHITECTURES
    assert info.kind == "plugin"
    assert info.version == simprune_deploy.__version__
    assert info.cuda == nvcc.version
    assert info.tensorrt_headers == "10.14"
    assert info.fields == FIELDS
    assert info.machine == platform.machine()
    assert printed["library"]["sha256"] == info.sha256 == sha256(plugin_library)
    assert printed["library"]["bytes"] == plugin_library.stat().st_size
    assert printed["library"]["device_code"] == {"sms": list(wanted), "ptx": []}
    assert printed["nvcc"]["version"] == nvcc.version
    assert printed["tensorrt_headers"]["version"] == "10.14"
    assert printed["seconds"] > 0


def test_info_of_the_library(plugin_library: Path) -> None:
    code, out, err = run("plugin", "info", plugin_library)
    assert (code, err) == (0, "")
    for text in ("SM 75, 80, 86, 87", "10.14", "SimilarityPrune", "num_prefix_tokens int32"):
        assert text in out
    code, out, err = run("plugin", "info", plugin_library, "--json")
    assert (code, err) == (0, "")
    info = read_info(plugin_library).to_dict()
    assert json.loads(out) == json.loads(json.dumps(info))


def test_missing_tools_skip_a_test_but_not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Path:
        raise plugin_build.UnavailableError("no nvcc found")

    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no nvcc found"):
        plugin_build.made(make)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no nvcc found"):
        plugin_build.made(make)


def test_versions_agree() -> None:
    assert (ROOT / "plugins" / "version.txt").read_text() == f"{simprune_deploy.__version__}\n"


@pytest.mark.parametrize(
    ("environment", "settings", "found"),
    [
        ({"CUDAFLAGS": "-use_fast_math"}, [], "CMAKE_CUDA_FLAGS has use_fast_math"),
        ({}, ["-DCMAKE_CUDA_FLAGS_RELEASE=-ftz=true"], "CMAKE_CUDA_FLAGS_RELEASE has ftz=true"),
        (
            {"NVCC_APPEND_FLAGS": "--default-stream per-thread"},
            [],
            "NVCC_APPEND_FLAGS has default-stream per-thread",
        ),
        ({"CUDAFLAGS": "-lineinfo"}, [], None),
    ],
)
def test_cmake_by_itself_refuses_options_that_change_results(
    nvcc: toolchain.Nvcc,
    tmp_path: Path,
    environment: dict[str, str],
    settings: list[str],
    found: str | None,
) -> None:
    command = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(tmp_path), "-G", "Unix Makefiles"]
    command += [f"-DCMAKE_CUDA_COMPILER={nvcc.path}", "-DSIMPRUNE_TENSORRT=OFF"]
    command += [f"-DCMAKE_CUDA_ARCHITECTURES={nvcc.architectures[-1]}-real", *settings]
    answer = subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if found is not None:
        assert answer.returncode == 1
        assert f"{found}, which changes what the kernels" in " ".join(answer.stderr.split())
        return
    assert answer.returncode == 0, answer.stderr
    flags = (tmp_path / "CMakeFiles" / "simprune_cuda.dir" / "flags.make").read_text()
    (cuda,) = re.findall(r"^CUDA_FLAGS = (.*)$", flags, re.M)
    for option in ("-ftz=false", "-prec-div=true", "-prec-sqrt=true", "--default-stream legacy"):
        assert cuda.index(option) > cuda.index("-lineinfo")  # the last one counts


def cross_flags(tmp_path: Path, folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    """Read the settings for 64-bit Arm as CMake does, more than once, and print CUDAFLAGS."""
    settings = ROOT / "plugins" / "cmake" / "aarch64-linux-gnu.cmake"
    script = tmp_path / "script.cmake"
    script.write_text(
        f'include("{settings}")\ninclude("{settings}")\nmessage("CUDAFLAGS=$ENV{{CUDAFLAGS}}")\n'
    )
    return subprocess.run(
        ["cmake", f"-DSIMPRUNE_CUDA_TARGET_LIB={folder}", "-P", str(script)],
        env={**os.environ, "CUDAFLAGS": flags},
        capture_output=True,
        text=True,
    )


def test_folders_of_a_cross_build(tmp_path: Path) -> None:
    folder = tmp_path / "g++" / "lib"
    answer = cross_flags(tmp_path, folder, f"-lineinfo -L{tmp_path}/g/lib")
    assert answer.returncode == 0, answer.stderr
    (flags,) = re.findall("CUDAFLAGS=(.*)", answer.stderr)
    assert re.fullmatch(rf"-I\S+ -L{re.escape(str(folder))} -lineinfo -L\S+", flags)
    for name in ("with space", "a'b", "[lib"):
        answer = cross_flags(tmp_path, tmp_path / name, "")
        assert answer.returncode == 1
        said = " ".join(answer.stderr.split())
        assert f"{tmp_path / name} has '" in said
        assert "name it by a symbolic link" in said


def setuptools_version() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("setuptools")
    return "0"


def test_an_installed_wheel_builds_the_kernels(tmp_path: Path, nvcc: toolchain.Nvcc) -> None:
    """The wheel holds the C++ sources without their tests, and builds from them."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "simprune_deploy", "plugins"):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, checkout / name, ignore=ignored)
        else:
            shutil.copy(source, checkout / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = tmp_path / "wheels"
    # with what is installed where that will do, else with a setuptools that pip fetches
    here = [] if is_older(setuptools_version(), "77") else ["--no-build-isolation"]
    made = subprocess.run(
        [*pip, "wheel", *here, "--no-deps", "-w", str(wheels), str(checkout)],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = wheels.iterdir()
    home = "simprune_deploy/engine/plugin/source/"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith(home)}
        assert not [name for name in archive.namelist() if name.startswith("plugins/")]
        # and a bundle's own wheel has the same package: nothing is missing in pyproject.toml
        package = {name for name in archive.namelist() if name.startswith("simprune_deploy/")}
        assert package == set(own_wheel.package_files())
    needed = {
        path.relative_to(ROOT / "plugins").as_posix()
        for path in (ROOT / "plugins").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    needed = {name for name in needed if not name.startswith("tests/")}
    assert {name.removeprefix(home) for name in inside} == needed

    target = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--target", str(target), str(wheel)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    output = tmp_path / "out"
    code = (
        "import simprune_deploy; print(simprune_deploy.__file__)\n"
        "from simprune_deploy.cli import main; main()"
    )
    arguments = ["plugin", "build", "--kernels-only", "--arch", ",".join(nvcc.architectures[-2:])]
    # and where the name of the folder for temporary files has a space
    temporary = tmp_path / "with space"
    temporary.mkdir()
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments, "-o", str(output)],
        env={**os.environ, "PYTHONPATH": str(target), "TMPDIR": str(temporary)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(target))
    info = read_info(output / "libsimprune_kernels.so")
    assert (info.kind, info.tensorrt_headers) == ("kernels", None)
    assert info.device_code.sms == nvcc.architectures[-2:]
    assert list(temporary.iterdir()) == []
