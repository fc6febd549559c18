"""Runs a model on pictures and writes pictures of what it pruned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.checkpoints.options import CheckpointOptions, assumptions
from simprune_deploy.common.errors import DataError, InvalidArgumentError, argument
from simprune_deploy.common.files import check_destination, staged_folder, stem_of, write_json
from simprune_deploy.common.images import PictureLoader, UnusableImageError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import check_whole, request_of
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.predict.answers import classes_of
from simprune_deploy.predict.source import ModelSource, open_source, source_of_model
from simprune_deploy.pruning.config import Features, Place, PruneConfig, check_threshold
from simprune_deploy.reports.clusters import Clusters, check_sizes, compose, grid_of
from simprune_deploy.reports.pictures import (
    THUMB,
    draw_clusters,
    draw_contact_sheet,
    draw_sheet,
    panel_size,
    to_picture,
)

if TYPE_CHECKING:
    from simprune_deploy.evaluate.data_sources import Source
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.predict.predictor import Prediction, Predictor

CHUNK = 8
"""Pictures that are held at a time."""

NUMBERS, SHEET = "pictures.json", "contact-sheet.png"


@dataclasses.dataclass(frozen=True)
class VisualizeRequest:
    """What to draw.

    Args:
        model: An exported folder, an ONNX file of one, a checkpoint, or a model.
        images: Pictures, folders of them, ``.csv`` or ``.npz`` files.
        output: Folder to write. Default None: NAME-pictures.
        threshold: Default None: the model's.
        layers: Prune a checkpoint at these blocks, or "auto". Default None: its own, or auto.
        place, features: Of a checkpoint, as :func:`simprune_deploy.prune` takes them. Default None:
            its own, or before blocks by tokens.
        limit: The most pictures of one folder or file, spread evenly. Default 24.
        force: Replace an earlier result. Default False.
        checkpoint: How a checkpoint is loaded.
    """

    model: Any
    images: str | Path | Sequence[str | Path] = ()
    output: str | Path | None = None
    threshold: float | None = None
    layers: str | Sequence[int] | None = None
    place: Place | None = None
    features: Features | None = None
    limit: int = 24
    force: bool = False
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)

    @property
    def folder(self) -> Path:
        """Where the pictures go."""
        if self.output is not None:
            return Path(self.output)
        return Path(f"{stem_of(self.model)}-pictures")


@dataclasses.dataclass(frozen=True)
class Visualization:
    """The pictures that were drawn.

    Attributes:
        folder: Where they are.
        numbers: What ``pictures.json`` in it holds: every picture's clusters.
    """

    folder: Path
    numbers: dict[str, Any]

    def __str__(self) -> str:
        return f"{len(self.numbers['pictures'])} pictures in {self.folder}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {"output": str(self.folder), **self.numbers}


def visualize(
    model: Any,
    images: str | Path | Sequence[str | Path] | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> Visualization:
    """Draw which patches survive each prune layer, and which were folded into which.

    Args:
        model: A :class:`VisualizeRequest`, or its first field; the others by name.
        images: The request's second field.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the model, no picture, or the folder can be used.
    """
    request = request_of(VisualizeRequest, model, fields, images=images)
    check_destination(request.folder, request.force, NUMBERS)
    given = [request.images] if isinstance(request.images, (str, Path)) else request.images
    if not given:
        raise InvalidArgumentError(f"there is nothing to draw: give {argument('images')}")
    sources = open_sources([Path(each) for each in given], request.limit)
    progress("loading the model")
    source = _model_to_draw(request)
    with source.spec().open() as predictor:
        numbers = write_pictures(
            source, predictor, request.threshold, sources, request.folder, request.force, progress
        )
    return Visualization(request.folder, numbers)


def _model_to_draw(request: VisualizeRequest) -> ModelSource:
    """Return the model, pruned as it is to be shown."""
    source = open_source(request.model, request.checkpoint, prune=True)
    if source.model is not None:
        from simprune_deploy.pruning.model import prune

        names = ("threshold", "layers", "place", "features")
        pruned = prune(source.model, **{name: getattr(request, name) for name in names})
        if not pruned.config.layers:
            raise InvalidArgumentError(
                f"{source.name} prunes nowhere: say where with {argument('layers')}"
            )
        return source_of_model(source.name, pruned)
    for name in ("layers", "place", "features"):
        if getattr(request, name) is not None:
            raise InvalidArgumentError(
                f"the prune layers of {source.name} are fixed in the graph: leave "
                f"{argument(name)} out, or give the checkpoint"
            )
    if request.threshold is not None:
        check_threshold(request.threshold)
        own = source.metadata.pruning.threshold
        if request.threshold != own and not source.runtime_threshold:
            raise InvalidArgumentError(
                f"the threshold of {source.name} is fixed at {own:g}: leave "
                f"{argument('threshold')} out, export with {argument('runtime_threshold', True)}, "
                "or give the checkpoint"
            )
    return source


def open_sources(paths: Sequence[Path], limit: int) -> list[tuple[Source, int]]:
    """Return where the pictures are, as (source, position), of every folder at most `limit`.

    Args:
        paths: Pictures, folders, ``.csv`` or ``.npz`` files.
        limit: The most pictures of one folder or file; those taken are spread evenly.

    Raises:
        SimpruneError: one of them is missing or holds no pictures.
    """
    from simprune_deploy.evaluate.data_sources import Files
    from simprune_deploy.evaluate.datasets import open_data_source

    check_whole("limit", limit, 1)
    found: list[tuple[Source, int]] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist: give pictures, or folders of them")
        if path.is_file() and path.suffix.lower() not in (".csv", ".npz"):
            found.append((Files("picture", path.parent, [path]), 0))
            continue
        source = open_data_source(path, labelled=False)
        wanted = min(limit, len(source))
        found += [(source, index * len(source) // wanted) for index in range(wanted)]
    return found


def write_pictures(
    source: ModelSource,
    predictor: Predictor,
    threshold: float | None,
    sources: Sequence[tuple[Source, int]],
    folder: Path,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw every picture, and a contact sheet if there is more than one.

    Args:
        source: The model.
        predictor: Opened from it.
        threshold: Default None: the model's.
        sources: From :func:`open_sources`.
        folder: What to write; it appears whole or not at all.
        force: Replace an earlier result. Default False.
        progress: Called with a word on each step.

    Returns:
        What ``pictures.json`` in the folder holds: every picture's clusters.

    Raises:
        SimpruneError: no picture can be read, or the folder cannot be written.
    """
    metadata = predictor.metadata
    if not predictor.layers:
        raise InvalidArgumentError(f"{source.name} prunes nowhere: there is nothing to see")
    used = metadata.pruning.threshold if threshold is None else threshold
    precision = "" if source.model is not None else f", {metadata.precision}"
    title = f"{source.name} ({predictor.runtime.name}{precision})"
    drawing = _Drawing(metadata)
    with staged_folder(folder, force, NUMBERS) as staging:
        for start in range(0, len(sources), CHUNK):
            progress(f"{start + 1} of {len(sources)} pictures")
            names, pixels, shown = drawing.load(sources[start : start + CHUNK])
            if names:
                found = predictor.predict(np.stack(pixels), threshold=threshold, decisions=True)
                drawing.draw(found, names, shown, staging)
        if not drawing.entries:
            name, why = drawing.skipped[0]
            raise DataError(
                f"none of the {len(sources)} pictures can be read ({name}: {why}): give others"
            )
        many = len(drawing.entries) > 1
        if many:
            heading = f"{title}, {_how(metadata.pruning, used)}: after the last prune layer"
            draw_contact_sheet(drawing.thumbs, heading).save(staging / SHEET)
        numbers = {
            "model": title,
            "assumed": assumptions(metadata.preprocessing),
            "architecture": metadata.architecture,
            "threshold": used,
            "prune_layers": list(predictor.layers),
            "place": metadata.pruning.place,
            "features": metadata.pruning.features,
            "grid": list(drawing.grid),
            "contact_sheet": SHEET if many else None,
            "pictures": drawing.entries,
            "skipped": [list(pair) for pair in drawing.skipped],
        }
        write_json(staging / NUMBERS, numbers)
    return numbers


