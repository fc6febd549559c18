"""A stand-in for the module ``tensorrt`` where the real library is absent.

What is real: the network, the ONNX parser, the optimization profiles and the builder's
configuration are those of ``tensorrt_rtx``, NVIDIA's own, whose Python API is that of TensorRT 11.
So a graph has to parse, a profile has to fit it, and a call that the API does not have fails.

What is not, and so is never shown by a test that uses it: the builder's work (an engine is a record
of what the builder was asked), whether TensorRT itself takes the graph, the plugin or its shapes,
tactics and their timings, loading and running an engine. The plugin is not loaded: with it in
place TensorRT-RTX's parser aborts the process. What TensorRT's parser does with a node that has a
plugin, a function or both is played by the rules in parser_rules.py; a node that becomes a plugin
is parsed with its function, which the real parser needs for the shapes behind it, and the network
shows one plugin layer more for it.

:func:`double` gives the module of a version. The differences between versions that it plays: those
of the parser's rules; the network is told to be strongly typed by a flag, which 11 takes and
ignores; a timing cache of another version is not taken.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import onnx
import parser_rules

from simprune_deploy.onnx.function_body import OP_TYPE
from simprune_deploy.onnx.variants import with_function

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
    creators: set[parser_rules.Creator] = set()
    module = types.ModuleType("tensorrt")
    public = {name: value for name, value in vars(real).items() if not name.startswith("__")}
    vars(module).update(public)
    module.__version__ = version  # type: ignore[attr-defined]

    class Builder(real.Builder):  # type: ignore[misc,name-defined]
        def create_network(self, flags: int = 0) -> Any:
            self.flags = flags
            return Network(super().create_network(flags))

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            asked = {
                "version": version,
                "strong_typing_flag": bool(
                    self.flags >> int(real.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1
                ),
                "operator": network.operator,
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

    class Network:
        """The real network, which has no plugin layers, and those that TensorRT's would have."""

        def __init__(self, network: Any) -> None:
            self.real = network
            self.plugins: list[str] = []
            self.operator = "none"

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __iter__(self) -> Any:
            return iter(self.real)

        @property
        def num_layers(self) -> int:
            return int(self.real.num_layers) + len(self.plugins)

        def get_layer(self, index: int) -> Any:
            if index < self.real.num_layers:
                return self.real.get_layer(index)
            name = self.plugins[index - self.real.num_layers]
            return types.SimpleNamespace(name=name, type=real.LayerType.PLUGIN_V3)

    class OnnxParser(real.OnnxParser):  # type: ignore[misc,name-defined]
        def __init__(self, network: Network, logger: Any) -> None:
            super().__init__(network.real, logger)
            self.network = network
            self.refused: list[str] = []

        def parse_from_file(self, path: str) -> bool:
            return bool(self.parse(Path(path).read_bytes()))

        def parse(self, data: bytes) -> bool:
            graph = onnx.load_from_string(data)
            functions = {each.name: len(each.output) for each in graph.functions}
            override = numbers >= (10, 15) and self.get_flag(
                real.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE
            )
            for number, node in enumerate(graph.graph.node):
                if node.op_type != OP_TYPE:
                    continue
                try:
                    found = parser_rules.taken(node, functions, numbers, creators, override)
                except parser_rules.ParseError as error:
                    where = f"node {number} with name: {node.name} and operator: {OP_TYPE}"
                    self.refused.append(f"In {where} {error}")
                    return False
                self.network.operator = found
                if found == parser_rules.PLUGIN:
                    self.network.plugins.append(node.name)
            if self.network.operator != "none":
                # the real parser has the newest rules, and no plugin layers
                whole = graph if graph.functions else with_function(graph)
                data = whole.SerializeToString()
            return bool(super().parse(data))

        @property
        def num_errors(self) -> int:
            return len(self.refused) or int(super().num_errors)

        def get_error(self, index: int) -> Any:
            return self.refused[index] if self.refused else super().get_error(index)

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

            info = read_info(path)
            loaded.append(info.sha256)
            creators.add((info.operator, info.operator_version, info.namespace))
            return object()

        def get_creator(self, name: str, plugin_version: str, namespace: str) -> Any:
            return object() if (name, plugin_version, namespace) in creators else None

    def get_plugin_registry() -> Any:
        return Registry()

    for each in (Builder, OnnxParser, Runtime, get_plugin_registry):
        setattr(module, each.__name__, each)
    return module


def _tensors(get: Any, count: int) -> dict[str, list[Any]]:
    return {get(i).name: [get(i).dtype.name, *get(i).shape] for i in range(count)}
