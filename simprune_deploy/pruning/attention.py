"""A transformer block in two halves, so that tokens can be pruned between them.

What is computed is timm's: the attention half is ``x + drop_path(scale(attn(norm(x))))``, the other
one the same with the MLP. Attention is written out here because pruning reads its keys, because
queries, keys and values are one Split in an exported network (timm's ``unbind`` becomes six nodes),
and because of how the tokens' sizes get into it.

Attention is ``softmax(q.k / sqrt(d) + log_size)``. Added as a mask, the sizes cost a GPU's fused
kernels much of their speed; as a few more channels of queries and keys they cost an eighth more of
the products. The channels come out of qkv's own product, whose weights are padded with zeros, so
that nothing is copied but the log-sizes. On an H100, in 16 bits and with weights padded beforehand,
a ViT-B at 1370 tokens that keeps 0.8 of them took 26.4 ms by mask and 24.7 by channels at batch 32,
6.8 and 6.2 at batch 8, 1.17 and 1.24 at batch 1. On a CPU the mask costs an attention up to 5 %,
the channels 6 to 20 %.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn
from torch.nn import functional

from simprune_deploy.pruning.operator import NORM_FLOOR

KEY_CHANNELS = 8
"""More channels a head where sizes ride in the keys; kernels want widths in steps of 8."""

PARTS = 3
"""Numbers of 8 bits, as bfloat16 has them, that a log-size is the sum of to be exact."""

MANY_TOKENS = 8192
"""Of a batch, from which on a GPU is faster with the sizes in the keys."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the tokens, as attention takes them.

    Attributes:
        mask: log-sizes T[B, 1, 1, N], to be added to the scores.
        in_keys: Channels of the keys T[B, N, 1, 8] that say the same, for an attention that
            :func:`takes_channels`; None: the mask is used.
    """

    mask: torch.Tensor
    in_keys: torch.Tensor | None = None


def sizes_of(log_size: torch.Tensor, tokens: torch.Tensor) -> Sizes:
    """Return float32[B, N] log-sizes as attention over `tokens` T[B, N, D] takes them."""
    mask = log_size[:, None, None, :].to(tokens.dtype)
    if not tokens.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return Sizes(mask)
    if log_size.numel() < MANY_TOKENS:
        return Sizes(mask)
    autocast = torch.is_autocast_enabled(tokens.device.type)
    dtype = torch.get_autocast_dtype(tokens.device.type) if autocast else tokens.dtype
    return Sizes(mask, key_channels(log_size, dtype))


def has_two_halves(block: nn.Module) -> bool:
    """Tell whether a block is attention, then MLP, with nothing of one in the other."""
    return _computes(block, Block, ResPostBlock)


def has_keys(block: nn.Module) -> bool:
    """Tell whether a block's attention is timm's plain one, whose keys can be compared."""
    return has_two_halves(block) and _computes(block.attn, Attention)


def _computes(module: Any, *classes: type[nn.Module]) -> bool:
    """Tell whether a module's forward is that of one of the classes, and no one replaced it."""
    return type(module).forward in [each.forward for each in classes] and (
        "forward" not in vars(module)
    )


def run_block(block: Any, tokens: torch.Tensor, sizes: Sizes | None) -> torch.Tensor:
    """Run a whole block: float[B, N, D] to float[B, N, D].

    By itself, so that its hooks run, unless this module's way is another: in an export, and with
    sizes in the keys.
    """
    in_keys = sizes is not None and sizes.in_keys is not None and takes_channels(block)
    if has_keys(block) and (in_keys or torch.compiler.is_exporting()):
        return mlp_half(block, attention_half(block, tokens, sizes)[0])
    whole: torch.Tensor = block(tokens, attn_mask=_mask(sizes))
    return whole


