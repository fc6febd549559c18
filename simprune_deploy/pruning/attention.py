"""A transformer block in two halves, so that tokens can be pruned between them.

What is computed is timm's: the attention half is ``x + drop_path(scale(attn(norm(x))))``, the other
one the same with the MLP. Attention is written out here because pruning reads its keys, and because
queries, keys and values are taken one by one: ``unbind``, as timm has it, becomes half of the nodes
of an exported network.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn
from torch.nn import functional


def has_two_halves(block: nn.Module) -> bool:
    """Tell whether a block is attention, then MLP, with nothing of one in the other."""
    return type(block).forward in (Block.forward, ResPostBlock.forward)


def has_keys(block: nn.Module) -> bool:
    """Tell whether a block's attention is timm's plain one, whose keys can be compared."""
    attn = getattr(block, "attn", None)
    return has_two_halves(block) and type(attn).forward is Attention.forward  # type: ignore[union-attr]


def run_block(block: Any, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Run a whole block: float[B, N, D] to float[B, N, D]."""
    if not has_two_halves(block):
        return block(tokens, attn_mask=bias)
    return mlp_half(block, attention_half(block, tokens, bias)[0])


def attention_half(
    block: Any, tokens: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens behind a block's attention, and the keys that it attended to.

    Args:
        block: One of which :func:`has_two_halves` is true.
        tokens: [B, N, D].
        bias: [B, 1, 1, N], added to the attention scores, or None.

    Returns:
        Tokens [B, N, D]; keys [B, heads, N, head width], or None where :func:`has_keys` is false.
    """
    norm_last = isinstance(block, ResPostBlock)
    read = tokens if norm_last else block.norm1(tokens)
    keys = None
    if has_keys(block):
        attended, keys = attend(block.attn, read, bias)
    else:
        attended = block.attn(read, attn_mask=bias)
    attended = block.norm1(attended) if norm_last else block.ls1(attended)
    return tokens + block.drop_path1(attended), keys


def mlp_half(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens behind a block's MLP, [B, N, D]."""
    if isinstance(block, ResPostBlock):
        return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def attend(
    attn: Attention, tokens: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what timm's ``Attention.forward`` does; also return the keys.

    Args:
        attn: timm's module.
        tokens: [B, N, D].
        bias: [B, 1, 1, N], added to the scores, or None.

    Returns:
        The output [B, N, D], and the keys [B, heads, N, head width] behind their norm.
    """
    batch, count, _ = tokens.shape
    qkv = attn.qkv(tokens).reshape(batch, count, 3, attn.num_heads, attn.head_dim)
    qkv = qkv.permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
    if attn.fused_attn:
        dropped = attn.attn_drop.p if attn.training else 0.0
        read = functional.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropped)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        read = attn.attn_drop(scores.softmax(dim=-1)) @ v
    read = attn.norm(read.transpose(1, 2).reshape(batch, count, attn.attn_dim))
    if attn.gate is not None:
        read = read * attn.gate(tokens).sigmoid()
    return attn.proj_drop(attn.proj(read)), k


def features_of(kind: str, tokens: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """Return what a prune layer compares, [B, N, F].

    Args:
        kind: "tokens" (F = D), "keys" (all heads side by side), "mean-keys" (F = head width).
        tokens: [B, N, D].
        keys: [B, heads, N, head width].
    """
    if kind == "tokens":
        return tokens
    assert keys is not None  # the configuration was checked against the model
    if kind == "mean-keys":
        return keys.mean(1)
    return keys.transpose(1, 2).flatten(2)
