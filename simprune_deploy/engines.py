"""Engines of an exported folder: built ahead of time, built here, and run in a proof.

The manifest stays as it is: it records what was exported and proved. Each engine has a file of
metadata beside it that names the model and itself by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simprune_deploy.bundle import MANIFEST, MODEL, read_manifest
from simprune_deploy.engine import ENGINE_SUFFIX, flavours
from simprune_deploy.engine.build import BuiltEngine, EngineOptions, build_engine
from simprune_deploy.engine.builders import ahead_of_time, check_precision, for_this_gpu, like
from simprune_deploy.engine.gpu import find_gpu
from simprune_deploy.engine.inventory import FoundEngine, choose_engine, examine_engine
from simprune_deploy.engine.libraries import check_can_be_made, find_library
from simprune_deploy.engine.targets import Target
from simprune_deploy.errors import SimpruneError

if TYPE_CHECKING:
    from simprune_deploy.parity.backends import Backend
    from simprune_deploy.triton import TritonModel

Progress = Callable[[str], None]


def _silent(step: str) -> None:
    """Ignore progress."""


def build_ahead(
    folder: str | Path,
    targets: Sequence[Target],
    *,
    per_target: bool = False,
    options: EngineOptions | None = None,
    progress: Progress = _silent,
) -> list[BuiltEngine]:
    """Build TensorRT-RTX engines of an exported folder's model, into its folder ``engines``.

    The manifest stays as it is: it records what was exported and proved. Each engine has a file
    of metadata beside it that names the model and itself by their SHA-256.

    Args:
        folder: A folder that :func:`export` wrote.
        targets: From :func:`simprune_deploy.engine.targets.find_targets`.
        per_target: One engine for each target. Default: one for all of them.
        options: Batches, workspace, force. Default: :class:`EngineOptions`'s defaults.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the folder is damaged or its proof failed, or an engine cannot be built.
    """
    model = _model_to_build(Path(folder))
    return [
        build_engine(model, builder, options, progress=progress)
        for builder in ahead_of_time(targets, per_target)
    ]


def build_here(
    folder: str | Path,
    *,
    plugin: str | Path | None = None,
    use_plugin: bool = True,
    options: EngineOptions | None = None,
    of: str = "pruned",
    progress: Progress = _silent,
) -> BuiltEngine:
    """Build a TensorRT engine of an exported folder's model for the GPU of this machine.

    Args:
        folder: A folder that :func:`export` wrote.
        plugin: The plugin's library. Default: that in the folder's ``plugin``, that of the variable
            SIMPRUNE_LIBRARY, or else one that is compiled into the folder's ``plugin``.
        use_plugin: False: let TensorRT compile the function in the file. Default True.
        options: Batches, workspace, force. Default: :class:`EngineOptions`'s defaults.
        of: "pruned", or "dense": without pruning, to compare with. Default "pruned".
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the folder is damaged or its proof failed, TensorRT, the GPU or the library
            is missing or does not fit, or the engine cannot be built.
    """
    from simprune_deploy.onnx.metadata import load_graph
    from simprune_deploy.onnx.variants import prune_nodes

    folder = Path(folder)
    model = _model_to_build(folder)
    needs_plugin = use_plugin and of != "dense" and bool(prune_nodes(load_graph(model)))
    builder = for_this_gpu(
        folder,
        plugin=Path(plugin) if plugin is not None else None,
        use_plugin=needs_plugin,
        progress=progress,
    )
    return build_engine(model, builder, options, of=of, progress=progress)


def serve_engine(
    folder: str | Path,
    engine: BuiltEngine,
    *,
    plugin: str | Path | None = None,
    force: bool = False,
) -> TritonModel:
    """Write an engine that :func:`build_here` gave into the folder's Triton repository.

    Args:
        folder: The exported folder.
        engine: Its engine.
        plugin: The library, as it was given to :func:`build_here`. Default: looked for as there.
        force: Replace the model if it is there already. Default False.

    Raises:
        SimpruneError: Triton cannot serve the engine, or the repository cannot be written.
    """
    from simprune_deploy.triton import write_repository

    folder = Path(folder)
    library = None
    if engine.facts.plugin is not None:
        library = find_library(folder, Path(plugin) if plugin is not None else None)
    return write_repository(folder, engine=engine.path, plugin=library, force=force)


def check_can_build_here(precision: str) -> None:
    """Refuse before an export what :func:`build_here` would refuse after it.

    Raises:
        SimpruneError: TensorRT, a GPU, or the plugin's library and the tools to compile it are
            missing, or the GPU lacks the precision.
    """
    builder = for_this_gpu(None)
    check_precision(precision, builder)
    if builder.plugin is None:
        check_can_be_made()


def _model_to_build(folder: Path) -> Path:
    from simprune_deploy.parity.verdict import ACCEPTED

    manifest = read_manifest(folder)
    if manifest["verdict"] not in (*ACCEPTED, "not verified"):
        raise SimpruneError(
            f"the verdict on {folder} is {manifest['verdict']!r}, and engines are built of proven "
            "exports: export again, or with --no-verify if you want one all the same"
        )
    return folder / MODEL


def choose_backend(
    target: Path, plugin: str | Path | None, progress: Progress
) -> tuple[Backend, Path]:
    """Return what runs an engine in a proof, and the exported folder that it belongs to.

    Args:
        target: The folder, whose engine for this machine is taken, or an engine.
        plugin: The library of the plugin that is in the engine. Default: looked for.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: no engine fits this machine, or the one that shows its decisions cannot be
            built.
    """
    library = Path(plugin) if plugin is not None else None
    found, folder = engine_to_verify(target, library)
    return _engine_backend(found, library, progress), folder


def engine_to_verify(target: Path, plugin: Path | None) -> tuple[FoundEngine, Path]:
    """Return the engine that is meant, which fits this machine, and its exported folder.

    Raises:
        SimpruneError: there is none.
    """
    if target.suffix != ENGINE_SUFFIX:
        folder = target if target.is_dir() else target.parent
        return choose_engine(folder, plugin), folder
    found = examine_engine(target, plugin)
    folder = target.absolute().parent.parent
    if found.problem is not None:
        raise SimpruneError(found.problem)
    if found.facts is not None and found.facts.of != "pruned":
        raise SimpruneError(
            f"{target} is the engine of another form of the model ({found.facts.of}), and only the "
            "pruned model's is proved"
        )
    if not (folder / MANIFEST).is_file():
        raise SimpruneError(f"{target} is not in the engines of an exported folder: put it there")
    return found, folder


def _engine_backend(found: FoundEngine, plugin: Path | None, progress: Progress) -> Backend:
    """Build the engine that shows its decisions, if need be, and return what runs both."""
    facts = found.facts
    assert facts is not None
    # before anything imports Polygraphy, which then chooses between the flavours
    flavours.choose_for_polygraphy(facts.flavour)
    folder = found.path.absolute().parent.parent
    library = find_library(folder, plugin) if facts.plugin is not None else None
    gpu = find_gpu()
    options = EngineOptions.like(facts)
    diagnosis = build_engine(
        folder / MODEL, like(facts, gpu, library), options, of="diagnosis", progress=progress
    )
    from simprune_deploy.parity.backends import EngineBackend

    described = f"{gpu.name} (SM {gpu.compute_capability[0]}.{gpu.compute_capability[1]})"
    return EngineBackend(found.path, diagnosis.path, facts, library, described)
