"""What the models are timed on, and how many tokens of it they keep."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import InvalidArgumentError, RequirementError, argument
from simprune_deploy.onnx.exported_folder import GOLDEN
from simprune_deploy.onnx.metadata import preprocessing_of
from simprune_deploy.predict.records import Array
from simprune_deploy.predict.source import ModelSource

if TYPE_CHECKING:
    from simprune_deploy.onnx.metadata import ModelMetadata

MOST_IMAGES = 16


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


def load_pictures(source: ModelSource, images: str | Path | None, wanted: int | None) -> Pictures:
    """Return the folder's golden images, or those that the user named, in batches.

    Args:
        source: The export.
        images: Folder of pictures. None: the golden cases.
        wanted: Images in a batch. None: the smallest batch.

    Raises:
        SimpruneError: there are none, or the export does not take such a batch.
    """
    from simprune_deploy.onnx.variants import pruned_layers

    metadata = source.metadata
    low, high = metadata.batch
    batch = low if wanted is None else wanted
    if not low <= batch <= high:
        raise InvalidArgumentError(
            f"{argument('batch')} {batch} is outside {low}..{high}, which this export takes: "
            f"export with another {argument('batch')}",
            what="batch",
            value=batch,
            allowed=(low, high),
        )
    if images is None:
        from simprune_deploy.common.images import GIVE_A_FOLDER
        from simprune_deploy.parity.golden import load_golden

        assert source.folder is not None
        assert source.graph is not None
        layers = pruned_layers(source.graph)
        found = load_golden(source.folder / GOLDEN, layers, GIVE_A_FOLDER).images
        return Pictures(_batches(found, batch), len(found), "the golden cases of the folder")
    from simprune_deploy.common.images import load_as_taken

    loaded = load_as_taken(
        images,
        preprocessing_of(metadata),
        graph_normalizes=bool(metadata.export["normalize"]),
        uint8=metadata.takes_uint8,
        limit=MOST_IMAGES,
    )
    pixels = loaded.pixels
    return Pictures(_batches(pixels, batch), len(pixels), loaded.source, loaded.skipped)


def _batches(images: Array, batch: int) -> list[Array]:
    """Return batches in which every image is equally often."""
    count = len(images)
    rows = np.arange(math.lcm(count, batch)).reshape(-1, batch) % count
    return [np.ascontiguousarray(images[row]) for row in rows]


def count_tokens(source: ModelSource, batches: Sequence[Array], threshold: float) -> dict[str, Any]:
    """Return how many tokens the batches kept, and the speed-up that these counts allow.

    Counted where decisions can be seen, in ONNX Runtime on the CPU, and as they run: a batch is
    padded to its largest image.
    """
    from simprune_deploy.pruning.cost import allowed_speedup, spread_over_blocks, tokens_share

    metadata = source.metadata
    height, width = metadata.image_size
    embed = 2.0 * metadata.channels * height * width * metadata.embed_dim
    kept, shares, costs = [], [], []
    try:
        with source.spec().open() as predictor:
            layers = predictor.layers
            alone: list[Counter[int]] = [Counter() for _ in layers]
            for images in batches:
                found = predictor.answer(
                    images, threshold=threshold, decisions=True, batches=[range(len(images))]
                )
                records = found.records or {}
                counts = [float(len(records[layer][0].kept_index)) for layer in layers]
                for counter, layer in zip(alone, layers, strict=True):
                    counter.update(len(record.heads()) for record in records[layer])
                place = metadata.pruning.place
                total, depth = metadata.num_tokens, metadata.depth
                by_block = spread_over_blocks(total, layers, counts, depth, place)
                kept.append(counts)
                shares.append(tokens_share(total, by_block))
                allowed = allowed_speedup(metadata.block, total, by_block, embed)
                costs.append(1 / allowed)
    except RequirementError:
        return {"unknown": "tokens are counted in ONNX Runtime: pip install onnxruntime"}
    means = np.mean(kept, axis=0).round(2).tolist()
    return {
        "before": metadata.num_tokens,
        "kept": dict(zip(map(str, layers), means, strict=True)),
        "processed_share": round(float(np.mean(shares)), 4),
        "allowed_speedup": round(1 / float(np.mean(costs)), 4),
        "padded": padding(metadata, layers, alone, len(batches[0])),
    }


def padding(
    metadata: ModelMetadata, layers: Sequence[int], kept: Sequence[Counter[int]], timed: int
) -> dict[str, Any] | None:
    """Return what padding leaves of the saving in batches; None where it takes nothing of it.

    It takes nothing where counts are fixed, or single images are all that the export takes.

    Args:
        metadata: Of the export.
        layers: The prune layers' blocks.
        kept: For each of them, how many images kept how many tokens, prefix included.
        timed: The batch that was timed.

    Returns:
        ``flops_share``, by batch; and for the batch that was timed, or the largest of these where
        single images were, as ``batch``, the share of the saving that padding gives back, as
        ``given_back``.
    """
    from simprune_deploy.pruning.cost import BATCHES, padded_flops_share

    config, (low, high) = metadata.pruning, metadata.batch
    if config.capacities or high == 1:
        return None
    taken = {1, timed, *(min(max(batch, low), high) for batch in BATCHES)}
    model = (metadata.block, metadata.num_tokens, layers, kept, metadata.depth, config.place)
    shares = {
        batch: padded_flops_share(*model, batch, config.multiple_of) for batch in sorted(taken)
    }
    batch = timed if timed > 1 else max(taken)
    saved = 1 - shares[1]
    return {
        "flops_share": {str(batch): round(share, 4) for batch, share in shares.items()},
        "batch": batch,
        "given_back": round((shares[batch] - shares[1]) / saved, 4) if saved > 0 else 0.0,
    }
