"""What the kernels are compared with: the same operator and ToMe's, both in plain PyTorch.

:func:`vectorised_prune` is the operator of docs/operator.md (selection "pairs", reduction "merge")
as one would write it for a GPU with PyTorch alone: dot products of even and odd patches by cuBLAS
from the features as they are, with float32 sums, and the merge by `index_add_`, whose order of sums
differs from run to run. The reference (`simprune_deploy/pruning/operator.py`) is written to be read
and to repeat to the bit.

:func:`bipartite_merge` is bipartite soft matching and merging as published in "Token Merging: Your
ViT But Faster" (Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, ICLR 2023), written here from the
paper's description. Another method with another result: it stands beside ours as what a user could
run instead at the same number of tokens. It compares the attention's keys, averaged over the heads
(64 channels in the usual models), which are given here.
"""

from __future__ import annotations

import torch

from simprune_deploy.pruning.config import PAD_LOG_SIZE

HAS_HALF_GRAM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether a product of float16 matrices can leave its float32 sums as they are."""

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def vectorised_prune(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    capacity: int = 0,
) -> Outputs:
    """Return what `similarity_prune(..., "pairs", "merge", capacity)` returns, for M >= 2."""
    prefix, device = num_prefix_tokens, tokens.device
    batch, num_tokens, dim = tokens.shape
    num_patches = num_tokens - prefix
    valid = log_size[:, prefix:] > PAD_LOG_SIZE / 2
    similarity = _cosines(features[:, prefix:])
    best, partner = similarity.masked_fill_(~valid[:, None, 1::2], -torch.inf).max(2)
    candidate = valid[:, ::2] & valid[:, 1:2]  # padding lies behind: the first partner goes last
    if capacity:
        order = best.masked_fill(~candidate, -torch.inf).argsort(
            dim=1, descending=True, stable=True
        )
        excess = valid.sum(1, keepdim=True) - capacity
        first = torch.arange(order.shape[1], device=device) < excess
        goes = torch.zeros_like(candidate).scatter_(1, order, first) & candidate
        slots = prefix + capacity
    else:
        goes = candidate & (best >= threshold.view(-1, 1))
        slots = 0
    kept = valid.clone()
    kept[:, ::2] &= ~goes
    counts = kept.sum(1, keepdim=True)
    slots = slots or prefix + int(counts.max())

    positions = torch.arange(num_patches, device=device)
    heads = positions.repeat(batch, 1)
    heads[:, ::2] = torch.where(goes, 2 * partner + 1, heads[:, ::2])
    rank = kept.cumsum(1) - 1
    slot = torch.where(valid, rank.gather(1, heads) + prefix, -1)
    ahead = torch.arange(prefix, device=device).expand(batch, -1)
    assignment = torch.cat([ahead, slot], 1)

    # one column more, for what is not kept
    index = torch.zeros(batch, num_patches + 1, dtype=torch.int64, device=device)
    index.scatter_(1, torch.where(kept, rank, num_patches), (positions + prefix).expand(batch, -1))
    filled = torch.arange(slots, device=device) < prefix + counts
    kept_index = torch.cat([ahead, index[:, :num_patches]], 1)[:, :slots] * filled

    head_log_size = log_size.gather(1, kept_index)
    target = assignment.clamp_min(0)
    relative = (log_size - head_log_size.gather(1, target)).exp() * (assignment >= 0)
    rows = (target + torch.arange(batch, device=device)[:, None] * slots).flatten()
    total = torch.zeros(batch * slots, device=device).index_add_(0, rows, relative.flatten())
    weighted = (tokens.float() * relative.unsqueeze(2)).flatten(0, 1)
    merged = torch.zeros(batch * slots, dim, device=device).index_add_(0, rows, weighted)
    merged = (merged / total.clamp_min(1e-30).unsqueeze(1)).view(batch, slots, dim)
    sizes = head_log_size + total.view(batch, slots).clamp_min(1e-30).log()
    return (
        (merged * filled.unsqueeze(2)).to(tokens.dtype),
        torch.where(filled, sizes, PAD_LOG_SIZE),
        kept_index,
        assignment,
    )


def _cosines(patches: torch.Tensor) -> torch.Tensor:
    """Cosine similarities float32[B, even, odd], with float32 sums of exact products."""
    even, odd = patches[:, ::2], patches[:, 1::2]
    if HAS_HALF_GRAM and patches.is_cuda and patches.dtype != torch.float32:
        dots = torch.bmm(even, odd.mT, out_dtype=torch.float32)
    else:
        dots = torch.bmm(even.float(), odd.float().mT)
    inverse = patches.float().square().sum(2).sqrt().clamp_min(1e-12).reciprocal()
    return dots * inverse[:, ::2, None] * inverse[:, None, 1::2]


def bipartite_merge(
    tokens: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, merged: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge `merged` tokens of each image away; the first (class) token is left alone.

    Args:
        tokens: T[B, N, D].
        sizes: T[B, N, 1], how many patches each stands for.
        metric: T[B, N, C], what similarities are taken of.
        merged: How many tokens fewer there are afterwards; at most those at even positions, less 1.

    Returns:
        T[B, N - merged, D] and T[B, N - merged, 1]: the tokens at even positions that were not
        merged, in their order, then those at odd positions, each with what was merged into it.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    scores[:, 0] = -torch.inf
    best, target = scores.max(2)
    order = best.argsort(dim=1, descending=True)
    leaving, staying = order[:, :merged], order[:, merged:].sort(dim=1).values
    target = target.gather(1, leaving).unsqueeze(2)

    def fold(values: torch.Tensor) -> torch.Tensor:
        channels = values.shape[2]
        source, destination = values[:, ::2], values[:, 1::2]
        moving = source.gather(1, leaving.unsqueeze(2).expand(-1, -1, channels))
        rest = source.gather(1, staying.unsqueeze(2).expand(-1, -1, channels))
        return torch.cat(
            [rest, destination.scatter_add(1, target.expand(-1, -1, channels), moving)], 1
        )

    new_sizes = fold(sizes)
    return fold(tokens * sizes) / new_sizes, new_sizes
