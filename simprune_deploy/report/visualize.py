"""Runs a model on pictures and writes pictures of what it pruned."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.files import staged_folder, write_json
from simprune_deploy.common.images import (
    PictureLoader,
    Preprocessing,
    UnusableImageError,
    as_uint8_nhwc,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.report.clusters import Clusters, check_sizes, compose, grid_of
from simprune_deploy.report.pictures import (
    THUMB,
    draw_clusters,
    draw_contact_sheet,
    draw_sheet,
    panel_size,
    to_picture,
)

if TYPE_CHECKING:
    import onnx
    from polygraphy.backend.base import BaseRunner

    from simprune_deploy.evaluate.sources import Source
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.predict.runners import Run
    from simprune_deploy.pruning.model import PrunedViT

CHUNK = 8
"""Pictures that are held at a time."""

NUMBERS, SHEET = "pictures.json", "contact-sheet.png"


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A model whose decisions can be seen.

    Attributes:
        title: What it is and what runs it.
        metadata: Its input and shape.
        layers: The blocks before which it prunes.
        runner: Polygraphy's, with the decisions among its outputs.
        threshold: What it is run at.
        batch: The smallest and the largest batch that it takes.
        normalizes: Whether it takes pixels in [0, 1].
    """

    title: str
    metadata: ModelMetadata
    layers: list[int]
    runner: BaseRunner
    threshold: float
    batch: tuple[int, int]
    normalizes: bool


def of_model(source: str, model: PrunedViT) -> Pictured:
    """Return a pruned model in PyTorch on the CPU."""
    from simprune_deploy.onnx.exporter import ExportOptions, metadata_of_model
    from simprune_deploy.predict.runners import TorchRunner

    metadata = metadata_of_model(model, ExportOptions())
    wanted = preprocessing_of(metadata)
    normalize = (list(wanted.mean), list(wanted.std))
    runner = TorchRunner(model.eval(), metadata.output, normalize=normalize)
    title = f"{source} (PyTorch)"
    limit = model.config.threshold
    return Pictured(title, metadata, list(model.config.layers), runner, limit, (1, CHUNK), True)


def of_export(path: Path, threshold: float | None = None) -> Pictured:
    """Return an exported folder's model, or an ONNX file of one, in ONNX Runtime.

    Args:
        path: The folder or the file.
        threshold: In place of the file's own, if it takes one at run time. Default: its own.

    Raises:
        SimpruneError: it prunes nowhere, or its threshold is fixed and another is asked for.
    """
    from simprune_deploy.onnx.exported_folder import MODEL, read_manifest
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.precision import emulated
    from simprune_deploy.onnx.variants import pruned_layers, with_diagnostics
    from simprune_deploy.predict.runners import onnxruntime_runner, quiet_polygraphy

    file = path
    if path.is_dir():
        read_manifest(path)
        file = path / MODEL
    graph: onnx.ModelProto = load_graph(file)
    metadata = read_metadata(graph)
    layers = pruned_layers(graph)
    if not layers:
        raise SimpruneError(f"{path} prunes nowhere: there is nothing to see")
    own = metadata.pruning.threshold
    if threshold is not None and threshold != own and not metadata.export["runtime_threshold"]:
        raise SimpruneError(
            f"the threshold of {path} is fixed at {own:g}: leave --threshold out, export with "
            "--runtime-threshold, or give the checkpoint"
        )
    runnable = emulated(graph, "bf16") if metadata.precision == "bf16" else graph
    with quiet_polygraphy():
        runner = onnxruntime_runner(with_diagnostics(runnable).SerializeToString(), "diagnosed")
    return Pictured(
        title=f"{path} (ONNX Runtime, {metadata.precision})",
        metadata=metadata,
        layers=layers,
        runner=runner,
        threshold=own if threshold is None else threshold,
        batch=metadata.batch,
        normalizes=bool(metadata.export["normalize"]),
    )


