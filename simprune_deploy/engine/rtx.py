"""TensorRT-RTX engines from an exported ONNX file, on a machine with or without a GPU.

The build runs in a process of its own (rtx_worker.py), for three reasons: Polygraphy chooses
between TensorRT and TensorRT-RTX once, when it is imported, and the proof may have imported it
already; the builder is C++ that can abort on a graph it does not like, and that must not take the
command line with it; and Ctrl-C reaches Python only between its calls, while a process can be
ended at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import simprune_deploy
from simprune_deploy.engine.targets import Target
from simprune_deploy.errors import SimpruneError
from simprune_deploy.files import as_user_error, sha256, staged_file, write_json

if TYPE_CHECKING:
    import onnx

FLAVOUR = "tensorrt-rtx"
FORMAT = 1
INSTALL = "pip install tensorrt-rtx"
WORKER = Path(__file__).with_name("rtx_worker.py")
NOT_CHECKED = (
    "its code and weights, its outputs and its speed: these need one of the GPUs it is for"
)

Capability = tuple[int, int]
Profile = dict[str, dict[str, list[int]]]
Progress = Callable[[str], None]


def _silent(step: str) -> None:
    """Ignore progress."""


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine file with its sidecar.

    Attributes:
        path: The engine.
        facts: What the sidecar says.
        cached: It was there already, built from the same things, and was left as it is.
    """

    path: Path
    facts: dict[str, Any]
    cached: bool

    @property
    def sidecar(self) -> Path:
        return sidecar_of(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {"path": str(self.path), "cached": self.cached, **self.facts}


def sidecar_of(engine: Path) -> Path:
    """Return where an engine's metadata is: ``x.engine.json`` beside ``x.engine``."""
    return engine.with_name(engine.name + ".json")


def check_targets(targets: Sequence[Target]) -> str:
    """Refuse what cannot be built here, before any work; return TensorRT-RTX's version.

    Raises:
        SimpruneError: a target's engine is built on the device, or TensorRT-RTX is missing, broken
            or too old for a target.
    """
    for target in targets:
        if not target.built_here:
            raise SimpruneError(
                f"{target.name}: its engine is built on the device, by its own TensorRT: "
                f"`simprune-deploy bundle FOLDER --target {target.name}` packs what goes there"
            )
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError:
        raise SimpruneError(
            f"tensorrt_rtx, which builds the engines, is not installed: {INSTALL}"
        ) from None
    except (ImportError, OSError) as error:
        raise SimpruneError(
            f"tensorrt_rtx does not load ({error}): {INSTALL} --force-reinstall"
        ) from error
    for target in targets:
        major, minor = _capability(target)
        if not hasattr(trt.ComputeCapability, f"SM{major}{minor}"):
            raise SimpruneError(
                f"{target.name}: tensorrt_rtx {trt.__version__} does not know SM {major}.{minor}: "
                f"{INSTALL} --upgrade"
            )
    return str(trt.__version__)


def build_engines(
    model: Path,
    folder: Path,
    targets: Sequence[Target],
    *,
    per_target: bool = False,
    force: bool = False,
    progress: Progress = _silent,
) -> list[BuiltEngine]:
    """Build engines for targets whose engines can be built on another machine.

    Args:
        model: An ONNX file that this tool exported.
        folder: Where engines and sidecars go; made if need be.
        targets: From :func:`simprune_deploy.engine.targets.find_targets`.
        per_target: One engine for each target. Default: one for all of them.
        force: Build again what is there already. Default False.
        progress: Called with a word on each step.

    Returns:
        The engines. None of them has been run.

    Raises:
        SimpruneError: a target or the model cannot be built, with the builder's own last error.
    """
    from simprune_deploy.onnx.metadata import load_graph, read_facts

    version = check_targets(targets)
    graph = load_graph(model)
    facts = read_facts(graph)
    profile = optimization_profile(graph, facts.batch)
    wanted = {
        "flavour": FLAVOUR,
        "version": version,
        "onnx": {"file": model.name, "sha256": sha256(model)},
        "precision": facts.precision,
        "profile": profile,
    }
    built = []
    with _made(folder):
        for group in [[each] for each in targets] if per_target else [list(targets)]:
            group.sort(key=_capability)  # so that the order asked for makes no other engine
            capabilities = sorted({_capability(target) for target in group})
            name = "-".join(f"sm{major}{minor}" for major, minor in capabilities)
            path = folder / f"{model.stem}-rtx-{name}.engine"
            key = {
                **wanted,
                "compute_capabilities": [f"{major}.{minor}" for major, minor in capabilities],
                "targets": [target.name for target in group],
            }
            facts_there = None if force else _read_matching(path, key)
            if facts_there is not None:
                built.append(BuiltEngine(path, facts_there, cached=True))
                continue
            built.append(_build(model, path, capabilities, key, progress))
    return built


def optimization_profile(graph: onnx.ModelProto, batch: tuple[int, int]) -> Profile:
    """Return the shapes an engine takes: the graph's own batch range, tuned for the smallest.

    A run-time threshold is one number for all images, or one for each.

    Raises:
        SimpruneError: an input has a free dimension that is not its first.
    """
    low, high = batch
    profile: Profile = {}
    for value in graph.graph.input:
        dims = list(value.type.tensor_type.shape.dim)
        if any(dim.dim_param or dim.dim_value < 1 for dim in dims[1:]):
            raise SimpruneError(
                f"the ONNX input {value.name!r} has a free dimension beside the batch, which "
                "engines cannot take: export again"
            )
        fixed = [dim.dim_value for dim in dims[1:]]
        if dims and (dims[0].dim_param or dims[0].dim_value < 1):
            first = (1, 1, high) if value.name == "threshold" else (low, low, high)
        else:
            first = (dims[0].dim_value,) * 3 if dims else (0, 0, 0)
        profile[value.name] = {
            which: ([size, *fixed] if dims else [])
            for which, size in zip(("min", "opt", "max"), first, strict=True)
        }
    return profile


def _capability(target: Target) -> Capability:
    capability = target.compute_capability
    if capability is None:
        raise SimpruneError(f"{target.name}: its compute capability is unknown")
    return capability


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and take it away again if the block fails and left it empty."""
    existed = folder.is_dir()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise as_user_error(error, folder) from error
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _read_matching(engine: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """Return the sidecar of an engine that is whole and was built from the very same things."""
    try:
        facts = json.loads(sidecar_of(engine).read_text(encoding="utf-8"))
        same = facts["format"] == FORMAT and all(facts[name] == key[name] for name in key)
        return facts if same and facts["engine"]["sha256"] == sha256(engine) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    model: Path,
    path: Path,
    capabilities: list[Capability],
    key: dict[str, Any],
    progress: Progress,
) -> BuiltEngine:
    title = ", ".join(f"SM {each}" for each in key["compute_capabilities"])
    started = time.monotonic()
    with staged_file(path) as staging:
        request = {
            "model": str(model.absolute()),
            "output": str(staging.absolute()),
            "capabilities": capabilities,
            "profile": key["profile"],
        }
        answer = _run_worker(request, title, path, progress)
        facts = {
            "format": FORMAT,
            "status": answer["status"],
            "checked": answer["checked"],
            "not_checked": NOT_CHECKED,
            **key,
            "engine": {
                "file": path.name,
                "bytes": staging.stat().st_size,
                "sha256": sha256(staging),
            },
            "versions": {
                "simprune-deploy": simprune_deploy.__version__,
                "polygraphy": answer["polygraphy"],
            },
            "seconds": round(time.monotonic() - started, 2),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
    # an engine without its sidecar, should this be interrupted, is built again the next time
    with staged_file(sidecar_of(path)) as staging:
        write_json(staging, facts)
    return BuiltEngine(path, facts, cached=False)


def _run_worker(
    request: dict[str, Any], title: str, path: Path, progress: Progress
) -> dict[str, Any]:
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
    said = errors[-1] if errors else answer.get("error", "")
    if code < 0 and not said:
        name = signal.Signals(-code).name
        memory = ": it may have run out of memory" if -code == signal.SIGKILL else ""
        said = f"the builder was ended by {name}{memory}"
    raise SimpruneError(
        f"TensorRT-RTX cannot build {Path(request['model']).name} for {title}: "
        f"{said[:400] or f'it gave no reason (exit code {code})'}"
    )


def _worker_lines(request: dict[str, Any]) -> Generator[str, None, None]:
    """Run the worker and yield what it says; whatever ends this ends the worker too."""
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stdin:
        json.dump(request, stdin)
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
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
