"""The counts of a setting turned into what a report shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from simprune_deploy.evaluate.classes import ClassResult
from simprune_deploy.evaluate.datasets import DataSet
from simprune_deploy.predict.source import ModelSource
from simprune_deploy.pruning.cost import (
    BATCHES,
    attention_flops,
    block_flops,
    mlp_flops,
    padded_flops_share,
)
from simprune_deploy.tuning.results import Measurement, Setting
from simprune_deploy.tuning.tallies import COSINE_STEPS, Tally
from simprune_deploy.tuning.timing import Timing


def measurement_of(
    source: ModelSource,
    data: DataSet,
    setting: Setting,
    tally: Tally,
    dense: Tally,
    timed: Timing | None,
) -> Measurement:
    """Turn the counts of a setting, beside the dense model's, into what a report shows."""
    metadata, count = source.metadata, tally.images
    single, told = metadata.num_classes == 1, tells_classes(source, data, dense)
    labelled, classified = data.labels is not None and told, metadata.num_classes > 0 and told
    spread = dense.deviation if single else 0.0
    processed, flops = _cost(source, setting, tally)
    dense_flops = metadata.depth * block_flops(metadata.block, metadata.num_tokens)
    kept = [sum(patches * images for patches, images in each.items()) for each in tally.kept]
    return Measurement(
        setting=setting,
        images=count,
        top1=tally.right / count if labelled else None,
        top5=tally.right_in_5 / count if labelled and metadata.num_classes > 5 else None,
        agreement=tally.agree / count if classified else None,
        cosine=None if single else tally.cosines / COSINE_STEPS / count,
        worst_cosine=None if single else tally.worst_cosine,
        moved=tally.moved / COSINE_STEPS / count / spread if spread else None,
        worst_moved=tally.most_moved / spread if spread else None,
        tokens_processed=processed,
        kept=tuple(each / count for each in kept),
        gflops=flops / 1e9,
        flops_share=flops / dense_flops,
        padded_flops_share=_padded(source, setting, tally),
        milliseconds=timed.milliseconds if timed else None,
        dense_milliseconds=timed.dense_milliseconds if timed else None,
        peak_memory=timed.peak_memory if timed else None,
        speedup_low=timed.speedup_low if timed else None,
        speedup_high=timed.speedup_high if timed else None,
        right_only_here=tally.right_only_here if labelled else None,
        right_only_dense=tally.right_only_dense if labelled else None,
        classes=tuple(
            ClassResult(data.classes[label], *counts)
            for label, counts in sorted(tally.classes.items() if told else ())
        ),
    )


def tells_classes(source: ModelSource, data: DataSet, dense: Tally) -> bool:
    """Tell whether classes of a model say anything on these images.

    They do not where all single outputs of the dense model are on one side of the cut, and no
    label says that they should: pruning would keep them there, however much it broke.
    """
    if source.metadata.num_classes != 1 or 0 < dense.above < dense.images:
        return True
    return data.labels is not None and dense.right == dense.images


def _cost(source: ModelSource, setting: Setting, tally: Tally) -> tuple[float, float]:
    """Return the mean share of tokens over all blocks, and the blocks' mean FLOPs, per image."""
    metadata = source.metadata
    block, place = metadata.block, setting.place
    per_stretch = [{metadata.num_patches: tally.images}, *tally.kept]
    stretches = _stretches(setting.layers, metadata.depth, place)
    tokens = flops = 0.0
    for (attentions, mlps), counts in zip(stretches, per_stretch, strict=True):
        for patches, images in sorted(counts.items()):
            seen = patches + metadata.num_prefix_tokens
            tokens += (attentions + mlps) / 2 * images * seen
            flops += attentions * images * attention_flops(block, seen)
            flops += mlps * images * mlp_flops(block, seen)
    return tokens / (tally.images * metadata.depth * metadata.num_tokens), flops / tally.images


def _padded(source: ModelSource, setting: Setting, tally: Tally) -> dict[int, float]:
    """Return by batch what share of the dense FLOPs is left, padding included, on average."""
    metadata, prefix = source.metadata, source.metadata.num_prefix_tokens
    if setting.tokens is not None:
        # fixed counts are what runs, whatever an image keeps: nothing is left to chance
        kept = [{prefix + patches: tally.images} for patches in setting.tokens]
    else:
        kept = [
            {prefix + patches: images for patches, images in counts.items()}
            for counts in tally.kept
        ]
    model = (metadata.block, metadata.num_tokens, setting.layers, kept, metadata.depth)
    rounded = metadata.pruning.multiple_of
    return {batch: padded_flops_share(*model, setting.place, batch, rounded) for batch in BATCHES}


def _stretches(layers: Sequence[int], depth: int, place: str) -> list[tuple[int, int]]:
    """Return how many attentions and MLPs lie before the first prune layer, between, and behind."""
    mlp_ends = [0, *layers, depth]
    attention_ends = [0, *(each + (place == "inside") for each in layers), depth]
    attentions, mlps = (
        [after - before for before, after in itertools.pairwise(ends)]
        for ends in (attention_ends, mlp_ends)
    )
    return list(zip(attentions, mlps, strict=True))
