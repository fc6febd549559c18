"""Runs worker.py, which builds one engine, as a process of its own.

For three reasons: Polygraphy chooses between TensorRT and TensorRT-RTX once, when it is imported,
and the parity check may have imported it already; the builder is C++ that can abort on a graph it
does not like, and that must not take the command line with it; and Ctrl-C reaches Python only
between its calls, while a process can be ended at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ToolFailedError, argument
from simprune_deploy.common.files import as_user_error
from simprune_deploy.common.progress import Progress
from simprune_deploy.engine.engine_metadata import NAMES
from simprune_deploy.engine.flavours import CREATOR

WORKER = [sys.executable, "-m", "simprune_deploy.engine.worker"]


def run_worker(
    request: dict[str, Any], title: str, path: Path, progress: Progress
) -> dict[str, Any]:
    """Build what a request asks for and return the worker's answer.

    Args:
        request: As worker.py takes it.
        title: The GPUs it is for, for messages.
        path: The engine to be, for messages.
        progress: Called with a word on each of the builder's phases.

    Raises:
        SimpruneError: it was not built, with the builder's own last error.
    """
    progress(f"building for {title}")
    errors: list[str] = []
    answer: dict[str, Any] = {}
    code = 0
    with contextlib.closing(_worker_lines(request)) as lines:
        for line in lines:
            kind, _, rest = line.partition(" ")
            if kind == "simprune:step":
                progress(f"building for {title}: {rest}")
            elif kind == "simprune:answer":
                answer = json.loads(rest)
            elif kind == "simprune:exit":
                code = int(rest)
            elif line.startswith("[E]"):
                errors.append(line[len("[E]") :].strip())
    if "status" in answer:
        return answer
    if answer.get("errno"):
        raise as_user_error(OSError(answer["errno"], os.strerror(answer["errno"])), path)
    if "plugin_layers" in answer:
        raise ToolFailedError(_misread(request, answer["plugin_layers"]))
    said = errors[-1] if errors else answer.get("error", "")
    if code < 0 and not said:
        name = signal.Signals(-code).name
        memory = ": it may have run out of memory" if -code == signal.SIGKILL else ""
        said = f"the builder was ended by {name}{memory}"
    raise ToolFailedError(
        f"{NAMES[request['flavour']]} cannot build {Path(request['model']).name} for {title}: "
        f"{said[:400] or f'it gave no reason (exit code {code})'}{_remedy(request, errors)}"
    )


def _misread(request: dict[str, Any], counted: int) -> str:
    """Return the message on a network that has not the plugin layers that it was to have."""
    name = Path(request["model"]).name
    parser = f"the ONNX parser of {NAMES[request['flavour']]} {request['version']}"
    if request["plugin_layers"] == 0:
        return (
            f"{parser} made plugin layers ({counted}) of {name}, whose function was to be "
            f"compiled, so no engine was built: {_UNREGISTER}"
        )
    return (
        f"{parser} made {counted} plugin layers of the {request['plugin_layers']} prune layers in "
        f"{name}, so no engine was built: update simprune-deploy, or compile the function in place "
        f"of the plugin ({argument('use_plugin', False)})"
    )


_UNREGISTER = "unset SIMPRUNE_REGISTER, with which a library registers its plugin by itself"
_NO_CREATOR = ("plugin not found", f"no importer registered for op: {CREATOR[0].lower()}")
"""What NVIDIA's parsers say of a node whose plugin is not registered; the second since 10.15."""

_WRONG_OUTPUTS = "actual output size is"
"""What they say, since 10.6, of a node that names other outputs than its layer has."""


def _remedy(request: dict[str, Any], errors: list[str]) -> str:
    """Return the end of the message where its reason has a remedy that is known."""
    limit = request["workspace_mib"]
    said = " ".join(errors).lower()
    if any(each in said for each in _NO_CREATOR):
        name, version, _ = CREATOR
        return (
            f"; no library with {name}, version {version}, is loaded: make one with "
            f"`simprune-deploy plugin build` and name it ({argument('plugin')})"
        )
    if _WRONG_OUTPUTS in said and request["plugin_layers"] == 0:
        return f"; a plugin was taken for the function that was to be compiled: {_UNREGISTER}"
    if _WRONG_OUTPUTS in said:
        return "; the file is of another version of the operator: export the model again"
    if limit is None or not any(each in said for each in ("workspace", "outofmemory")):
        return ""
    return f"; {argument('workspace_mib', limit)} may be too small: raise it, or leave it out"


def _worker_lines(request: dict[str, Any]) -> Generator[str, None, None]:
    """Run the worker and yield what it says; whatever ends this ends the worker too."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stdin:
        json.dump(request, stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            WORKER,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
        yield f"simprune:exit {process.wait()}"
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
