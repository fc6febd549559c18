"""Engines from an exported ONNX file: for named GPUs ahead of time, or for the GPU of this machine.

TensorRT-RTX compiles for GPUs that are not there; TensorRT tunes on the one that is. What they
have in common, which is nearly all, is here; what differs is in flavours.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import ArtifactError, SimpruneError
from simprune_deploy.common.files import as_user_error, staged_file, write_json
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import batch_range, check_whole
from simprune_deploy.common.versions import __version__
from simprune_deploy.engine import ENGINES
from simprune_deploy.engine.builders import Builder, check_precision
from simprune_deploy.engine.engine_metadata import (
    TENSORRT,
    TENSORRT_RTX,
    EngineMetadata,
    FileStamp,
    metadata_path,
    read_engine_metadata,
)
from simprune_deploy.engine.process import run_worker
from simprune_deploy.engine.profile import batch_of, free_inputs, optimization_profile
from simprune_deploy.engine.trtexec import trtexec_line

if TYPE_CHECKING:
    import onnx

TIMING_CACHE = "timing.cache"
STRIPPED = "model-plugin.onnx"
"""The model without the operator's function, so that TensorRT's parser can only take the plugin."""

NOT_CHECKED = {
    TENSORRT: "its outputs and its speed: `simprune-deploy verify FOLDER --engine` runs it",
    TENSORRT_RTX: (
        "its code and weights, its outputs and its speed: these need one of the GPUs it is for"
    ),
}


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What a user may choose.

    Attributes:
        batch: A part of the batches that the graph takes. Default: all of them.
        opt_batch: The batch to tune for. Default: the smallest.
        workspace_mib: A limit on the workspace in MiB. Default: all memory there is.
        force: Build again what is there already. Default False.
    """

    batch: tuple[int, int] | None = None
    opt_batch: int | None = None
    workspace_mib: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.workspace_mib is not None:
            check_whole("workspace_mib", self.workspace_mib, 1, 1 << 20)
        if self.opt_batch is not None:
            check_whole("opt_batch", self.opt_batch, 1)
        if self.batch is not None:
            object.__setattr__(self, "batch", batch_range(self.batch))

    @classmethod
    def like(cls, metadata: EngineMetadata, force: bool = False) -> EngineOptions:
        """Return the options that an engine was built with, for another form of its model."""
        return cls(
            batch=batch_of(metadata.profile),
            opt_batch=metadata.profile["images"]["opt"][0],
            workspace_mib=metadata.workspace_mib,
            force=force,
        )


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """An engine file with its metadata.

    Attributes:
        path: The engine.
        metadata: What the metadata says.
        cached: It was there already, built from the same things, and was left as it is.
        trtexec: The line of trtexec that builds the same; None where trtexec cannot.
    """

    path: Path
    metadata: EngineMetadata
    cached: bool
    trtexec: str | None

    @property
    def metadata_path(self) -> Path:
        return metadata_path(self.path)

    def __str__(self) -> str:
        return f"{self.path} ({'as it was' if self.cached else 'built'}: {self.metadata.title})"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {
            "path": str(self.path),
            "cached": self.cached,
            "trtexec": self.trtexec,
            **self.metadata.to_dict(),
        }


def build_engine(
    model: Path,
    builder: Builder,
    options: EngineOptions | None = None,
    *,
    of: str = "pruned",
    progress: Progress = silent,
) -> BuiltEngine:
    """Build one engine of an exported model, into ``engines`` beside it.

    Args:
        model: An ONNX file that this tool exported.
        builder: From :func:`ahead_of_time` or :func:`for_this_gpu`.
        options: Default: :class:`EngineOptions`'s defaults.
        of: "pruned", the model as it is; "dense", without pruning; "diagnosis", with its
            decisions as outputs.
        progress: Called with a word on each step.

    Returns:
        The engine. It has not been run.

    Raises:
        SimpruneError: the model cannot be built, with the builder's own last error.
    """
    from simprune_deploy.onnx.dense import dense
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.variants import prune_nodes, with_diagnostics

    options = options or EngineOptions()
    graph = load_graph(model)
    metadata = read_metadata(graph)
    if of == "dense":
        graph = dense(graph)
    elif of == "diagnosis":
        graph = with_diagnostics(graph)
    check_precision(metadata.precision, builder)
    layers = len(prune_nodes(graph))
    if not layers:
        builder = dataclasses.replace(builder, plugin=None)
    wanted = {
        "flavour": builder.flavour,
        "version": builder.version,
        "compute_capabilities": tuple(f"{a}.{b}" for a, b in builder.compute_capabilities),
        "targets": builder.targets,
        "gpu": builder.gpu.name if builder.gpu else None,
        "plugin": FileStamp.of(builder.plugin) if builder.plugin else None,
        "onnx": FileStamp.of(model),
        "of": of,
        "precision": metadata.precision,
        "profile": optimization_profile(graph, metadata.batch, options.batch, options.opt_batch),
        "workspace_mib": options.workspace_mib,
        "prune_layers": layers,
    }
    path = model.parent / ENGINES / builder.engine_name(of)
    with _made(path.parent), _variant(graph, model, of, builder) as parsed:
        line = _trtexec(builder, parsed, path, wanted, free_inputs(graph))
        found = None if options.force else _read_matching(path, wanted)
        if found is not None:
            return BuiltEngine(path, found, cached=True, trtexec=line)
        return BuiltEngine(path, _build(parsed, path, builder, wanted, progress), False, line)