def _how(config: PruneConfig, threshold: float) -> str:
    """Return in words how far was pruned, and by what if that is not tokens."""
    what = "" if config.curve else "threshold "
    by = "" if config.features == "tokens" else f" by {config.features}"
    return f"{what}{config.point(threshold)}{by}"


class _Drawing:
    """Loads pictures, and draws what a model made of them."""

    def __init__(self, metadata: ModelMetadata) -> None:
        self.metadata = metadata
        wanted = preprocessing_of(metadata)
        self.grid = grid_of(metadata.num_patches, *metadata.image_size)
        self.size = panel_size(self.grid)
        # the same crop with more pixels, so that people see more than the model does
        sharp = dataclasses.replace(
            wanted,
            height=max(self.size[0], wanted.height),
            width=max(self.size[1], wanted.width),
        )
        self.loaders = PictureLoader(wanted), PictureLoader(sharp)
        self.entries: list[dict[str, Any]] = []
        self.thumbs: list[Any] = []
        self.skipped: list[tuple[str, str]] = []

    def load(
        self, sources: Sequence[tuple[Source, int]]
    ) -> tuple[list[str], list[np.ndarray], list[Any]]:
        """Return names, pixels float32[C, H, W] and pictures of those that can be read."""
        names, pixels, shown = [], [], []
        for source, position in sources:
            try:
                pixels.append(source.read(position, self.loaders[0]))
                shown.append(to_picture(source.read(position, self.loaders[1]), self.size))
                names.append(source.name(position))
            except UnusableImageError as error:
                self.skipped.append((source.name(position), str(error)))
        return names, pixels, shown

    def draw(self, found: Prediction, names: list[str], shown: list[Any], folder: Path) -> None:
        """Write a page for every picture."""
        for index, (name, picture) in enumerate(zip(names, shown, strict=True)):
            layers = _clusters(found, index, self.metadata)
            says = _says(self.metadata, found.outputs[index])
            file = f"{len(self.entries) + 1:03d}-{_safe(name)}.png"
            draw_sheet(picture, layers, self.grid, name, says).save(folder / file)
            panel = draw_clusters(picture, layers[-1], self.grid, marked=False)
            self.thumbs.append((name, _small(picture), _small(panel), layers[-1]))
            self.entries.append(
                {
                    "name": name,
                    "file": file,
                    "says": says or None,
                    "layers": [each.to_dict() for each in layers],
                }
            )


