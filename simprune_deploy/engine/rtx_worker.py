"""Builds one TensorRT-RTX engine; run as a process by rtx.py, which says why.

Reads a request (JSON) from stdin. Says ``simprune:step WHAT`` for progress and, last,
``simprune:answer {...}``; every other line is the builder's own log.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> int:
    """Build what stdin asks for; the exit code is 0 if the engine was written."""
    request = json.load(sys.stdin)
    try:
        answer = build(request)
    except OSError as error:
        answer = {"errno": error.errno, "error": str(error)}
    except Exception as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    say("answer", json.dumps(answer))
    return 0 if "status" in answer else 1


def say(kind: str, text: str) -> None:
    """Write a line for rtx.py."""
    print(f"simprune:{kind} {text}", flush=True)


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Build the engine, read it back, write it, and return what is known of it."""
    import polygraphy
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

    trt: Any = importlib.import_module("tensorrt_rtx")
    profile = Profile()
    for name, shapes in request["profile"].items():
        profile.add(name, shapes["min"], shapes["opt"], shapes["max"])
    config = CreateConfigRTX(
        compute_capabilities=[tuple(each) for each in request["capabilities"]],
        profiles=[profile],
        progress_monitor=make_monitor(trt),
    )
    engine = bytes(EngineBytesFromNetwork(NetworkFromOnnxPath(request["model"]), config)())
    status, checked = check_engine(trt, engine)
    with open(request["output"], "wb") as file:
        file.write(engine)
        # a full disk may show only here
        file.flush()
        os.fsync(file.fileno())
    return {"status": status, "checked": checked, "polygraphy": polygraphy.__version__}


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


def check_engine(trt: Any, engine: bytes) -> tuple[str, str]:
    """Deserialise an engine as far as this machine allows; return the status and what was seen.

    TensorRT-RTX's deserialiser compares the header, the size and the table of the engine's parts
    first ("Serialization" errors), and then makes a CUDA stream, which needs a GPU.

    Raises:
        RuntimeError: it does not take the engine's form.
    """
    errors: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    loaded = trt.Runtime(Logger()).deserialize_cuda_engine(engine)
    took = f"tensorrt_rtx {trt.__version__} takes its header, its size and the table of its parts"
    if loaded is not None:
        return "built, not run", f"{took}, and deserialises it on the GPU here"
    reason = errors[0] if errors else "no reason given"
    if "Serialization" in reason:
        raise RuntimeError(f"the engine that was built cannot be read back: {reason}")
    if "cudaError" in reason:
        return "built, not run: no GPU here", f"{took}; it needs a GPU for more"
    return "built, not run", f"{took}; the GPU here does not load it: {' '.join(reason.split())}"


if __name__ == "__main__":
    sys.exit(main())
