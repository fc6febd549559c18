"""NVIDIA's own plugin registries take the library and create plugins with it, without a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from plugin_build import cmake_build, made
from tensorrt_wheels import installed_lean, installed_rtx

PROBE = ROOT / "tests" / "helpers" / "registry_probe.py"
LEAN_VERSIONS = ["10.16.1", "11.0.0", "11.4.0"]

FIELDS = {
    "num_prefix_tokens": "INT32",
    "selection": "CHAR",
    "reduction": "CHAR",
    "capacity": "INT32",
    "multiple_of": "INT32",
    "opt_tokens": "INT32",
    "max_tokens": "INT32",
}
DEFAULTS = {
    "num_prefix_tokens": 1,
    "selection": "pairs",
    "reduction": "merge",
    "capacity": 0,
    "multiple_of": 1,
    "opt_tokens": 0,
    "max_tokens": 0,
}
ONE_PREFIX = ["num_prefix_tokens", "INT32", 1]

# name -> fields, and what the plugin made from them serializes
GOOD: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "defaults": ([ONE_PREFIX], DEFAULTS),
    "int64": ([["num_prefix_tokens", "INT64", 1]], DEFAULTS),
    "list of one": ([["num_prefix_tokens", "INT32", [1]]], DEFAULTS),
    "strings with NUL": (
        [ONE_PREFIX, ["selection", "CHAR", "redundancy\0"], ["reduction", "CHAR", "drop\0"]],
        {**DEFAULTS, "selection": "redundancy", "reduction": "drop"},
    ),
    "the node's names": ([ONE_PREFIX, ["plugin_version", "CHAR", "2"]], DEFAULTS),
    "all": (
        [
            ["num_prefix_tokens", "INT32", 5],
            ["selection", "CHAR", "redundancy"],
            ["reduction", "CHAR", "drop"],
            ["capacity", "INT32", 64],
            ["multiple_of", "INT32", 8],
            ["opt_tokens", "INT32", 300],
            ["max_tokens", "INT32", 577],
        ],
        {
            "num_prefix_tokens": 5,
            "selection": "redundancy",
            "reduction": "drop",
            "capacity": 64,
            "multiple_of": 8,
            "opt_tokens": 300,
            "max_tokens": 577,
        },
    ),
}

# name -> fields, and the message
BAD: dict[str, tuple[list[Any], str]] = {
    "no fields": ([], "num_prefix_tokens is missing"),
    "negative": ([["num_prefix_tokens", "INT32", -1]], "num_prefix_tokens -1 is outside"),
    "two values": ([["num_prefix_tokens", "INT32", [1, 2]]], "num_prefix_tokens has 2 values"),
    "float": ([["num_prefix_tokens", "FLOAT32", 1.0]], "num_prefix_tokens is of type float32"),
    "string": ([["num_prefix_tokens", "CHAR", "1"]], "num_prefix_tokens is of type string"),
    "unknown selection": ([ONE_PREFIX, ["selection", "CHAR", "nearest"]], 'selection "nearest" is'),
    "unknown reduction": ([ONE_PREFIX, ["reduction", "CHAR", "mean"]], 'reduction "mean" is'),
    "number as selection": ([ONE_PREFIX, ["selection", "INT32", 0]], "selection is of type int32"),
    "capacity": ([ONE_PREFIX, ["capacity", "INT32", 5000]], "capacity 5000 is outside [0, 4096]"),
    "multiple_of": ([ONE_PREFIX, ["multiple_of", "INT32", 0]], "multiple_of 0 is outside [1, "),
    "unknown field": ([ONE_PREFIX, ["treshold", "FLOAT32", 0.9]], 'field "treshold" is not known'),
    "twice": ([ONE_PREFIX, ONE_PREFIX], "num_prefix_tokens is given twice"),
    "version 1": ([ONE_PREFIX, ["plugin_version", "CHAR", "1"]], "is from before version 2"),
    "cover": ([ONE_PREFIX, ["selection", "CHAR", "cover\0"]], "is from before version 2"),
}

LINEAR = [
    ["float32", "float16", "bfloat16"],  # tokens
    ["float32"],  # features, where the tokens are float32
    ["float32"],  # log_size
    ["float32"],  # threshold
    ["float32"],  # kept_tokens, where the tokens are float32
    ["float32"],  # kept_log_size
    ["int64"],  # kept_index
    ["int64"],  # assignment
    ["int32"],  # the size tensor
]

pytestmark = pytest.mark.timeout(3600)


@dataclasses.dataclass(frozen=True)
class Registry:
    """One of NVIDIA's registries, by its Python module."""

    name: str
    module: str
    folder: Path | None


