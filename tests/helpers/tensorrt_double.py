"""A stand-in for the module ``tensorrt`` where the real library is absent.

What is real: the network, the ONNX parser, the optimization profiles and the builder's
configuration are those of ``tensorrt_rtx``, NVIDIA's own, whose Python API is that of TensorRT 11.
So a graph has to parse, a profile has to fit it, and a call that the API does not have fails.

What is not, and so is never shown by a test that uses it: the builder's work (an engine is a record
of what the builder was asked), whether TensorRT itself takes the graph, the plugin or its shapes,
tactics and their timings, loading and running an engine. The plugin is not loaded: with it in
place TensorRT-RTX's parser aborts the process. What TensorRT's parser does with a node that has a
plugin, a function or both is played as NVIDIA documented it for 10.7, which is false from 10.15 on
and says nothing of the parse error of dynamic counts from 10.6 to 10.14 (docs/engines.md): a test
that uses this shows which file `build` hands over, and not what TensorRT makes of it.

:func:`double` gives the module of a version. The differences between versions that it plays: a
function in the file is looked at before the plugins until 10.7; the network is told to be strongly
typed by a flag, which 11 takes and ignores; a timing cache of another version is not taken.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

MARK = b"double of an engine "


def install(folder: Path, version: str) -> Path:
    """Write a module ``tensorrt`` of that version into a folder for ``PYTHONPATH``."""
    package = folder / f"tensorrt-{version}"
    package.mkdir()
    here = str(Path(__file__).parent)
    text = (
        f"import sys\nsys.path.append({here!r})\nimport tensorrt_double\n"
        f"globals().update(vars(tensorrt_double.double({version!r})))\n"
    )
    (package / "tensorrt.py").write_text(text, encoding="utf-8")
    return package


def read_record(engine: Path) -> dict[str, Any]:
    """Return what the builder of an engine was asked."""
    record: dict[str, Any] = json.loads(engine.read_bytes().removeprefix(MARK))
    return record


def double(version: str) -> types.ModuleType:
    """Return a module that behaves as ``tensorrt`` of that version, as far as the top tells."""
    # long because its classes derive from those of a module that is imported here, and only here
    import tensorrt_rtx as real

    numbers = tuple(int(each) for each in version.split(".")[:2])
    loaded: list[str] = []
    module = types.ModuleType("tensorrt")
    public = {name: value for name, value in vars(real).items() if not name.startswith("__")}
    vars(module).update(public)
    module.__version__ = version  # type: ignore[attr-defined]

    class Builder(real.Builder):  # type: ignore[misc,name-defined]
        def create_network(self, flags: int = 0) -> Any:
            self.flags = flags
            return super().create_network(flags)

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            asked = {
                "version": version,
                "strong_typing_flag": bool(
                    self.flags >> int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1
                ),
                "operator": OnnxParser.operator,
                "plugins": loaded,
                "inputs": _tensors(network.get_input, network.num_inputs),
                "outputs": _tensors(network.get_output, network.num_outputs),
                "tf32": config.get_flag(real.BuilderFlag.TF32),
                "workspace": config.get_memory_pool_limit(real.MemoryPoolType.WORKSPACE),
                "profiles": config.num_optimization_profiles,
                "timing_cache": TimingCache.given.decode(),
            }
            monitor = config.progress_monitor
            monitor.phase_start("Building Engine", None, 1)
            monitor.phase_start("Tactic selection", "Building Engine", 1)
            assert monitor.step_complete("Tactic selection", 0)
            return MARK + json.dumps(asked).encode()

        def create_builder_config(self) -> Any:
            return Config(super().create_builder_config())

    class OnnxParser(real.OnnxParser):  # type: ignore[misc,name-defined]
        operator = "none"

        def parse_from_file(self, path: str) -> bool:
            return bool(self.parse(Path(path).read_bytes()))

        def parse(self, data: bytes) -> bool:
            import onnx

            from simprune_deploy.onnx.variants import prune_nodes, with_function

            graph = onnx.load_from_string(data)
            if prune_nodes(graph):
                takes_plugin = bool(loaded) and (not graph.functions or numbers >= (10, 7))
                OnnxParser.operator = "plugin" if takes_plugin else "function"
                if takes_plugin:  # the real parser needs something to give shapes
                    data = with_function(graph).SerializeToString()
            return bool(super().parse(data))

    class TimingCache:
        """TensorRT-RTX's timing caches do nothing; one here is the bytes that it was made of."""

        given = b""

        def __init__(self, data: bytes) -> None:
            self.data = bytes(data)

        def serialize(self) -> bytes:
            return b"timed by " + version.encode()

    class Config:
        """The real configuration, with the timing cache that it has no use for."""

        def __init__(self, config: Any) -> None:
            object.__setattr__(self, "_config", config)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._config, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self._config, name, value)

        def create_timing_cache(self, data: bytes) -> Any:
            return TimingCache(data)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            """Take no cache of another version, as TensorRT does unless it is told to."""
            if cache.data not in (b"", f"timed by {version}".encode()):
                return False
            TimingCache.given = cache.data
            object.__setattr__(self, "_cache", cache)
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Runtime(real.Runtime):  # type: ignore[misc,name-defined]
        def deserialize_cuda_engine(self, engine: bytes) -> Any:
            return json.loads(bytes(engine).removeprefix(MARK))

    class Registry:
        def load_library(self, path: str) -> Any:
            from simprune_deploy.pruning.kernel_library import read_info

            loaded.append(read_info(path).sha256)
            return object()

        def get_creator(self, name: str, plugin_version: str, namespace: str) -> Any:
            found = (name, plugin_version, namespace) == ("SimilarityPrune", "1", "")
            return object() if loaded and found else None

    def get_plugin_registry() -> Any:
        return Registry()

    for each in (Builder, OnnxParser, Runtime, get_plugin_registry):
        setattr(module, each.__name__, each)
    return module


def _tensors(get: Any, count: int) -> dict[str, list[Any]]:
    return {get(i).name: [get(i).dtype.name, *get(i).shape] for i in range(count)}