@contextlib.contextmanager
def _variant(graph: onnx.ModelProto, model: Path, of: str, builder: Builder) -> Iterator[Path]:
    """Yield the file to parse: the model, or a copy in the form that is wanted.

    Where the plugin is wanted the function leaves the file, since some versions of the parser
    prefer it (docs/engines.md). That copy stays, so that trtexec can be given it; others go.
    """
    from simprune_deploy.onnx import variants

    strip = bool(builder.plugin and graph.functions)
    restore = builder.plugin is None and not graph.functions and variants.prune_nodes(graph)
    if of == "pruned" and not strip and not restore:
        yield model
        return
    if strip:
        graph = variants.without_function(graph)
        brought = model.parent / STRIPPED
        if of == "pruned" and brought.is_file():
            _check_same_export(brought, graph, model)
            yield brought
            return
    elif restore:
        graph = variants.with_function(graph)
    name = f"model-{of}.onnx" if of != "pruned" else STRIPPED if strip else "model-function.onnx"
    path = model.parent / ENGINES / name
    kept = False
    try:
        with staged_file(path) as staging:
            staging.write_bytes(_bytes(graph))
        yield path
        kept = name == STRIPPED
    finally:
        if not kept:
            path.unlink(missing_ok=True)


def _check_same_export(brought: Path, graph: onnx.ModelProto, model: Path) -> None:
    """Refuse a bundle's file for TensorRT that is not its model without the function."""
    from simprune_deploy.onnx.metadata import load_graph

    if load_graph(brought) != graph:
        raise ArtifactError(
            f"{brought} is not {model.name} without its function, so the two are of different "
            "exports: copy the bundle again, or make it again"
        )


def _bytes(graph: onnx.ModelProto) -> bytes:
    return graph.SerializeToString()


def _trtexec(
    builder: Builder, parsed: Path, path: Path, wanted: dict[str, Any], free: set[str]
) -> str | None:
    if builder.flavour != TENSORRT or wanted["of"] != "pruned":
        return None
    return trtexec_line(
        builder.version,
        parsed,
        path,
        wanted["profile"],
        free,
        plugin=builder.plugin,
        workspace_mib=wanted["workspace_mib"],
        timing_cache=path.parent / TIMING_CACHE,
    )


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


def _read_matching(engine: Path, wanted: dict[str, Any]) -> EngineMetadata | None:
    """Return the metadata of an engine that is whole and was built from the very same things."""
    try:
        metadata = read_engine_metadata(engine)
    except SimpruneError:
        return None
    return (
        metadata
        if all(getattr(metadata, name) == value for name, value in wanted.items())
        else None
    )


def _build(
    parsed: Path, path: Path, builder: Builder, wanted: dict[str, Any], progress: Progress
) -> EngineMetadata:
    started = time.monotonic()
    cache = path.parent / TIMING_CACHE if builder.flavour == TENSORRT else None
    with staged_file(path) as staging, _staged_cache(cache) as timings:
        request = {
            "flavour": builder.flavour,
            "version": builder.version,
            "model": str(parsed.absolute()),
            "output": str(staging.absolute()),
            "capabilities": builder.compute_capabilities if builder.gpu is None else [],
            "plugin": str(builder.plugin.absolute()) if builder.plugin else None,
            "plugin_layers": wanted["prune_layers"] if builder.plugin else 0,
            "profile": wanted["profile"],
            "workspace_mib": wanted["workspace_mib"],
            "timing_cache": timings,
        }
        answer = run_worker(request, builder.title, path, progress)
        metadata = EngineMetadata(
            **wanted,
            cuda=builder.gpu.cuda if builder.gpu else None,
            plugin_layers=answer["plugin_layers"],
            engine=FileStamp.of(staging, path.name),
            status=answer["status"],
            checked=answer["checked"],
            not_checked=NOT_CHECKED[builder.flavour],
            versions={
                "simprune-deploy": __version__,
                "polygraphy": answer["polygraphy"],
            },
            seconds=round(time.monotonic() - started, 2),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
    # an engine without its metadata, should this be interrupted, is built again the next time
    with staged_file(metadata_path(path)) as staging:
        write_json(staging, metadata.to_dict())
    return metadata


@contextlib.contextmanager
def _staged_cache(cache: Path | None) -> Iterator[dict[str, str] | None]:
    """Yield where the worker reads the timing cache and where it writes it; keep what it wrote."""
    if cache is None:
        yield None
        return
    new = cache.with_name(f".{cache.name}.new")
    try:
        yield {"load": str(cache.absolute()), "save": str(new.absolute())}
        if new.is_file():
            new.replace(cache)
    finally:
        new.unlink(missing_ok=True)