@pytest.fixture(scope="session", params=["tensorrt_rtx", *LEAN_VERSIONS])
def registry(request: pytest.FixtureRequest) -> Registry:
    name = request.param
    if name == "tensorrt_rtx":
        made(installed_rtx)
        return Registry(name, name, None)
    return Registry(name, "tensorrt_lean_bindings", made(lambda: installed_lean(name)))


@pytest.fixture(scope="session", params=["host_library", "plugin_library"])
def library(request: pytest.FixtureRequest) -> Path:
    """Return the library of the CPU, and the one that ships."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="session")
def description(tensorrt_headers: Path) -> Path:
    settings = {"SIMPRUNE_CUDA": "OFF", "SIMPRUNE_HOST": "ON", "SIMPRUNE_TESTS": "ON"}
    folder = made(lambda: cmake_build("description", ["plugin_description"], settings))
    return folder / "tests" / "libplugin_description.so"


@pytest.fixture(scope="session")
def answer(registry: Registry, library: Path, description: Path) -> dict[str, Any]:
    """Return what the registry and the plugins in it say."""
    request = {
        "module": registry.module,
        "folder": str(registry.folder) if registry.folder else None,
        "library": str(library),
        "description": str(description),
        "cases": {name: fields for name, (fields, _) in [*GOOD.items(), *BAD.items()]},
    }
    done = subprocess.run(
        [sys.executable, str(PROBE)], input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_registry_is_the_one_that_is_meant(registry: Registry, answer: dict[str, Any]) -> None:
    if registry.folder:
        assert answer["version"].startswith(registry.name + ".")


def test_it_loads_the_library_and_lists_the_creator(answer: dict[str, Any]) -> None:
    assert answer["loaded"], answer["said_when_loaded"]
    assert answer["said_when_loaded"] == []
    assert answer["new"] == ["SimilarityPrune 2 ''"]
    creator = answer["creator"]
    assert (creator["name"], creator["version"]) == ("SimilarityPrune", "2")
    assert creator["namespace"] == ""
    assert creator["interface"] == "PLUGIN CREATOR_V3ONE"
    assert creator["fields"] == FIELDS


def test_it_lets_the_library_go(answer: dict[str, Any]) -> None:
    assert answer["left"] == []


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
@pytest.mark.parametrize("name", GOOD)
def test_it_creates_plugins_from_good_fields(answer: dict[str, Any], name: str, phase: str) -> None:
    fields = GOOD[name][1]
    case = answer["cases"][name][phase]
    assert case["logged"] + case["stderr"] == []
    outputs = 5 if fields["capacity"] == 0 else 4

    plugin = case["plugin"]
    assert (plugin["name"], plugin["version"]) == ("SimilarityPrune", "2")
    assert plugin["namespace"] == ""
    assert plugin["num_outputs"] == outputs
    assert plugin["interfaces"] == [
        "PLUGIN_V3ONE_CORE",
        "PLUGIN_V3ONE_BUILD",
        "PLUGIN_V3ONE_RUNTIME",
    ]
    for field, value in fields.items():
        assert f"{field}={value}" in plugin["timing_cache_id"].split()

    in_cpp = case["in_cpp"]
    assert in_cpp["timing_cache_id"] == plugin["timing_cache_id"]
    assert in_cpp["num_outputs"] == outputs
    assert in_cpp["serialized"] == fields
    assert in_cpp["formats"] == [{"linear": types, "others": 0} for types in LINEAR[: 4 + outputs]]
    assert in_cpp["output_types"].pop("int8") is None
    assert set(in_cpp["output_types"]) == {"float32", "float16", "bfloat16"}
    for tokens, types in in_cpp["output_types"].items():
        assert types == [tokens, "float32", "int64", "int64", "int32"][:outputs]


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
@pytest.mark.parametrize("name", BAD)
def test_it_creates_none_from_bad_fields(
    registry: Registry, answer: dict[str, Any], name: str, phase: str
) -> None:
    case = answer["cases"][name][phase]
    assert case["plugin"] is None
    ours = [line for line in case["logged"] + case["stderr"] if "SimilarityPrune: " in line]
    assert len(ours) == 1
    assert BAD[name][1] in ours[0]
    if registry.name == "tensorrt_rtx":  # the others have no logger where there is no GPU
        assert ours[0] in case["logged"]
        assert case["stderr"] == []


def test_a_program_may_load_several_engines_with_the_plugin(
    registry: Registry, library: Path
) -> None:
    """NVIDIA's registries refuse a library that they have; ours loads it once."""
    if registry.folder is None:
        pytest.skip("TensorRT-RTX takes no plugins")
    program = (
        "import importlib, sys; from pathlib import Path\n"
        "from simprune_deploy.engine.flavours import load_plugin\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "trt = importlib.import_module(sys.argv[2])\n"
        "for _ in range(2): load_plugin(trt, 'tensorrt', Path(sys.argv[3]))\n"
        "assert trt.get_plugin_registry().load_library(sys.argv[3]) is None\n"
    )
    command = [sys.executable, "-c", program, str(registry.folder), registry.module, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TWICE = """
import gc, importlib, os, sys
import numpy as np
sys.path.insert(0, {folder!r} or sys.path[0])
trt = importlib.import_module({module!r})
registry = trt.get_plugin_registry()

def creates():
    found = registry.get_creator("SimilarityPrune", "2", "")
    field = trt.PluginField("num_prefix_tokens", np.int32([1]), trt.PluginFieldType.INT32)
    fields = trt.PluginFieldCollection([field])
    return found.create_plugin("layer", fields, trt.TensorRTPhase.BUILD) is not None

first = registry.load_library({library!r})
again = registry.load_library({library!r})
second = registry.load_library({copy!r})
names = sorted(one.plugin_version for one in registry.all_creators if "Similarity" in one.name)
print(first is None, again is None, second is None, names, creates(), flush=True)
gc.collect()
registry.deregister_library(first)
print(registry.load_library({copy!r}) is None, creates(), flush=True)
os._exit(0)
"""


def test_a_library_is_registered_once(registry: Registry, library: Path, tmp_path: Path) -> None:
    """TensorRT refuses it the second time, and a copy of it, and goes on with the first."""
    copy = shutil.copy(library, tmp_path / "libcopy.so")
    folder = str(registry.folder) if registry.folder else ""
    code = TWICE.format(folder=folder, module=registry.module, library=str(library), copy=str(copy))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False True True ['2'] True", "False True"]


LOADED = """
import importlib, os, sys
from pathlib import Path
from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.engine.flavours import load_plugin
sys.path.insert(0, {folder!r} or sys.path[0])
trt = importlib.import_module({module!r})
try:
    for library in {libraries!r}:
        load_plugin(trt, "tensorrt", Path(library))
        print("loaded", flush=True)
except ArtifactError as error:
    print(error, flush=True)
os._exit(0)
"""


def said_when_loading(
    registry: Registry, libraries: list[Path], **environment: str
) -> tuple[list[str], list[str]]:
    """Return what our loader and our library say of libraries that are loaded in turn."""
    folder = str(registry.folder) if registry.folder else ""
    paths = [str(path) for path in libraries]
    code = LOADED.format(folder=folder, module=registry.module, libraries=paths)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("simprune: ")]
    return done.stdout.splitlines(), ours


