"""Builds one engine, of either flavour; run as a process by build.py, which says why.

Reads a request (JSON) from stdin. Says ``simprune:step WHAT`` for progress and, last,
``simprune:answer {...}``; every other line is the builder's own log.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from simprune_deploy.engine import flavours
from simprune_deploy.engine.engine_metadata import NAMES, TENSORRT_RTX


class MisreadError(Exception):
    """The parser made another number of plugin layers than was asked for."""

    def __init__(self, counted: int) -> None:
        super().__init__(f"{counted} plugin layers")
        self.counted = counted


def main() -> int:
    """Build what stdin asks for; the exit code is 0 if the engine was written."""
    request = json.load(sys.stdin)
    try:
        answer = build(request)
    except OSError as error:
        answer = {"errno": error.errno, "error": str(error)}
    except MisreadError as error:
        answer = {"error": str(error), "plugin_layers": error.counted}
    except Exception as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    say("answer", json.dumps(answer))
    return 0 if "status" in answer else 1


def say(kind: str, text: str) -> None:
    """Write a line for build.py."""
    print(f"simprune:{kind} {text}", flush=True)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, read it back, write it, and return what is known of it.

    Raises:
        MisreadError: the parsed network has more or fewer plugin layers than the request says.
    """
    flavour = request["flavour"]
    flavours.choose_for_polygraphy(flavour)
    import polygraphy
    from polygraphy.backend.trt import EngineBytesFromNetwork, Profile
    from polygraphy.backend.trt import util as trt_util

    trt = flavours.load_module(flavour)
    if request["plugin"] is not None:
        trt.init_libnvinfer_plugins(trt_util.get_trt_logger(), "")  # the registry logs from now on
        flavours.load_plugin(trt, flavour, Path(request["plugin"]))
    profile = Profile()
    for name, shapes in request["profile"].items():
        profile.add(name, shapes["min"], shapes["opt"], shapes["max"])
    cache = request["timing_cache"]
    make = flavours.config_maker(
        trt,
        flavour,
        [tuple(each) for each in request["capabilities"]],
        profile,
        make_monitor(trt),
        request["workspace_mib"],
        _read(cache["load"]) if cache else None,
    )
    made: list[Any] = []
    counted = 0

    def config(builder: Any, network: Any) -> Any:
        nonlocal counted
        counted = flavours.count_plugin_layers(trt, network)
        if counted != request["plugin_layers"]:
            raise MisreadError(counted)
        made.append(make(builder, network))
        return made[-1]

    network = flavours.network_loader(trt, flavour, request["model"])
    engine = bytes(EngineBytesFromNetwork(network, config)())
    status, checked = check_engine(trt, flavour, engine)
    write(Path(request["output"]), engine)
    if cache and (timings := flavours.timing_cache_of(made[-1])):
        write(Path(cache["save"]), timings)
    return {
        "status": status,
        "checked": checked,
        "plugin_layers": counted,
        "polygraphy": polygraphy.__version__,
    }


def _read(path: str) -> bytes:
    return Path(path).read_bytes() if os.path.isfile(path) else b""


def write(path: Path, data: bytes) -> None:
    """Write a file to the disk itself: a full one may show only then."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_monitor(trt: Any) -> Any:
    """Return a progress monitor that also ends the build when nobody waits for it any more."""
    parent = os.getppid()

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.said = ""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is not None and phase_name != self.said:
                self.said = phase_name
                say("step", phase_name)

        def phase_finish(self, phase_name: str) -> None:
            """Nothing to say."""

        def step_complete(self, phase_name: str, step: int) -> bool:
            return os.getppid() == parent

    return Monitor()


def check_engine(trt: Any, flavour: str, engine: bytes) -> tuple[str, str]:
    """Deserialize an engine as far as this machine allows; return the status and what was seen.

    TensorRT-RTX's deserializer compares the header, the size and the table of the engine's parts
    first ("Serialization" errors), and then makes a CUDA stream, which needs a GPU. TensorRT
    builds on a GPU, and so has to take its engine whole.

    Raises:
        RuntimeError: it does not take the engine.
    """
    errors: list[str] = []
    title = f"{NAMES[flavour]} {trt.__version__}"
    loaded = trt.Runtime(flavours.error_logger(trt, errors)).deserialize_cuda_engine(engine)
    if loaded is not None:
        return "built, not run", f"{title} deserializes it on the GPU here"
    reason = errors[0] if errors else "no reason given"
    if flavour != TENSORRT_RTX or "Serialization" in reason:
        raise RuntimeError(f"the engine that was built cannot be read back: {reason}")
    took = f"{title} takes its header, its size and the table of its parts"
    if "cudaError" in reason:
        return "built, not run: no GPU here", f"{took}; it needs a GPU for more"
    return "built, not run", f"{took}; the GPU here does not load it: {reason}"


if __name__ == "__main__":
    sys.exit(main())