def open_sources(paths: Sequence[Path], limit: int) -> list[tuple[Source, int]]:
    """Return where the pictures are, as (source, position), of every folder at most `limit`.

    Args:
        paths: Pictures, folders, ``.csv`` or ``.npz`` files.
        limit: The most pictures of one folder or file; those taken are spread evenly.

    Raises:
        SimpruneError: one of them is missing or holds no pictures.
    """
    from simprune_deploy.evaluate.datasets import open_source
    from simprune_deploy.evaluate.sources import Files

    if limit < 1:
        raise SimpruneError(f"--limit {limit} must be 1 or more")
    found: list[tuple[Source, int]] = []
    for path in paths:
        if not path.exists():
            raise SimpruneError(f"{path} does not exist: give pictures, or folders of them")
        if path.is_file() and path.suffix.lower() not in (".csv", ".npz"):
            found.append((Files("picture", path.parent, [path]), 0))
            continue
        source = open_source(path, labelled=False)
        wanted = min(limit, len(source))
        found += [(source, index * len(source) // wanted) for index in range(wanted)]
    return found


def write_pictures(
    model: Pictured,
    sources: Sequence[tuple[Source, int]],
    folder: Path,
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Draw every picture, and a contact sheet if there is more than one.

    Args:
        model: What prunes.
        sources: From :func:`open_sources`.
        folder: What to write; it appears whole or not at all.
        force: Replace an earlier result. Default False.
        progress: Called with a word on each step.

    Returns:
        What ``pictures.json`` in the folder holds: every picture's clusters.

    Raises:
        SimpruneError: no picture can be read, or the folder cannot be written.
    """
    metadata = model.metadata
    wanted = preprocessing_of(metadata)
    grid = grid_of(metadata.num_patches, *metadata.image_size)
    height, width = panel_size(grid)
    # the same crop with more pixels, so that people see more than the model does
    sharp = dataclasses.replace(wanted, height=max(height, wanted.height),
                                width=max(width, wanted.width))  # fmt: skip
    loaders = PictureLoader(wanted), PictureLoader(sharp)
    entries: list[dict[str, Any]] = []
    thumbs: list[Any] = []
    skipped: list[tuple[str, str]] = []
    with staged_folder(folder, force, NUMBERS) as staging:
        for start in range(0, len(sources), CHUNK):
            progress(f"{start + 1} of {len(sources)} pictures")
            inputs, shown, names = [], [], []
            for source, position in sources[start : start + CHUNK]:
                try:
                    inputs.append(source.read(position, loaders[0]))
                    shown.append(to_picture(source.read(position, loaders[1]), (height, width)))
                    names.append(source.name(position))
                except UnusableImageError as error:
                    skipped.append((source.name(position), str(error)))
            if not inputs:
                continue
            pixels = np.stack(inputs)
            run = _run(model, _as_input(model, wanted, pixels))
            for index, (name, picture) in enumerate(zip(names, shown, strict=True)):
                layers = _clusters(run, index, metadata)
                says = _says(metadata, run.outputs[index])
                file = f"{len(entries) + 1:03d}-{_safe(name)}.png"
                draw_sheet(picture, layers, grid, name, says).save(staging / file)
                panel = draw_clusters(picture, layers[-1], grid, marked=False)
                thumbs.append((name, _small(picture), _small(panel), layers[-1]))
                entries.append(
                    {
                        "name": name,
                        "file": file,
                        "says": says or None,
                        "layers": [each.to_dict() for each in layers],
                    }
                )
        if not entries:
            raise SimpruneError(
                f"none of the {len(sources)} pictures can be read ({skipped[0][0]}: "
                f"{skipped[0][1]}): give others"
            )
        if len(entries) > 1:
            title = f"{model.title}, threshold {model.threshold:g}: after the last prune layer"
            draw_contact_sheet(thumbs, title).save(staging / SHEET)
        numbers = {
            "model": model.title,
            "architecture": metadata.architecture,
            "threshold": model.threshold,
            "prune_layers": model.layers,
            "grid": list(grid),
            "contact_sheet": SHEET if len(entries) > 1 else None,
            "pictures": entries,
            "skipped": [list(pair) for pair in skipped],
        }
        write_json(staging / NUMBERS, numbers)
    return numbers


def _as_input(model: Pictured, wanted: Preprocessing, pixels: np.ndarray) -> np.ndarray:
    """Return float32[n, C, H, W] in [0, 1] as the model takes it."""
    if model.metadata.takes_uint8:
        return as_uint8_nhwc(pixels)
    return pixels if model.normalizes else wanted.normalize(pixels)


def _run(model: Pictured, images: np.ndarray) -> Run:
    from simprune_deploy.predict.runners import Inputs, quiet_polygraphy, run

    thresholds = np.full(len(images), model.threshold, np.float32)
    runtime = bool(model.metadata.export["runtime_threshold"])
    inputs = Inputs(images, thresholds, model.batch, runtime)
    with quiet_polygraphy():
        return run(model.runner, inputs, inputs.mixed(), model.layers)


def _clusters(run: Run, index: int, metadata: ModelMetadata) -> list[Clusters]:
    records = {layer: found[index] for layer, found in run.records.items()}
    layers = compose(records, metadata.num_prefix_tokens, metadata.num_patches)
    check_sizes(records, layers, metadata.num_prefix_tokens)
    return layers


def _says(metadata: ModelMetadata, outputs: np.ndarray) -> str:
    """Return the class that the model gives, or nothing of a model without classes."""
    if not metadata.num_classes:
        return ""
    winner = int(outputs.argmax())
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
