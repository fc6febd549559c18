"""The C++ example compiles, links with NVIDIA's runtime, and ends with one line where it must."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_engine import metadata_of
from plugin_build import CPP_EXAMPLE, cpp_example, made
from tensorrt_wheels import installed_lean

from simprune_deploy.common.files import write_json
from simprune_deploy.engine.engine_metadata import metadata_path
from simprune_deploy.engine.gpu import NoGpuError, find_gpu

LEAN = "10.16.1"

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def program() -> Path:
    """Return the compiled example, linked with TensorRT's lean runtime."""
    return made(lambda: cpp_example(installed_lean(LEAN))) / "simprune_run"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Return a file with an engine's metadata, for the TensorRT that the example is linked with."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"not machine code")
    describe(path)
    return path


def describe(engine: Path, **changes: Any) -> None:
    metadata = metadata_of(engine, **{"version": LEAN, "plugin": None, **changes})
    write_json(metadata_path(engine), metadata.to_dict())


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    np.zeros((1, 3, 8, 8), np.float32).tofile(path)
    return path


def ends_with(says: str, *command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr


def test_it_is_linked_with_the_library_of_nvidia(program: Path) -> None:
    said = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert "libnvinfer_lean.so.10 =>" in said
    assert "not found" not in said


def test_without_a_gpu_it_says_so(program: Path, engine: Path, image: Path) -> None:
    """Everything before the GPU fits: the metadata, the size, TensorRT's version."""
    try:
        find_gpu()
    except NoGpuError:
        ends_with("no GPU was found", program, engine, image)
    else:
        pytest.skip("there is a GPU")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": "10.3.0"}, "SM 8.7 with tensorrt 10.3.0; this is TensorRT 10.16.1: run"),
        ({"version": "10.16.10"}, "10.16.10; this is TensorRT 10.16.1: run"),
        ({"flavour": "tensorrt-rtx"}, "tensorrt-rtx 10.16.1, and this program is linked with Tens"),
        (
            {"plugin": metadata_of(Path(__file__)).plugin},
            "libsimprune_plugin.so in it: name it with",
        ),
    ],
    ids=["older", "longer number", "rtx", "plugin"],
)
def test_what_does_not_fit_is_refused_before_tensorrt_sees_it(
    program: Path, engine: Path, image: Path, changes: dict[str, Any], says: str
) -> None:
    describe(engine, **changes)
    ends_with(says, program, engine, image)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: `simprune-deploy build` writes it"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "x"}', "is damaged"),
        ('{"format": 2}', "has format 2, and this program reads 3"),
        ('{"format": 3, "flavour": 1}', "is damaged"),
        (" " * 2_000_000, "is damaged"),
    ],
)
def test_damaged_metadata(
    program: Path, engine: Path, image: Path, text: str | None, says: str
) -> None:
    metadata = metadata_path(engine)
    metadata.unlink()
    if text is not None:
        metadata.write_text(text, encoding="utf-8")
    ends_with(says, program, engine, image)


def test_bad_calls(program: Path, engine: Path, image: Path, tmp_path: Path) -> None:
    ends_with("usage: simprune_run", program)
    ends_with("usage: simprune_run", program, engine)
    ends_with("--runs needs a value", program, engine, image, "--runs")
    ends_with("--runs many is not a number", program, engine, image, "--runs", "many")
    ends_with("unknown option --fast", program, engine, image, "--fast", "1")
    ends_with("none.raw cannot be read", program, engine, tmp_path / "none.raw")
    engine.write_bytes(b"another size")
    ends_with("its size differs", program, engine, image)


def test_an_engine_for_another_gpu(program: Path, engine: Path, tmp_path: Path) -> None:
    """What needs a GPU in the example: the same functions, told which GPU it is."""
    source = tmp_path / "told.cpp"
    source.write_text(
        '#include <cstdio>\n#include "engine_metadata.h"\n'
        "int main(int, char** argv) {\n"
        "    try { checkGpu(readEngineMetadata(argv[1]), argv[2]); return 0; }\n"
        '    catch (Failure const& error) { std::fprintf(stderr, "error: %s\\n", error.what()); }\n'
        "    return 2;\n}\n",
        encoding="utf-8",
    )
    (compiled,) = program.parent.rglob("engine_metadata.cpp.o")
    told = tmp_path / "told"
    command = ["c++", "-std=c++17", "-I", CPP_EXAMPLE, source, compiled, "-o", told]
    subprocess.run([str(part) for part in command], check=True)
    describe(engine, compute_capabilities=("8.7", "11.0"))
    for known in ("8.7", "11.0"):
        subprocess.run([str(told), str(engine), known], check=True)
    ends_with("SM 8.7 11.0 with tensorrt 10.16.1; this is SM 8.9: run", told, engine, "8.9")
