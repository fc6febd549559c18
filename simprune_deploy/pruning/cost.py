"""What a forward pass costs: floating-point operations by token count. No torch needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The widths of a transformer block: tokens D, hidden layer of the MLP."""

    embed_dim: int
    mlp_dim: int


def block_flops(shape: BlockShape, tokens: float) -> float:
    """Return the FLOPs of one block for n tokens, a multiply-add counted as two.

    ``2 n (4 D^2 + 2 D H) + 4 n^2 D``: the four D x D projections and the MLP, then the two
    products of attention. Norms, softmax and activations are left out.
    """
    linear = 4 * shape.embed_dim**2 + 2 * shape.embed_dim * shape.mlp_dim
    return 2 * tokens * linear + 4 * tokens**2 * shape.embed_dim


def flops_share(shape: BlockShape, dense_tokens: int, tokens_by_block: Sequence[float]) -> float:
    """Return the blocks' FLOPs at the given token counts over their FLOPs when dense."""
    pruned = sum(block_flops(shape, tokens) for tokens in tokens_by_block)
    return pruned / (len(tokens_by_block) * block_flops(shape, dense_tokens))


def allowed_speedup(
    shape: BlockShape, dense_tokens: int, tokens_by_block: Sequence[float], embed_flops: float
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
    return dense / (embed_flops + sum(block_flops(shape, tokens) for tokens in tokens_by_block))


def spread_over_blocks(
    dense_tokens: int, layers: Sequence[int], kept: Sequence[float], depth: int
) -> list[float]:
    """Return the tokens every block sees, from what each prune layer keeps (prefix included)."""
    tokens: list[float] = []
    current: float = dense_tokens
    by_layer = dict(zip(layers, kept, strict=True))
    for block in range(depth):
        current = by_layer.get(block, current)
        tokens.append(current)
    return tokens
