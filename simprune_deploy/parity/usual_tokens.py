"""How many tokens the prune layers usually leave, counted on pictures: what TensorRT tunes for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.parity.runs import Run


def usual_tokens(run: Run, images: int, metadata: ModelMetadata) -> tuple[int, ...]:
    """Return ``ExportOptions.opt_tokens`` as a run of PyTorch's counted it.

    An engine is tuned for the graph's smallest batch, unless its builder is told another, and a
    batch has as many slots as its largest image needs. So this is the mean, over all choices of so
    many of the images, of what the largest of them keeps: for a batch of 1 the mean of the images.

    Args:
        run: Of the pruned model, with its decisions.
        images: How many of the run's images count: the first, which are at the file's threshold.
        metadata: Of the exported file.

    Returns:
        Tokens for each prune layer, with the prefix tokens, rounded up; () for a file whose counts
        are fixed or that prunes nowhere.
    """
    config, most = metadata.pruning, metadata.num_tokens
    if config.capacities:
        return ()
    hints = []
    for layer in config.layers:
        kept = [len(record.heads()) for record in run.records[layer][:images]]
        slots = [min(_multiple(count, config.multiple_of), most) for count in kept]
        hints.append(mean_of_largest(slots, metadata.batch[0]))
    return tuple(hints)


def mean_of_largest(counts: Sequence[int], size: int) -> int:
    """Return the mean of the largest of `size` numbers, over all choices of them, rounded up."""
    size = min(size, len(counts))
    # the number at place i, in ascending order, is the largest with size - 1 of the i before it
    total = sum(count * math.comb(i, size - 1) for i, count in enumerate(sorted(counts)))
    return -(-total // math.comb(len(counts), size))


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
