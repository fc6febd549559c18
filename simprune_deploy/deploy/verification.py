"""An exported model compared with PyTorch again, in ONNX Runtime or as an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.deploy.export import load_pictures
from simprune_deploy.engine import ENGINE_SUFFIX
from simprune_deploy.onnx.exported_folder import GOLDEN, MODEL, read_manifest

if TYPE_CHECKING:
    from simprune_deploy.parity.backends import Backend
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.pruning.model import PrunedViT


def verify(
    target: str | Path,
    *,
    reference: PrunedViT | None = None,
    images: str | Path | None = None,
    engine: bool = False,
    plugin: str | Path | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Verify an exported model again, here and now.

    Args:
        target: A folder that :func:`export` wrote, its ONNX file, or one of its engines.
        reference: The PyTorch model to compare with. Default: the golden cases beside the file,
            for which torch need not be installed.
        images: Folder of pictures, only with a reference. Default: photographs that come along.
        engine: Run the folder's engine for the GPU of this machine in place of ONNX Runtime.
            Default False; an engine as target is always run.
        plugin: The library of the plugin that is in the engine. Default: looked for as
            :func:`build_here` does.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the target is damaged, there is nothing to compare it with, or the engine
            does not fit this machine.
    """
    target = Path(target)
    if not target.exists():
        raise SimpruneError(f"{target} does not exist: give an exported folder or its model.onnx")
    if reference is None and images is not None:
        raise SimpruneError(
            "--images needs --reference: golden cases hold PyTorch's answers to their own images "
            "only"
        )
    backend = None
    if engine or target.suffix == ENGINE_SUFFIX:
        from simprune_deploy.parity.backends import choose_backend

        backend, target = choose_backend(target, plugin, progress)
    elif plugin is not None:
        raise SimpruneError("--plugin is for engines: add --engine")
    return _verify(target, reference, images, backend, progress)


def _verify(
    target: Path,
    reference: PrunedViT | None,
    images: str | Path | None,
    backend: Backend | None,
    progress: Progress,
) -> Verdict:
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.variants import pruned_layers
    from simprune_deploy.parity.comparison import compare_with_golden, compare_with_torch
    from simprune_deploy.parity.golden import load_golden

    path = target
    if target.is_dir():
        read_manifest(target)
        path = target / MODEL
    graph = load_graph(path)
    metadata = read_metadata(graph)
    if reference is None:
        golden = load_golden(path.parent / GOLDEN, pruned_layers(graph))
        return compare_with_golden(graph, golden, progress, backend)
    pictures = load_pictures(reference, images, bool(metadata.export["normalize"]), metadata.input)
    return compare_with_torch(graph, reference, pictures, progress, backend)[0]