def test_two_libraries_with_the_plugin_are_an_error_that_says_so(
    registry: Registry, host_library: Path, tmp_path: Path
) -> None:
    if registry.folder is None:
        pytest.skip("TensorRT-RTX takes no plugins")
    copy = Path(shutil.copy(host_library, tmp_path / "libcopy.so"))
    said, _ = said_when_loading(registry, [host_library, copy])
    assert said[0] == "loaded"
    assert said[1:] == [
        f"TensorRT {said[1].split()[1]} has SimilarityPrune, version 2, of another library in this "
        f"process, and does not take that of {copy}: load one of them alone"
    ]


def test_a_library_that_registers_itself_may_be_loaded_too(
    registry: Registry, host_library: Path, tmp_path: Path
) -> None:
    """SIMPRUNE_REGISTER is set for Triton, and the tools here load the library as well."""
    if registry.folder is None:
        pytest.skip("TensorRT-RTX takes no plugins")
    said, ours = said_when_loading(registry, [host_library], SIMPRUNE_REGISTER="1")
    assert said == ["loaded"]
    if registry.name.startswith("10."):
        assert ours == []
        copy = Path(shutil.copy(host_library, tmp_path / "libcopy.so"))
        said, ours = said_when_loading(registry, [host_library, copy], SIMPRUNE_REGISTER="1")
        assert said[0] == "loaded"
        assert "of another library in this process" in said[1]
        assert ours == [
            f"simprune: the plugin was not registered: TensorRT has SimilarityPrune 2 of "
            f"{host_library} already, which it goes on with: load one library alone"
        ]


