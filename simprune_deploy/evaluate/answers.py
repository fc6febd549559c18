"""What models answer to a data set: one class for every picture.

A model is an exported graph in ONNX Runtime, an engine of it, or a checkpoint in PyTorch. They are
asked batch by batch in one pass over the pictures, so that memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.onnx.metadata import preprocessing_of

if TYPE_CHECKING:
    import onnx
    from polygraphy.backend.base import BaseRunner

    from simprune_deploy.evaluate.datasets import DataSet
    from simprune_deploy.onnx.metadata import ModelMetadata
    from simprune_deploy.pruning.model import PrunedViT

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model that can be asked.

    Attributes:
        title: What it is and what runs it, for people.
        metadata: Input, preprocessing and classes; of a checkpoint, as an export would say.
        weights: Norm of every tensor that keeps its name and values from checkpoint to graph.
        runner: Polygraphy's, not yet active.
        batch: The smallest and the largest batch that it takes.
        threshold: Fed to the graph; None if it has no such input.
        normalizes: Whether it takes pixels in [0, 1], or in uint8 as the facts say.
    """

    title: str
    metadata: ModelMetadata
    weights: dict[str, float]
    runner: BaseRunner
    batch: tuple[int, int]
    threshold: float | None
    normalizes: bool


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model said.

    Attributes:
        title: Of the model.
        identity: What tells models apart; see :func:`identity_of`.
        weights: As in :class:`Contestant`.
        winners: int64[n], the class with the largest output for every readable picture.
    """

    title: str
    identity: dict[str, Any]
    weights: dict[str, float]
    winners: np.ndarray


@dataclasses.dataclass(frozen=True)
class Asked:
    """The answers of one or two models to the same pictures.

    Attributes:
        answers: One for each model, in order.
        labels: int64[n]; None without labels.
        skipped: (name, reason) of the pictures that could not be read.
    """

    answers: tuple[Answers, ...]
    labels: np.ndarray | None
    skipped: list[tuple[str, str]]


def identity_of(metadata: ModelMetadata) -> dict[str, Any]:
    """Return what two models have in common that answer the same question in the same form."""
    return {
        "architecture": metadata.architecture,
        "model_args": metadata.model_args,
        "image_size": list(metadata.image_size),
        "channels": metadata.channels,
        "num_classes": metadata.num_classes,
    }


def open_export(path: Path, dense: bool = False) -> Contestant:
    """Return an exported folder's model, or an ONNX file of one, in ONNX Runtime on the CPU.

    Args:
        path: The folder, whose files are checked against its manifest, or the file.
        dense: Ask the model without its pruning. Default False.

    Raises:
        SimpruneError: it is damaged, or was not made by simprune-deploy.
    """
    from simprune_deploy.onnx.exported_folder import MODEL, read_manifest
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.onnx.precision import emulated
    from simprune_deploy.onnx.variants import prune_nodes, with_function
    from simprune_deploy.predict.runners import onnxruntime_runner, quiet_polygraphy

    file = path
    if path.is_dir():
        read_manifest(path)
        file = path / MODEL
    graph = load_graph(file)
    metadata = read_metadata(graph)
    weights = _norms_of_graph(graph)
    threshold = metadata.pruning.threshold if metadata.export["runtime_threshold"] else None
    what = (
        f"{path}, pruned at {metadata.pruning.threshold:g}"
        if metadata.pruning.layers
        else str(path)
    )
    if dense:
        from simprune_deploy.onnx.dense import dense as without_pruning

        what, threshold = f"{path}, without its pruning", None
        graph = without_pruning(graph)
    put_back = bool(not graph.functions and prune_nodes(graph))
    if put_back:  # left to a plugin, of which ONNX Runtime has none
        graph = with_function(graph)
    bf16 = metadata.precision == "bf16"
    runnable = emulated(graph, "bf16") if bf16 else graph
    how = "CPU, emulating bfloat16" if bf16 else "CPU"
    how += ", function put back" if put_back else ""
    with quiet_polygraphy():
        runner = onnxruntime_runner(runnable.SerializeToString(), "dense" if dense else "pruned")
    return Contestant(
        title=f"{what} (ONNX Runtime {_version('onnxruntime')}, {how}, {metadata.precision})",
        metadata=metadata,
        weights=weights,
        runner=runner,
        batch=metadata.batch,
        threshold=threshold,
        normalizes=bool(metadata.export["normalize"]),
    )


def open_engine(path: Path, plugin: Path | None, progress: Progress = silent) -> Contestant:
    """Return the engine of an exported folder for the GPU of this machine, or a named engine of it.

    Raises:
        SimpruneError: there is none, or it does not fit this machine.
    """
    from simprune_deploy.onnx.exported_folder import MODEL
    from simprune_deploy.onnx.metadata import load_graph, read_metadata
    from simprune_deploy.parity.backends import choose_backend
    from simprune_deploy.predict.runners import quiet_polygraphy

    backend, target = choose_backend(path, plugin, progress)
    graph = load_graph(target / MODEL if target.is_dir() else target)
    metadata = read_metadata(graph)
    with quiet_polygraphy():
        runner = backend.shipped()
    return Contestant(
        title=f"{path}, pruned at {metadata.pruning.threshold:g} "
        f"({backend.environment()['runtime']})",
        metadata=metadata,
        weights=_norms_of_graph(graph),
        runner=runner,
        batch=backend.batch,
        threshold=metadata.pruning.threshold if metadata.export["runtime_threshold"] else None,
        normalizes=bool(metadata.export["normalize"]),
    )


def open_model(source: str, model: PrunedViT) -> Contestant:
    """Return a model in PyTorch on the CPU.

    Args:
        source: What the user called it.
        model: As it shall be asked: pruned, or with no prune layers.
    """
    from simprune_deploy.onnx.exporter import ExportOptions, metadata_of_model
    from simprune_deploy.predict.runners import TorchRunner

    metadata = metadata_of_model(model, ExportOptions())
    prepared = preprocessing_of(metadata)
    normalize = (list(prepared.mean), list(prepared.std))
    how = f"pruned at {model.config.threshold:g}" if model.config.layers else "dense"
    return Contestant(
        title=f"{source}, {how} (PyTorch {_version('torch')}, CPU)",
        metadata=metadata,
        weights=_norms_of_state(model.vit.state_dict()),
        runner=TorchRunner(model.eval(), metadata.output, normalize=normalize),
        batch=(1, BATCH),
        threshold=model.config.threshold,
        normalizes=True,
    )


def ask(contestants: Sequence[Contestant], data: DataSet, advance: Callable[[int], None]) -> Asked:
    """Return every model's answers to the pictures, which are read once.

    Args:
        contestants: The models; their inputs must be alike.
        data: The pictures, prepared as the first model wants them.
        advance: Called with the number of pictures done.

    Raises:
        SimpruneError: a model gives no classes or no numbers, or too many pictures are unreadable.
    """
    from simprune_deploy.predict.runners import quiet_polygraphy

    for each in contestants:
        if not each.metadata.num_classes:
            raise SimpruneError(
                f"{each.title} gives features, not classes: compare features with `sweep`"
            )
        _check_inputs(each, data)
    winners: list[list[np.ndarray]] = [[] for _ in contestants]
    labels: list[np.ndarray] = []
    skipped: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_polygraphy())
        for each in contestants:
            stack.enter_context(each.runner)
        for batch in data.batches(0, len(data), BATCH, skipped):
            for each, found in zip(contestants, winners, strict=True):
                found.append(_winners(each, data, batch.pixels))
            if batch.labels is not None:
                labels.append(batch.labels)
            advance(len(batch.pixels))
    data.check_skipped(skipped)
    return Asked(
        answers=tuple(
            Answers(each.title, identity_of(each.metadata), each.weights, np.concatenate(found))
            for each, found in zip(contestants, winners, strict=True)
        ),
        labels=np.concatenate(labels) if labels else None,
        skipped=skipped,
    )


def _check_inputs(contestant: Contestant, data: DataSet) -> None:
    wanted, metadata = data.preprocessing, contestant.metadata
    if (metadata.channels, *metadata.image_size) != (wanted.channels, wanted.height, wanted.width):
        raise SimpruneError(
            f"{contestant.title} takes {metadata.channels} channels of {metadata.image_size[0]} x "
            f"{metadata.image_size[1]} pixels, and the other model {wanted.channels} of "
            f"{wanted.height} x {wanted.width}: they cannot be compared"
        )


def _winners(contestant: Contestant, data: DataSet, pixels: np.ndarray) -> np.ndarray:
    """Return int64[b] for float32[b, C, H, W] in [0, 1], in the batches that the model takes."""
    from simprune_deploy.common.images import as_uint8_nhwc

    low, high = contestant.batch
    found = []
    for start in range(0, len(pixels), high):
        chunk = pixels[start : start + high]
        count = len(chunk)
        # a graph of a fixed batch gets the last picture again, as often as one is missing
        chunk = np.concatenate([chunk, np.repeat(chunk[-1:], max(0, low - count), 0)])
        if contestant.metadata.takes_uint8:
            images = as_uint8_nhwc(chunk)
        else:
            images = chunk if contestant.normalizes else data.preprocessing.normalize(chunk)
        feed = {"images": images}
        if contestant.threshold is not None:
            feed["threshold"] = np.array([contestant.threshold], np.float32)
        outputs = np.asarray(contestant.runner.infer(feed)[contestant.metadata.output])[:count]
        if not np.isfinite(outputs).all():
            raise SimpruneError(
                f"the outputs of {contestant.title} hold NaN or infinity: nothing can be said of it"
            )
        found.append(outputs.argmax(1).astype(np.int64))
    return np.concatenate(found)


def _norms_of_graph(graph: onnx.ModelProto) -> dict[str, float]:
    from onnx import numpy_helper

    norms = {}
    for tensor in graph.graph.initializer:
        # constants have names without a module in them; weights are floats
        if "." in tensor.name or tensor.name in ("pos_embed", "cls_token", "reg_token"):
            values = numpy_helper.to_array(tensor)
            norms[tensor.name] = float(np.linalg.norm(values.astype(np.float64)))
    return norms


def _norms_of_state(state: dict[str, Any]) -> dict[str, float]:
    return {name: float(tensor.double().norm()) for name, tensor in state.items()}


def _version(package: str) -> str:
    from simprune_deploy.common.versions import package_version

    return package_version(package) or "of unknown version"
