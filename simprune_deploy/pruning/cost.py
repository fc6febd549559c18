"""What a forward pass costs: floating-point operations by token count. No torch needed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

BATCHES = (1, 8, 32)
"""The batches of which reports say what is left of the FLOPs, where they are not given."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The widths of a transformer block: tokens D, hidden layer of the MLP."""

    embed_dim: int
    mlp_dim: int


@dataclasses.dataclass(frozen=True)
class BlockTokens:
    """How many tokens a block's attention sees, and its MLP: fewer, with a prune layer between."""

    attention: float
    mlp: float

    @property
    def mean(self) -> float:
        return (self.attention + self.mlp) / 2


def attention_flops(shape: BlockShape, tokens: float) -> float:
    """Return the FLOPs of a block's attention for n tokens: ``8 n D^2 + 4 n^2 D``.

    A multiply-add counts as two: the four D x D projections, then the two products of attention.
    Norms and softmax are left out.
    """
    return 8 * tokens * shape.embed_dim**2 + 4 * tokens**2 * shape.embed_dim


def mlp_flops(shape: BlockShape, tokens: float) -> float:
    """Return the FLOPs of a block's MLP for n tokens: ``4 n D H``."""
    return 4 * tokens * shape.embed_dim * shape.mlp_dim


def block_flops(shape: BlockShape, tokens: float) -> float:
    """Return the FLOPs of a whole block for n tokens."""
    return attention_flops(shape, tokens) + mlp_flops(shape, tokens)


def flops_of(shape: BlockShape, tokens_by_block: Sequence[BlockTokens]) -> float:
    """Return the FLOPs of blocks."""
    return sum(
        attention_flops(shape, each.attention) + mlp_flops(shape, each.mlp)
        for each in tokens_by_block
    )


def flops_share(
    shape: BlockShape, dense_tokens: int, tokens_by_block: Sequence[BlockTokens]
) -> float:
    """Return the blocks' FLOPs at the given token counts over their FLOPs when dense."""
    dense = len(tokens_by_block) * block_flops(shape, dense_tokens)
    return flops_of(shape, tokens_by_block) / dense


def tokens_share(dense_tokens: int, tokens_by_block: Sequence[BlockTokens]) -> float:
    """Return the mean share of the dense model's tokens over all halves of blocks."""
    return sum(each.mean for each in tokens_by_block) / len(tokens_by_block) / dense_tokens


def allowed_speedup(
    shape: BlockShape,
    dense_tokens: int,
    tokens_by_block: Sequence[BlockTokens],
    embed_flops: float,
) -> float:
    """Return how much faster token counts allow a model to be: its dense FLOPs over the pruned.

    Args:
        shape: Of a block.
        dense_tokens: Before any pruning.
        tokens_by_block: What every block sees.
        embed_flops: Of the patch embedding, which both do alike.

    The prune layers' own work is not in it: a measured speed-up has to earn it back.
    """
    dense = embed_flops + len(tokens_by_block) * block_flops(shape, dense_tokens)
    return dense / (embed_flops + flops_of(shape, tokens_by_block))


def pairing_flops(patches: float, embed_dim: int, width: int) -> float:
    """Return the FLOPs of a prune layer's two products: ``n^2 / 2 (F + D)``.

    Every other of n patches is compared with the rest, by F numbers each; and what goes is added to
    its partner, in the portable body by a product with zeros and ones.
    """
    return patches**2 / 2 * (width + embed_dim)


def spread_over_blocks(
    dense_tokens: int, layers: Sequence[int], kept: Sequence[float], depth: int, place: str
) -> list[BlockTokens]:
    """Return the tokens every block sees, from what each prune layer keeps (prefix included).

    `place` says whether the layers are "before" their blocks or "inside" them.
    """
    found: list[BlockTokens] = []
    current: float = dense_tokens
    by_layer = dict(zip(layers, kept, strict=True))
    for block in range(depth):
        read, current = current, by_layer.get(block, current)
        found.append(BlockTokens(read if place == "inside" else current, current))
    return found


def padded_flops_share(
    shape: BlockShape,
    dense_tokens: int,
    layers: Sequence[int],
    kept: Sequence[Mapping[int, int]],
    depth: int,
    place: str,
    batch: int,
    multiple_of: int = 1,
) -> float:
    """Return the share of the dense FLOPs that batches of measured images take, on average.

    Every prune layer gives a whole batch as many slots as its image with the most tokens needs.
    The mean over all batches that can be drawn from the images, each image as often as chance has
    it, is exact and takes no drawing: half a block sees the slots of one layer alone, so a mean
    over each layer's own largest counts will do, whatever the layers have to do with one another.

    Args:
        shape: Of a block.
        dense_tokens: Before any pruning.
        layers: The prune layers' blocks.
        kept: For each of them, how many images keep how many tokens, prefix included.
        depth: How many blocks there are.
        place: Whether the layers are "before" their blocks or "inside" them.
        batch: Images in a batch. 1: the mean of what the images take alone.
        multiple_of: What the slots are rounded up to a multiple of. Default 1.
    """
    attention, mlp = [attention_flops(shape, dense_tokens)], [mlp_flops(shape, dense_tokens)]
    for counts in kept:
        chances = _chances_of_largest(counts, batch)
        slots = [min(dense_tokens, -(-most // multiple_of) * multiple_of) for most in chances]
        for means, flops in ((attention, attention_flops), (mlp, mlp_flops)):
            pairs = zip(slots, chances.values(), strict=True)
            means.append(sum(chance * flops(shape, count) for count, chance in pairs))
    # which layer's slots each half of a block sees: the layers' numbers, spread as tokens are
    seen = spread_over_blocks(0, layers, range(1, len(kept) + 1), depth, place)
    total = sum(attention[int(each.attention)] + mlp[int(each.mlp)] for each in seen)
    return total / (depth * block_flops(shape, dense_tokens))


def _chances_of_largest(counts: Mapping[int, int], batch: int) -> dict[int, float]:
    """Return how likely each number is to be the largest of a batch, in ascending order.

    All of a batch are at most k with the chance ``F(k)^B``, of which those that are all below k
    are taken off.
    """
    ordered = sorted(counts)
    images = sum(counts.values())
    within = [0, *itertools.accumulate(counts[most] for most in ordered)]
    return {
        most: (upto / images) ** batch - (below / images) ** batch
        for most, (below, upto) in zip(ordered, itertools.pairwise(within), strict=True)
    }
