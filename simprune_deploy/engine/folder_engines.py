"""Engines of an exported folder: built ahead of time, built here, and run in a parity check.

The manifest stays as it is: it records what was exported and verified. Each engine has a file of
metadata beside it that names the model and itself by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.engine.build import BuiltEngine, EngineOptions, build_engine
from simprune_deploy.engine.builders import ahead_of_time, check_precision, for_this_gpu
from simprune_deploy.engine.libraries import check_can_be_made
from simprune_deploy.engine.targets import Target
from simprune_deploy.onnx.exported_folder import MODEL, check_verdict, read_manifest

if TYPE_CHECKING:
    pass


def build_ahead(
    folder: str | Path,
    targets: Sequence[Target],
    *,
    per_target: bool = False,
    options: EngineOptions | None = None,
    progress: Progress = silent,
) -> list[BuiltEngine]:
    """Build TensorRT-RTX engines of an exported folder's model, into its folder ``engines``.

    The manifest stays as it is: it records what was exported and verified. Each engine has a file
    of metadata beside it that names the model and itself by their SHA-256.

    Args:
        folder: A folder that :func:`export` wrote.
        targets: From :func:`simprune_deploy.engine.targets.find_targets`.
        per_target: One engine for each target. Default: one for all of them.
        options: Batches, workspace, force. Default: :class:`EngineOptions`'s defaults.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the folder is damaged or its parity check failed, or an engine cannot be
            built.
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
    progress: Progress = silent,
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
        SimpruneError: the folder is damaged or its parity check failed, TensorRT, the GPU or the
            library is missing or does not fit, or the engine cannot be built.
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
    check_verdict(folder, read_manifest(folder), "engines are built of verified exports")
    return folder / MODEL
