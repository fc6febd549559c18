"""What the models are timed on, and how many tokens of it they keep."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.bench.machine import usable_cores
from simprune_deploy.evaluate.bench.options import BenchOptions
from simprune_deploy.onnx.exported_folder import GOLDEN
from simprune_deploy.onnx.metadata import preprocessing_of

if TYPE_CHECKING:
    import onnx

    from simprune_deploy.onnx.metadata import ModelMetadata

MOST_IMAGES = 16

Array = np.ndarray[Any, Any]
Feed = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The batches that are timed.

    Attributes:
        batches: [B, ...] each, as the graph takes them; every picture is in them equally often.
        count: How many different pictures there are.
        source: Where they come from, in words.
        skipped: (path, reason) of files that could not be used.
    """

    batches: list[Array]
    count: int
    source: str
    skipped: tuple[tuple[str, str], ...] = ()


def thresholds_of(metadata: ModelMetadata, options: BenchOptions) -> tuple[float, ...]:
    """Return the thresholds to time.

    Raises:
        SimpruneError: others than the model's own were asked for, and it cannot do them.
    """
    if not options.thresholds:
        return (metadata.pruning.threshold,)
    if not metadata.export["runtime_threshold"]:
        raise SimpruneError(
            f"the threshold of this export is fixed at {metadata.pruning.threshold}: export with "
            "--runtime-threshold to time others"
        )
    return tuple(dict.fromkeys(options.thresholds))


def load_pictures(
    folder: Path, graph: onnx.ModelProto, metadata: ModelMetadata, options: BenchOptions
) -> Pictures:
    """Return the folder's golden images, or those that the user named, in batches.

    Raises:
        SimpruneError: there are none, or the export does not take such a batch.
    """
    from simprune_deploy.onnx.variants import pruned_layers

    low, high = metadata.batch
    batch = low if options.batch is None else options.batch
    if not low <= batch <= high:
        raise SimpruneError(
            f"--batch {batch} is outside {low}..{high}, which this export takes: export with "
            "another --batch"
        )
    if options.images is None:
        from simprune_deploy.parity.golden import load_golden

        images = load_golden(folder / GOLDEN, pruned_layers(graph)).images
        return Pictures(_batches(images, batch), len(images), "the golden cases of the folder")
    from simprune_deploy.common.images import load_folder

    preprocessing = preprocessing_of(metadata)
    found = load_folder(
        options.images, preprocessing, MOST_IMAGES, normalize=not metadata.export["normalize"]
    )
    return Pictures(_batches(found.pixels, batch), len(found.pixels), found.source, found.skipped)


def _batches(images: Array, batch: int) -> list[Array]:
    """Return batches in which every image is equally often."""
    count = len(images)
    rows = np.arange(math.lcm(count, batch)).reshape(-1, batch) % count
    return [np.ascontiguousarray(images[row]) for row in rows]


def feed_of(metadata: ModelMetadata, images: Array, threshold: float) -> Feed:
    """Return the pruned model's inputs for a batch."""
    if not metadata.export["runtime_threshold"]:
        return {"images": images}
    return {"images": images, "threshold": np.array([threshold], np.float32)}


def images_only(feed: Feed) -> Feed:
    """Return what the dense model takes of a feed: it has no threshold."""
    return {"images": feed["images"]}


def count_tokens(
    graph: onnx.ModelProto, metadata: ModelMetadata, feeds: list[Feed]
) -> dict[str, Any]:
    """Return how many tokens the batches kept, and the speed-up that these counts allow.

    Counted where decisions can be seen, in ONNX Runtime on the CPU.
    """
    from simprune_deploy.onnx.precision import emulated
    from simprune_deploy.onnx.variants import (
        diagnostic_name,
        pruned_layers,
        with_diagnostics,
        with_function,
    )
    from simprune_deploy.pruning.cost import allowed_speedup, spread_over_blocks

    layers = pruned_layers(graph)
    try:
        from simprune_deploy.predict.onnxruntime_session import cpu_session

        shown = with_diagnostics(with_function(graph))
        if metadata.precision == "bf16":
            shown = emulated(shown, metadata.precision)
        session = cpu_session(shown.SerializeToString(), usable_cores())
    except ImportError:
        return {"unknown": "tokens are counted in ONNX Runtime: pip install onnxruntime"}
    names = [diagnostic_name(layer, "kept_index") for layer in layers]
    height, width = metadata.image_size
    embed = 2.0 * metadata.channels * height * width * metadata.embed_dim
    kept, shares, costs = [], [], []
    for feed in feeds:
        counts = [float(found.shape[1]) for found in session.run(names, feed)]
        by_block = spread_over_blocks(metadata.num_tokens, layers, counts, metadata.depth)
        kept.append(counts)
        shares.append(sum(by_block) / metadata.depth / metadata.num_tokens)
        costs.append(1 / allowed_speedup(metadata.block, metadata.num_tokens, by_block, embed))
    return {
        "before": metadata.num_tokens,
        "kept": dict(zip(map(str, layers), np.mean(kept, axis=0).round(2).tolist(), strict=True)),
        "processed_share": round(float(np.mean(shares)), 4),
        "allowed_speedup": round(1 / float(np.mean(costs)), 4),
    }
