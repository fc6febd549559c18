"""An exported model compared with PyTorch again, in ONNX Runtime or as an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simprune_deploy.checkpoints.options import CheckpointOptions
from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import request_of
from simprune_deploy.engine import ENGINE_SUFFIX
from simprune_deploy.onnx.exported_folder import COMPANIONS, GOLDEN
from simprune_deploy.predict.source import as_exported, source_of_export

if TYPE_CHECKING:
    from simprune_deploy.parity.verdict import Verdict
    from simprune_deploy.predict.predictor import Predictor
    from simprune_deploy.predict.source import ModelSource
    from simprune_deploy.pruning.model import PrunedViT


@dataclasses.dataclass(frozen=True)
class VerifyRequest:
    """What to compare.

    Args:
        target: An exported folder, its ONNX file, or one of its engines.
        reference: The PyTorch model to compare with, or a checkpoint of it; one that is not pruned
            is pruned as the export was. Default None: the golden cases beside the file, for which
            torch need not be installed.
        images: Folder of pictures, only with a reference. Default None: photographs that come
            along.
        engine: Run the folder's engine for the GPU of this machine in place of ONNX Runtime.
            Default False; an engine as target is always run.
        plugin: The library of the plugin that is in the engine. Default None: looked for as
            ``build`` does.
        checkpoint: How a reference checkpoint is loaded.
    """

    target: str | Path
    reference: Any = None
    images: str | Path | None = None
    engine: bool = False
    plugin: str | Path | None = None
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)


def verify(
    target: VerifyRequest | str | Path, *, progress: Progress = silent, **fields: Any
) -> Verdict:
    """Compare an exported model with PyTorch again, here and now.

    Args:
        target: A :class:`VerifyRequest`, or its first field; the others by name.
        progress: Called with a word on each step.

    Returns:
        The verdict. One other than "passed" raises nothing: look at its ``status``.

    Raises:
        SimpruneError: the target is damaged, there is nothing to compare it with, or the engine
            does not fit this machine.
    """
    request = request_of(VerifyRequest, target, fields)
    place = Path(request.target)
    if not place.exists():
        raise ArtifactError(f"{place} does not exist: give an exported folder or its model.onnx")
    if request.reference is None and request.images is not None:
        raise InvalidArgumentError(
            f"{argument('images')} needs {argument('reference')}: golden cases hold PyTorch's "
            "answers to their own images only"
        )
    if not (request.engine or place.suffix == ENGINE_SUFFIX):
        if request.plugin is not None:
            raise InvalidArgumentError(
                f"{argument('plugin')} is for engines: add {argument('engine', True)}"
            )
        source = source_of_export(place)
        return _compare(source, _reference(request, source), request.images, None, progress)
    from simprune_deploy.predict.engine_files import shipped_engine

    library = None if request.plugin is None else Path(request.plugin)
    spec, source = shipped_engine(place, library, progress)
    reference = _reference(request, source)
    with spec.open() as predictor:
        return _compare(source, reference, request.images, predictor, progress)


def _reference(request: VerifyRequest, source: ModelSource) -> PrunedViT | None:
    """Return the PyTorch model, pruned as the export says it was pruned."""
    given = request.reference
    if given is None:
        return None
    from simprune_deploy.pruning.model import PrunedViT

    if isinstance(given, (str, Path)):
        from simprune_deploy.checkpoints.loading import load_checkpoint

        model = load_checkpoint(given, as_exported(request.checkpoint, source.metadata)).model
        given = getattr(model, "vit", model)
    return given if isinstance(given, PrunedViT) else PrunedViT(given, source.metadata.pruning)


def _compare(
    source: ModelSource,
    reference: PrunedViT | None,
    images: str | Path | None,
    predictor: Predictor | None,
    progress: Progress,
) -> Verdict:
    from simprune_deploy.common.images import load_as_taken
    from simprune_deploy.onnx.metadata import load_graph, preprocessing_of
    from simprune_deploy.onnx.variants import pruned_layers
    from simprune_deploy.parity.comparison import compare_with_golden, compare_with_torch
    from simprune_deploy.parity.golden import load_golden

    graph, folder = source.graph, source.folder
    assert graph is not None
    assert folder is not None
    there = source.manifest["files"] if source.manifest and predictor is None else ()
    forms = {name: load_graph(folder / name) for name in COMPANIONS if name in there}
    if reference is None:
        golden = load_golden(folder / GOLDEN, pruned_layers(graph))
        return compare_with_golden(graph, golden, progress, predictor, forms)
    pictures = load_as_taken(
        images,
        preprocessing_of(source.metadata),
        graph_normalizes=bool(source.metadata.export["normalize"]),
        uint8=source.metadata.takes_uint8,
    )
    return compare_with_torch(graph, reference, pictures, progress, predictor, forms)[0]
