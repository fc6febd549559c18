"""Polygraphy runners: PyTorch and ONNX Runtime on the same images, with the same output names."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from simprune_deploy.onnx.variants import DIAGNOSTICS, diagnostic_name
from simprune_deploy.predict.records import Array, PruneRecord

if TYPE_CHECKING:
    from simprune_deploy.pruning.model import PrunedViT


class TorchRunner(BaseRunner):
    """Run a pruned model in PyTorch, with what every prune layer read and decided.

    Args:
        model: The reference, in eval mode, float32 on the CPU.
        output: The name of its output, as in the graph.
        softmax: Whether the graph ends with a softmax. Default False.
        normalize: (mean, std) per channel if the graph normalizes its pixels. Default None.
        uint8: Whether images are uint8[B, H, W, C], as the graph's are. Default False.
    """

    def __init__(
        self,
        model: PrunedViT,
        output: str,
        softmax: bool = False,
        normalize: tuple[list[float], list[float]] | None = None,
        uint8: bool = False,
    ) -> None:
        super().__init__(name="pytorch", prefix="pytorch")
        self.model, self.output = model, output
        self.softmax, self.normalize, self.uint8 = softmax, normalize, uint8

    def get_input_metadata_impl(self) -> TensorMetadata:
        channels, size = self.model.channels, self.model.image_size
        shape = (-1, *size, channels) if self.uint8 else (-1, channels, *size)
        kind = np.dtype(np.uint8 if self.uint8 else np.float32)
        metadata = TensorMetadata().add("images", kind, shape)
        return metadata.add("threshold", np.dtype(np.float32), (-1,))

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, Array]:
        import torch

        start = time.perf_counter()
        images = torch.from_numpy(np.asarray(feed_dict["images"]))
        threshold = torch.from_numpy(np.asarray(feed_dict["threshold"]))
        traces: list[Any] = []
        with torch.inference_mode():
            if self.uint8:
                images = images.to(torch.float32).permute(0, 3, 1, 2) / 255
            if self.normalize is not None:
                mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in self.normalize)
                images = (images - mean) / std
            result = self.model(images, threshold=threshold, traces=traces)
            if self.softmax:
                result = result.softmax(-1)
        outputs = OrderedDict([(self.output, result.numpy())])
        for trace in traces:
            for what in DIAGNOSTICS:
                outputs[diagnostic_name(trace.layer, what)] = getattr(trace, what).numpy()
        self.inference_time = time.perf_counter() - start
        return outputs


def onnxruntime_runner(model: bytes, name: str) -> OnnxrtRunner:
    """Return Polygraphy's ONNX Runtime runner, on the CPU, for a serialized model."""
    # a session, not a loader of one, which would load the model anew for every run
    return OnnxrtRunner(SessionFromOnnx(model, providers=["cpu"])(), name=name)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Images, their thresholds, and the batches that a graph takes.

    Attributes:
        images: As the graph takes them: float32[n, C, H, W] or uint8[n, H, W, C].
        thresholds: float32[n].
        batch: Smallest and largest batch.
        runtime_threshold: Whether the graph has a threshold input.
    """

    images: Array
    thresholds: Array
    batch: tuple[int, int]
    runtime_threshold: bool

    def mixed(self) -> list[list[int]]:
        """Return the images in batches as large as allowed; the last is filled up with repeats."""
        low, high = self.batch
        low = max(low, min(2, high))  # a batch of one would show nothing about batches
        count = len(self.images)
        chunks = [list(range(i, min(i + high, count))) for i in range(0, count, high)]
        while len(chunks[-1]) < low:
            chunks[-1].append((chunks[-1][-1] + 1) % count)
        return chunks

    def alone(self, count: int) -> list[list[int]]:
        """Return the first images in batches of their own (copies, if one is too few)."""
        return [[i] * self.batch[0] for i in range(min(count, len(self.images)))]

    def feed(self, chunk: list[int], with_threshold: bool) -> dict[str, Array]:
        """Return the feed of one batch; one threshold is enough where all are the same."""
        feed = {"images": self.images[chunk]}
        if with_threshold:
            limits = self.thresholds[chunk].astype(np.float32)
            feed["threshold"] = limits[:1] if (limits == limits[0]).all() else limits
        return feed


@dataclasses.dataclass(frozen=True)
class Run:
    """What one runtime gave for n images.

    Attributes:
        name: The runtime.
        outputs: [n, ...].
        records: By prune layer, one record an image. Empty if the runtime does not show them.
    """

    name: str
    outputs: Array
    records: dict[int, list[PruneRecord]]


def run(
    runner: BaseRunner,
    inputs: Inputs,
    chunks: list[list[int]],
    layers: list[int],
    output: str | None = None,
) -> Run:
    """Run batches of images through a Polygraphy runner and take them apart again.

    Args:
        runner: What runs.
        inputs: The images.
        chunks: Their numbers, by batch.
        layers: The prune layers whose decisions it shows.
        output: The output to keep. Default: the first.
    """
    with_threshold = isinstance(runner, TorchRunner) or inputs.runtime_threshold
    feeds = [inputs.feed(chunk, with_threshold) for chunk in chunks]
    results = Comparator.run([runner], data_loader=feeds)[runner.name]
    outputs: dict[int, Array] = {}
    records: dict[int, dict[int, PruneRecord]] = {layer: {} for layer in layers}
    for chunk, result in zip(chunks, results, strict=True):
        arrays = {name: np.array(result[name]) for name in result}
        main = arrays[output or next(iter(arrays))]
        for row, image in enumerate(chunk):
            if image in outputs:
                continue
            outputs[image] = main[row]
            for layer in layers:
                values = {what: arrays[diagnostic_name(layer, what)][row] for what in DIAGNOSTICS}
                limit = float(inputs.thresholds[image])
                records[layer][image] = PruneRecord(threshold=limit, **values)
    order = sorted(outputs)
    return Run(
        runner.name,
        np.stack([outputs[image] for image in order]),
        {layer: [found[image] for image in order] for layer, found in records.items()},
    )


@contextlib.contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep the logs of Polygraphy and ONNX Runtime off the terminal: the verdict says it all.

    ONNX Runtime's errors still show (it warns of every float16 operator that it cannot fold);
    Polygraphy's are raised, and would only be told twice.
    """
    warnings, errors = 2, 3
    _set_onnxruntime_severity(errors)
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    finally:
        _set_onnxruntime_severity(warnings)


def _set_onnxruntime_severity(severity: int) -> None:
    with contextlib.suppress(ModuleNotFoundError):  # engines are run without it
        importlib.import_module("onnxruntime").set_default_logger_severity(severity)