def _clusters(found: Prediction, index: int, metadata: ModelMetadata) -> list[Clusters]:
    records = {layer: each[index] for layer, each in (found.records or {}).items()}
    place = metadata.pruning.place
    layers = compose(records, metadata.num_prefix_tokens, metadata.num_patches, place)
    check_sizes(records, layers, metadata.num_prefix_tokens)
    return layers


def _says(metadata: ModelMetadata, outputs: np.ndarray) -> str:
    """Return the class that the model gives, its single output, or nothing of one without any."""
    if not metadata.num_classes:
        return ""
    if metadata.num_classes == 1:
        return f"output: {float(outputs.item()):.4g}"
    winner = int(classes_of(outputs[None])[0])
    names = metadata.preprocessing.get("label_names")
    if isinstance(names, (list, tuple)) and len(names) == metadata.num_classes:
        return f"class: {names[winner]}"
    return f"class: {winner}"


def _safe(name: str) -> str:
    """Return a name for a file: no folders, nothing that a shell or another system takes ill."""
    stem = Path(name).name.rsplit(".", 1)[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60].strip("_") or "picture"


def _small(picture: Any) -> Any:
    """Return a copy that a contact sheet of many pictures can hold."""
    copy = picture.copy()
    copy.thumbnail((2 * THUMB, 2 * THUMB))
    return copy
