"""Loads the plugin into one of NVIDIA's plugin registries and prints, as JSON, what came of it.

    python registry_probe.py < request.json

A program of its own, because a registry lives as long as its process. The request (JSON):

    module       tensorrt_rtx or tensorrt_lean_bindings
    folder       where that module was installed; null where it is installed as usual
    library      the plugin library
    description  libplugin_description.so of plugins/tests/list_creators.cpp
    cases        name -> fields, each [name, type of PluginFieldType, value]

NVIDIA's Python classes say no more of a plugin in C++ than its name, version, namespace, number of
outputs, timing cache id and metadata: their other methods are there for plugins written in Python
(for one in C++ they are missing, or give nothing). The rest is asked in C++, at the address that
the registry's Python object holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

Field = tuple[str, str, Any]


def main() -> None:
    request = json.load(sys.stdin)
    if request["folder"]:
        sys.path.insert(0, request["folder"])
    trt = importlib.import_module(request["module"])
    logged: list[str] = []
    logger = new_logger(trt, logged)
    with said_on_stderr():  # without a GPU some versions complain here, and then know no logger
        runtime = trt.Runtime(logger)  # noqa: F841  (the registry logs as long as it is there)
    logged.clear()
    registry = trt.get_plugin_registry()
    before = names(registry)
    with said_on_stderr() as said:
        handle = registry.load_library(request["library"])
    result: dict[str, Any] = {
        "version": trt.__version__,
        "loaded": handle is not None,
        "said_when_loaded": [*logged, *said],
        "new": sorted(names(registry) - before),
        "creator": None,
        "cases": {},
    }
    if handle is not None:
        creator = registry.get_creator("SimilarityPrune", "2", "")
        result["creator"] = describe_creator(creator)
        describe = description_of(request["description"])
        for phase in ("BUILD", "RUNTIME"):
            for name, fields in request["cases"].items():
                answer = create(trt, creator, fields, phase, describe, logged)
                result["cases"].setdefault(name, {})[phase] = answer
        del creator
        gc.collect()
        registry.deregister_library(handle)
        result["left"] = sorted(names(registry) - before)
    print(json.dumps(result), flush=True)
    # A runtime that could not be made crashes where Python would delete it
    os._exit(0)


def names(registry: Any) -> set[str]:
    return {
        f"{one.name} {one.plugin_version} {one.plugin_namespace!r}" for one in registry.all_creators
    }


def describe_creator(creator: Any) -> dict[str, Any]:
    return {
        "name": creator.name,
        "version": creator.plugin_version,
        "namespace": creator.plugin_namespace,
        "interface": creator.interface_info.kind,
        "fields": {field.name: field.type.name for field in creator.field_names},
    }


def create(
    trt: ModuleType, creator: Any, fields: list[Field], phase: str, describe: Any, logged: list[str]
) -> dict[str, Any]:
    """Return what a plugin made from the fields says in Python and C++, or why there is none."""
    kept = [(name, kind, value_of(kind, value)) for name, kind, value in fields]
    collection = trt.PluginFieldCollection(
        [
            trt.PluginField(name, value, getattr(trt.PluginFieldType, kind))
            for name, kind, value in kept
        ]
    )
    logged.clear()
    with said_on_stderr() as said:
        plugin = creator.create_plugin("layer", collection, getattr(trt.TensorRTPhase, phase))
    answer: dict[str, Any] = {"logged": list(logged), "stderr": said, "plugin": None}
    if plugin is None:
        return answer
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
    answer["plugin"] = {
        "name": core.plugin_name,
        "version": core.plugin_version,
        "namespace": core.plugin_namespace,
        "num_outputs": build.num_outputs,
        "timing_cache_id": build.timing_cache_id,
        "metadata": build.metadata_string,
        "format_combination_limit": build.format_combination_limit,
        "interfaces": [each.interface_info.kind for each in (core, build, runtime)],
    }
    with said_on_stderr():  # it is also asked for types that are refused
        answer["in_cpp"] = describe(plugin)
    return answer


def value_of(kind: str, value: Any) -> Any:
    if kind == "CHAR":
        return value.encode()
    return np.array(value, {"INT32": np.int32, "INT64": np.int64, "FLOAT32": np.float32}[kind])


def new_logger(trt: ModuleType, logged: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                logged.append(message)

    return Logger()


def description_of(path: str) -> Any:
    """Return a function that asks a plugin in C++ and returns what it says."""
    library = ctypes.CDLL(path)
    library.describe_plugin.argtypes = [ctypes.c_void_p]
    library.describe_plugin.restype = library.type_info_name.restype = ctypes.c_char_p
    library.plugin_type.restype = ctypes.c_void_p
    name_of_type = library.type_info_name()  # a capsule does not copy its name
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    new_capsule.restype = ctypes.py_object
    name_of, address_in = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.argtypes, name_of.restype = [ctypes.py_object], ctypes.c_char_p
    address_in.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address_in.restype = ctypes.c_void_p

    def describe(plugin: Any) -> Any:
        # pybind11's way to hand an object to other modules, which say how they were compiled. Its
        # versions differ in whether that begins with an underscore
        (mark,) = [name for name in dir(plugin) if name.startswith("__pybind11_module_local_v")]
        compiled = mark.removesuffix("__").split("_", 6)[-1]
        wanted = new_capsule(library.plugin_type(), name_of_type, None)
        for compiler in (compiled, "_" + compiled):
            capsule = plugin._pybind11_conduit_v1_(
                compiler.encode(), wanted, b"raw_pointer_ephemeral"
            )
            if capsule is not None:
                address = address_in(capsule, name_of(capsule))
                return json.loads(library.describe_plugin(address))
        raise RuntimeError(f"these Python bindings, compiled as {compiled}, give no address")

    return describe


@contextlib.contextmanager
def said_on_stderr() -> Iterator[list[str]]:
    """Collect what C++ writes to stderr meanwhile."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()


if __name__ == "__main__":
    main()
