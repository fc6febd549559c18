"""What a forward pass costs: floating-point operations by token count. No torch needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


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
