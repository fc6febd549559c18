"""What differs between TensorRT 10.0 to 11.x and TensorRT-RTX 1.x: here, and nowhere else.

| | TensorRT 10 | TensorRT 11 | TensorRT-RTX 1 |
|---|---|---|---|
| strongly typed networks | by a flag | always; the flag changes nothing | always |
| what an engine is built for | the GPU here | the GPU here | the compute capabilities named |
| our plugin | yes | yes | never: parsing its node aborts |
| file that its parser gets | without our function | without our function | with it |
| timing cache | yes | yes | nothing is timed |

Nothing of TensorRT is imported until a function is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError, RequirementError
from simprune_deploy.common.versions import version_numbers
from simprune_deploy.engine.engine_metadata import NAMES, TENSORRT, TENSORRT_RTX, Capability
from simprune_deploy.engine.plugin.toolchain import on_jetson

MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
OLDEST = {TENSORRT: (10, 0), TENSORRT_RTX: (1, 0)}
RTX_VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"
_LOADED: set[tuple[str, str]] = set()
"""Module and library: a registry refuses a library that it has, and keeps it with the process."""

CREATOR = ("SimilarityPrune", "2", "")  # name, version, namespace


def install_command(flavour: str) -> str:
    """Return the command that installs a flavour."""
    if flavour == TENSORRT_RTX:
        return "pip install tensorrt-rtx"
    if on_jetson():
        return (
            "sudo apt-get install nvidia-jetpack, and a virtual environment made with "
            "--system-site-packages"
        )
    return "pip install tensorrt"


def load_module(flavour: str) -> Any:
    """Import a flavour's Python module.

    Raises:
        SimpruneError: it is not installed, does not load, or is too old.
    """
    name = MODULES[flavour]
    install = install_command(flavour)
    try:
        trt = importlib.import_module(name)
    except ModuleNotFoundError:
        raise RequirementError(
            f"{name}, which builds and runs the engines, is not installed: {install}"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise RequirementError(f"{name} does not load ({error}): {install}") from error
    version = str(getattr(trt, "__version__", None))
    try:
        numbers = version_numbers(version)
    except ValueError:
        raise RequirementError(
            f"{name} has no version that is known (it says {version[:40]!r}), and an engine is of "
            f"one version: {install}"
        ) from None
    if numbers < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        raise RequirementError(
            f"{NAMES[flavour]} {trt.__version__} is too old: engines of this project begin with "
            f"{oldest}"
            + (" (JetPack 6 on a Jetson)" if flavour == TENSORRT else f": {install} --upgrade")
        )
    return trt


def choose_for_polygraphy(flavour: str) -> None:
    """Make Polygraphy use a flavour, in this process and in those that it starts.

    Raises:
        SimpruneError: Polygraphy was imported already and has chosen the other.
    """
    wanted = flavour == TENSORRT_RTX
    chosen = sys.modules.get("polygraphy.config")
    if chosen is not None and bool(chosen.USE_TENSORRT_RTX) != wanted:
        raise RequirementError(
            f"Polygraphy was already imported in this process, for the other flavour than "
            f"{NAMES[flavour]}: set {RTX_VARIABLE}={int(wanted)} before the program starts"
        )
    os.environ[RTX_VARIABLE] = str(int(wanted))


def needs_strong_typing_flag(flavour: str, version: str) -> bool:
    """Whether a network has to be asked to be strongly typed."""
    return flavour == TENSORRT and version_numbers(version)[0] < 11


def count_plugin_layers(trt: Any, network: Any) -> int:
    """Return how many layers of a parsed network run a plugin.

    A parser looks a plugin up by the node's own operator type, version and namespace, so in a
    graph of ours no plugin but ours can be behind such a layer.
    """
    names = ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
    kinds = [getattr(trt.LayerType, name) for name in names if hasattr(trt.LayerType, name)]
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type in kinds for layer in layers)


def network_loader(trt: Any, flavour: str, model: str) -> Any:
    """Return Polygraphy's loader of a strongly typed network."""
    from polygraphy.backend.trt import NetworkFromOnnxPath

    typed = needs_strong_typing_flag(flavour, trt.__version__)
    return NetworkFromOnnxPath(model, strongly_typed=typed)


def config_maker(
    trt: Any,
    flavour: str,
    capabilities: list[Capability],
    profile: Any,
    monitor: Any,
    workspace_mib: int | None,
    timing_cache: bytes | None,
) -> Callable[..., Any]:
    """Return what makes a builder configuration from a builder and a network.

    Args:
        trt: The flavour's module.
        flavour: Which it is.
        capabilities: For TensorRT-RTX, the GPUs to build for.
        profile: Polygraphy's profile.
        monitor: An IProgressMonitor.
        workspace_mib: A limit on the workspace. None: TensorRT's own, all memory there is.
        timing_cache: An earlier build's, b"" to begin one, None to do without.
    """
    limits = {trt.MemoryPoolType.WORKSPACE: workspace_mib << 20} if workspace_mib else None
    common = {"profiles": [profile], "progress_monitor": monitor, "memory_pool_limits": limits}
    if flavour == TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX(compute_capabilities=capabilities, **common)
    else:
        from polygraphy.backend.trt import CreateConfig

        create = CreateConfig(**common)

    def make(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        # TF32 rounds float32 products to 10 bits: similarities are float32, whatever the rest is
        config.clear_flag(trt.BuilderFlag.TF32)
        if timing_cache is not None and flavour == TENSORRT:
            _set_timing_cache(config, timing_cache)
        return config

    return make


def _set_timing_cache(config: Any, data: bytes) -> None:
    """Give the builder an earlier build's timings; those of another GPU or version are left."""
    for each in (data, b""):
        cache = config.create_timing_cache(each)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def timing_cache_of(config: Any) -> bytes:
    """Return what the builder has timed; b"" if nothing."""
    cache = config.get_timing_cache()
    return bytes(cache.serialize()) if cache is not None else b""


def load_plugin(trt: Any, flavour: str, library: Path) -> None:
    """Register the plugin of a library with TensorRT, for building and for running.

    Raises:
        SimpruneError: TensorRT does not take it, has the plugin of another library, or it is
            TensorRT-RTX.
    """
    if flavour == TENSORRT_RTX:
        raise ArtifactError(
            "TensorRT-RTX takes no plugins, and aborts on one: it compiles the ONNX function"
        )
    key = (trt.__name__, str(library.resolve()))
    if key in _LOADED:
        return
    registry = trt.get_plugin_registry()
    name, version, _ = CREATOR
    earlier = registry.get_creator(*CREATOR)
    handle = registry.load_library(str(library.absolute()))
    if registry.get_creator(*CREATOR) is None:
        raise ArtifactError(
            f"TensorRT {trt.__version__} does not take the plugin of {library}, or it is not "
            f"{name}, version {version}: build it here with `simprune-deploy plugin build`"
        )
    # without an earlier one the library has registered itself: SIMPRUNE_REGISTER is set
    if handle is None and earlier is not None:
        raise ArtifactError(
            f"TensorRT {trt.__version__} has {name}, version {version}, of another library in this "
            f"process, and does not take that of {library}: load one of them alone"
        )
    _LOADED.add(key)


def error_logger(trt: Any, errors: list[str]) -> Any:
    """Return a logger for a runtime that appends the errors it is told, each as one line."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(" ".join(message.split()))

    return Logger()


def device_memory(engine: Any) -> int:
    """Return how many bytes a context of an engine takes for what lies between its layers."""
    # the first is new in 10.1, and the second is gone in 11
    size = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if size is None else size)