OPENED = """
import ctypes, importlib, os, sys
sys.path.insert(0, {folder!r} or sys.path[0])
trt = importlib.import_module({module!r})
registry = trt.get_plugin_registry()
ctypes.CDLL({library!r}, mode=os.RTLD_NOW | os.RTLD_LOCAL)  # as Triton's backend opens it
for version in ("2", "1"):
    creator = registry.get_creator("SimilarityPrune", version, "")
    print(version, creator is not None and creator.plugin_version, flush=True)
if creator is not None:
    print(creator.create_plugin("layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.RUNTIME))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("wish", [None, "0", "1"])
def test_an_opened_library_registers_itself_if_it_is_told_to(
    registry: Registry, host_library: Path, wish: str | None
) -> None:
    """Triton only opens the library. The headers that it was compiled with are TensorRT 10's."""
    folder = str(registry.folder) if registry.folder else ""
    code = OPENED.format(folder=folder, module=registry.module, library=str(host_library))
    environment = {key: value for key, value in os.environ.items() if key != "SIMPRUNE_REGISTER"}
    environment |= {"SIMPRUNE_REGISTER": wish} if wish else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "simprune" in line]
    if wish == "1" and registry.name.startswith("10."):
        # what an engine from before version 2 asks for is there to say so
        assert done.stdout.splitlines() == ["2 2", "1 1", "None"]
        assert ours == [
            '[simprune] SimilarityPrune: plugin_version is "1": the file is from before version 2 '
            "of this operator: export the model and build its engine again"
        ]
        return
    assert done.stdout.splitlines() == ["2 False", "1 False"]
    if wish != "1":
        assert ours == []
    else:
        why = (
            "no TensorRT is loaded in this process"
            if registry.module == "tensorrt_rtx"
            else "it was compiled with the headers of TensorRT 10, and this is 11: build it with "
            "this version's"
        )
        assert ours == [f"simprune: the plugin was not registered: {why}"]


def test_an_opened_library_needs_tensorrt_in_the_process(host_library: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(host_library)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "SIMPRUNE_REGISTER": "1"},
    )
    assert done.returncode == 0
    assert "no TensorRT is loaded in this process" in done.stderr