def attention_half(
    block: Any, tokens: torch.Tensor, sizes: Sizes | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the tokens behind a block's attention, and the keys that it attended to.

    Args:
        block: One of which :func:`has_two_halves` is true.
        tokens: [B, N, D].
        sizes: Of the tokens, or None before anything was pruned.

    Returns:
        Tokens [B, N, D]; keys [B, heads, N, head width], or None where :func:`has_keys` is false.
    """
    norm_last = isinstance(block, ResPostBlock)
    read = tokens if norm_last else block.norm1(tokens)
    keys = None
    if sizes is not None and not takes_channels(block):
        sizes = Sizes(sizes.mask)
    if has_keys(block):
        attended, keys = attend(block.attn, read, sizes)
    else:
        attended = block.attn(read, attn_mask=_mask(sizes))
    attended = block.norm1(attended) if norm_last else block.ls1(attended)
    return tokens + block.drop_path1(attended), keys


def mlp_half(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tokens behind a block's MLP, [B, N, D]."""
    if isinstance(block, ResPostBlock):
        return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def attend(
    attn: Attention, tokens: torch.Tensor, sizes: Sizes | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what timm's ``Attention.forward`` does; also return the keys.

    Args:
        attn: timm's module.
        tokens: [B, N, D].
        sizes: Of the tokens, or None before anything was pruned.

    Returns:
        The output [B, N, D], and the keys [B, heads, N, head width] behind their norm.
    """
    if sizes is not None and sizes.in_keys is not None:
        return _attend_by_channels(attn, tokens, sizes.in_keys)
    q, k, v = _heads(attn, attn.qkv(tokens), attn.head_dim)
    q, k = attn.q_norm(q), attn.k_norm(k)
    mask = _mask(sizes)
    if attn.fused_attn:
        dropped = attn.attn_drop.p if attn.training else 0.0
        read = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropped)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        read = attn.attn_drop(scores.softmax(dim=-1)) @ v
    read = attn.norm(read.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        read = read * attn.gate(tokens).sigmoid()
    return attn.proj_drop(attn.proj(read)), k


def _mask(sizes: Sizes | None) -> torch.Tensor | None:
    return None if sizes is None else sizes.mask


def _heads(attn: Attention, qkv: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values [B, heads, N, width] of what qkv made, [B, N, ...]."""
    batch, count, _ = qkv.shape
    heads = qkv.reshape(batch, count, 3 * attn.num_heads, width).transpose(1, 2)
    return heads.split(attn.num_heads, 1)


def takes_channels(block: Any) -> bool:
    """Tell whether sizes may ride in a block's keys.

    They may where nothing stands between the attention's qkv, its products and its proj, and no one
    listens to the block.
    """
    if not has_keys(block):
        return False
    attn = block.attn
    plain = attn.fused_attn and attn.gate is None
    norms = (attn.q_norm, attn.k_norm, attn.norm)
    linears = (attn.qkv, attn.proj)
    hooks = [(each._forward_hooks, each._forward_pre_hooks) for each in (block, attn, *linears)]
    return (
        plain
        and all(isinstance(each, nn.Identity) for each in norms)
        and all(type(each) is nn.Linear for each in linears)  # and no adapter of one
        and not any(map(any, hooks))
    )


def key_channels(log_size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return T[B, N, 1, 8]: float32[B, N] log-sizes as sums of numbers of T, twice, and zeros."""
    rest, parts = log_size, []
    for _ in range(PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    parts = [*parts, *parts]
    return functional.pad(torch.stack(parts, 2), (0, KEY_CHANNELS - len(parts)))[:, :, None]


def _attend_by_channels(
    attn: Attention, tokens: torch.Tensor, in_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`attend` does, with the sizes in channels of the keys; without gradients.

    The weights are padded anew in each run: it takes 1 or 2 % of the time where this pays, and
    padded weights that were kept could be those of before a change of the module's.
    """
    width = attn.head_dim + KEY_CHANNELS
    weight, bias = attn.qkv.weight, attn.qkv.bias
    per_head = (3, attn.num_heads, attn.head_dim)
    wide_weight = functional.pad(weight.unflatten(0, per_head), (0, 0, 0, KEY_CHANNELS))
    wide_bias = weight.new_zeros(3, attn.num_heads, width)
    if bias is not None:
        wide_bias[..., : attn.head_dim] = bias.view(per_head)
    # queries' channels: 1 / scale as the sum of two numbers, each times all parts of a log-size
    high = float(torch.tensor(1 / attn.scale, dtype=in_keys.dtype))
    wide_bias[0, :, attn.head_dim :][:, :PARTS] = high
    wide_bias[0, :, attn.head_dim :][:, PARTS : 2 * PARTS] = 1 / attn.scale - high
    qkv = functional.linear(tokens, wide_weight.flatten(0, 2), wide_bias.flatten())
    q, k, v = _heads(attn, qkv, width)
    k[..., attn.head_dim :] = in_keys.transpose(1, 2)
    dropped = attn.attn_drop.p if attn.training else 0.0
    read = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped, scale=attn.scale)
    wide_proj = attn.proj.weight.unflatten(1, per_head[1:])
    wide_proj = functional.pad(wide_proj, (0, KEY_CHANNELS)).flatten(1)
    output = functional.linear(read.transpose(1, 2).flatten(2), wide_proj, attn.proj.bias)
    return attn.proj_drop(output), k[..., : attn.head_dim]


def features_of(kind: str, tokens: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """Return what a prune layer compares, [B, N, F].

    Args:
        kind: "tokens" (F = D), "keys" (all heads side by side), "mean-keys" (F = head width),
            "tokens+keys" (F = D + head width: the token, then its mean key, scaled to the token's
            length, so that the similarity is the mean of both cosines).
        tokens: [B, N, D].
        keys: [B, heads, N, head width].
    """
    if kind == "tokens":
        return tokens
    assert keys is not None  # the configuration was checked against the model
    if kind == "mean-keys":
        return keys.mean(1)
    if kind == "tokens+keys":
        mean = keys.mean(1).float()
        length, of_mean = (each.square().sum(2, True).sqrt() for each in (tokens.float(), mean))
        scaled = mean * (length / of_mean.clamp_min(NORM_FLOOR))
        return torch.cat([tokens, scaled.to(tokens.dtype)], 2)
    return keys.transpose(1, 2).flatten(2)
