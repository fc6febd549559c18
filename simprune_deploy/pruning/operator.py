"""`simprune::similarity_prune`, version 2: the operator in PyTorch, the reference for every other.

Definition (exact; every implementation gives this, however it computes it). P prefix tokens come
first; the M tokens behind them are patches, numbered 0, 1, 2, ...; padding, if there is any, lies
behind all other tokens of an image.

1. ``valid = log_size > PAD/2``. ``f = feature / max(|feature|, 1e-12)``, ``s_ij = f_i . f_j``,
   both in float32 whatever the features' type is.
2. "pairs": a valid patch with an even number is a *candidate*; its *partner* is the valid patch
   with an odd number with the largest s (lowest number on a tie). Without one nothing goes.
3. A candidate goes iff its s to its partner is ``>= threshold``, and is assigned to its partner's
   slot. Whatever stays is assigned to its own.
4. "merge": a token that heads a slot becomes ``sum size_j x_j / sum size_j`` over itself and those
   that went to it; "drop": it stays as it is. In both its size becomes ``sum size_j``.
5. ``K = P + max over the batch of the patches that stay``, rounded up to `multiple_of`, at most N.
   Slots hold what stays in ascending order, then padding (token 0, log_size PAD, index 0).
6. `capacity` k: of each image exactly the (valid - k) candidates most alike their partners go
   (lower number first on a tie), whatever the threshold. K = P + k always; M // 2 <= k <= M.
7. "redundancy" instead of 2 and 3: ``r_i = mean of s_ij over the other valid patches``; patches
   with ``r_i >= threshold`` go. If that is all of them, the one with the smallest r (lowest number
   on a tie) stays. Each goes to the patch that stays with the largest s (lowest number on a tie).
   With `capacity` k exactly the (valid - k) with the largest r go (lower number first on a tie),
   whatever the threshold; 1 <= k <= M.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from simprune_deploy.pruning.config import PAD_LOG_SIZE, REDUCTIONS, SELECTIONS
from simprune_deploy.pruning.kernel_library import LIBRARY_VARIABLE

NORM_FLOOR = 1e-12
"""Norms below this are taken as this, so that a zero vector has similarity 0 to everything."""


@torch.library.custom_op("simprune::similarity_prune", mutates_args=())
def similarity_prune(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "pairs",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    opt_tokens: int = 0,
    max_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fold patch tokens that are nearly the same into one another. Definition: this module's text.

    Args:
        tokens: T[B, N, D], T one of float32, float16, bfloat16 (float64 for checks of gradients).
            The first P = `num_prefix_tokens` are never pruned or compared.
        features: T[B, N, F], what is compared: the tokens themselves, or the keys of attention.
        log_size: float32[B, N], the natural log of how many patches a token stands for; PAD = -1e4
            in a padding slot.
        threshold: float32[1] or float32[B], the cosine threshold.
        num_prefix_tokens: P, the class, distillation and register tokens.
        selection: "pairs" or "redundancy". Default "pairs".
        reduction: "merge" or "drop". Default "merge".
        capacity: Patches that stay of every image; 0 (default) is as many as the images need.
        multiple_of: Round K up to a multiple. Default 1.
        opt_tokens: TensorRT's hint of the usual K; does not change the result. Default 0.
        max_tokens: TensorRT's bound of K; does not change the result. Default 0.

    Returns:
        kept_tokens T[B, K, D]; kept_log_size float32[B, K]; kept_index int64[B, K], the input
        position of the token that heads each slot (0 for padding); assignment int64[B, N], the
        slot each input token went to (-1 for padding).

    Raises:
        ValueError: shapes, dtypes or attributes that the definition does not cover.
    """
    call = (tokens, features, log_size, threshold, num_prefix_tokens)
    return _reference(*call, selection, reduction, capacity, multiple_of)


def _reference(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    prefix: int,
    selection: str,
    reduction: str,
    capacity: int,
    multiple_of: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator in PyTorch, on any device.

    With a capacity nothing here waits for a GPU; without one the number of slots is read once.
    """
    call = (tokens, features, log_size, threshold, prefix)
    _check(*call, selection, reduction, capacity, multiple_of)
    batch, num_tokens, _ = tokens.shape
    valid = log_size[:, prefix:] > PAD_LOG_SIZE / 2
    limit = threshold.float().view(-1, 1)
    choose = _pairs if selection == "pairs" else _redundant
    with full_precision(tokens.device):
        unit = unit_features(features[:, prefix:].float())
        goes, head = choose(unit, valid, limit, capacity)

    stays = valid & ~goes
    counts = stays.sum(1)
    slots = capacity or _round_up(prefix + int(counts.max()), multiple_of, num_tokens) - prefix
    patches = torch.arange(num_tokens - prefix, device=tokens.device).expand(batch, -1)
    rank = stays.cumsum(1) - 1
    slot = rank.gather(1, torch.where(goes, head, patches))
    # no slot is past the last, even if padding lies among the patches, which is undefined
    slot = torch.where(valid, slot.clamp_max(max(0, slots - 1)), -1)

    # what stays, each at its rank; the column behind takes all others
    index = rank.new_zeros(batch, num_tokens - prefix + 1)
    index = index.scatter(1, torch.where(stays, rank, num_tokens - prefix), patches + prefix)
    filled = torch.arange(slots, device=tokens.device) < counts[:, None]
    index = torch.where(filled, index[:, :slots], 0)

    ahead = torch.arange(prefix, device=tokens.device).expand(batch, -1)
    kept_index = torch.cat([ahead, index], 1)
    assignment = torch.cat([ahead, torch.where(slot >= 0, slot + prefix, -1)], 1)
    if kept_index.shape[1] == 0:  # no prefix, and nothing but padding in the whole batch
        return tokens[:, :0].clone(), log_size[:, :0].clone(), kept_index, assignment
    kept_tokens, kept_log_size = reduce_tokens(
        tokens, log_size, kept_index, assignment, reduction, prefix, selection == "pairs"
    )
    return kept_tokens, kept_log_size, kept_index, assignment


def _check(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    prefix: int,
    selection: str,
    reduction: str,
    capacity: int,
    multiple_of: int,
) -> None:
    if tokens.ndim != 3 or not tokens.is_floating_point():
        raise ValueError(f"tokens must be floating point [B, N, D], not {_describe(tokens)}")
    batch, num_tokens, _ = tokens.shape
    if (
        features.ndim != 3
        or tuple(features.shape[:2]) != (batch, num_tokens)
        or features.dtype != tokens.dtype
    ):
        kind = str(tokens.dtype).removeprefix("torch.")
        raise ValueError(
            f"features must be {kind}[{batch}, {num_tokens}, F] as the tokens are, not "
            f"{_describe(features)}"
        )
    if tuple(log_size.shape) != (batch, num_tokens) or log_size.dtype != torch.float32:
        raise ValueError(
            f"log_size must be float32[{batch}, {num_tokens}], not {_describe(log_size)}"
        )
    if threshold.dtype != torch.float32 or tuple(threshold.shape) not in ((1,), (batch,)):
        raise ValueError(f"threshold must be float32[1] or [{batch}], not {_describe(threshold)}")
    if batch < 1:
        raise ValueError("the batch is empty: give at least one image")
    if not 0 <= prefix < num_tokens:
        raise ValueError(f"num_prefix_tokens {prefix} leaves no patches among {num_tokens} tokens")
    if selection not in SELECTIONS:
        raise ValueError(f"selection {selection!r} is not one of {SELECTIONS}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is not one of {REDUCTIONS}")
    patches = num_tokens - prefix
    least = max(1, patches // 2) if selection == "pairs" else 1
    if capacity and not least <= capacity <= patches:
        raise ValueError(
            f"capacity {capacity} is outside [{least}, {patches}], what {selection!r} can leave of "
            f"{patches} patches (0: as many as the images need)"
        )
    if multiple_of < 1:
        raise ValueError(f"multiple_of {multiple_of} must be 1 or more")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and bfloat16 matmuls away: step 1 says float32."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)


def unit_features(features: torch.Tensor) -> torch.Tensor:
    """Step 1: float32[B, M, F] of length 1, or 0 where they are 0 or their square overflows."""
    # not vector_norm, which for F = 1 takes the magnitude and overflows later than others
    norm = features.square().sum(-1, keepdim=True).sqrt()
    return features / norm.clamp_min(NORM_FLOOR)


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Step 1: cosine similarities float32[B, M, M] of float32[B, M, F]."""
    unit = unit_features(features)
    return unit @ unit.transpose(1, 2)


def _pairs(
    unit: torch.Tensor, valid: torch.Tensor, limit: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps 2, 3 and 6: which patches go, bool[B, M], and to which, int64[B, M] (the others: 0)."""
    goes, head = torch.zeros_like(valid), torch.zeros_like(valid, dtype=torch.int64)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    if valid.shape[1] < 2:
        return goes, head
    similarity = unit[:, even] @ unit[:, odd].transpose(1, 2)
    best, partner = similarity.masked_fill(~valid[:, None, odd], -torch.inf).max(2)
    candidate = valid[:, even] & valid[:, odd].any(1, keepdim=True)
    if capacity:
        goes[:, even] = candidate & _highest(best, candidate, _excess(valid, capacity))
    else:
        goes[:, even] = candidate & (best >= limit)  # none at a threshold that is not a number
    head[:, even] = 2 * partner + 1
    return goes, head


def redundancy(unit: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scores float32[B, M] of "redundancy": the mean similarity to the other valid patches."""
    total = torch.where(valid[:, :, None], unit, 0).sum(1, keepdim=True)
    others = (valid.sum(1, keepdim=True) - 1).clamp_min(1)
    return (unit * (total - unit)).sum(2) / others


def _redundant(
    unit: torch.Tensor, valid: torch.Tensor, limit: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 7: which patches go, bool[B, M], and to which, int64[B, M]."""
    score = redundancy(unit, valid)
    if capacity:
        goes = valid & _highest(score, valid, _excess(valid, capacity))
    else:
        goes = valid & (score >= limit)  # none at a threshold that is not a number
        least = score.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
        all_go = ~(valid & ~goes).any(1, keepdim=True)
        goes &= ~(all_go & (torch.arange(valid.shape[1], device=valid.device) == least))
    stays = valid & ~goes
    similarity = unit @ unit.transpose(1, 2)
    return goes, similarity.masked_fill(~stays[:, None, :], -torch.inf).argmax(2)


def _excess(valid: torch.Tensor, capacity: int) -> torch.Tensor:
    return valid.sum(1, keepdim=True) - capacity


def _highest(score: torch.Tensor, among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mark the `count` [B, 1] highest scores among some, the first on a tie: bool[B, n]."""
    order = score.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(score.shape[1], device=score.device) < count
    return torch.zeros_like(among).scatter(1, order, first)


def _round_up(value: int, multiple: int, at_most: int) -> int:
    return min(at_most, -(-value // multiple) * multiple)


def reduce_tokens(
    tokens: torch.Tensor,
    log_size: torch.Tensor,
    kept_index: torch.Tensor,
    assignment: torch.Tensor,
    reduction: str,
    prefix: int,
    in_pairs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4, differentiable in `tokens` and `log_size`, with the decisions given.

    A member's weight is ``size_j / sum size``, computed relative to the head of its slot so that
    a token that stands alone comes out bit for bit as it went in. A patch that is assigned to -1
    leaves nothing behind. `in_pairs` says that even patches went to odd ones, which saves three
    quarters of the work. Sums are matrix products, which on a GPU repeat to the bit.
    """
    givers = slice(prefix, None, 2 if in_pairs else 1)
    takers = slice(prefix + 1, None, 2) if in_pairs else givers
    with full_precision(tokens.device):
        wide = torch.promote_types(tokens.dtype, torch.float32)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        heads = kept_index.gather(1, assignment.clamp_min(0))
        folded = (assignment >= 0) & (heads != positions)
        head_log_size = log_size.gather(1, heads)
        relative = torch.where(folded, (log_size - head_log_size).exp(), 0.0)[:, givers]
        heads = torch.where(folded, heads, -1)[:, givers]
        member = heads[:, None, :] == positions[takers, None]
        weight = member.float() * relative[:, None, :]
        others = weight.sum(2, keepdim=True)

        grown = log_size.clone()
        grown[:, takers] = log_size[:, takers] + torch.log(1 + others[:, :, 0])
        merged = tokens
        if reduction == "merge":
            own = tokens[:, takers]
            shares = (weight / (1 + others)).to(wide) @ tokens[:, givers].to(wide)
            mean = own.to(wide) / (1 + others) + shares
            merged = tokens.clone()
            merged[:, takers] = torch.where(others > 0, mean.to(tokens.dtype), own)

        # A slot is padding when nothing was assigned to it; only patches can be.
        last_slot = assignment.amax(1, keepdim=True).clamp_min(prefix - 1)
        filled = torch.arange(kept_index.shape[1], device=tokens.device) <= last_slot
        kept_log_size = torch.where(filled, grown.gather(1, kept_index), PAD_LOG_SIZE)
        kept = merged.gather(1, kept_index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        return torch.where(filled.unsqueeze(2), kept, 0), kept_log_size


@similarity_prune.register_kernel("cuda")
def similarity_prune_on_gpu(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "pairs",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    opt_tokens: int = 0,
    max_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What :func:`similarity_prune` runs for CUDA tensors.

    The kernels of the library that the environment variable SIMPRUNE_LIBRARY names, which the
    library for the CPU can stand in for in tests; without the variable, PyTorch. A library that
    cannot be loaded or does not cover the call is an error: nothing else is run in its place.
    """
    call = (tokens, features, log_size, threshold, num_prefix_tokens)
    choices = (selection, reduction, capacity, multiple_of)
    library = os.environ.get(LIBRARY_VARIABLE)
    if not library:
        return _reference(*call, *choices)
    from simprune_deploy.pruning.cuda_kernels import load_kernels

    _check(*call, *choices)
    return load_kernels(library).similarity_prune(*call, *choices)


@similarity_prune.register_fake
def _(
    tokens: torch.Tensor,
    features: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "pairs",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    opt_tokens: int = 0,
    max_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_tokens, dim = tokens.shape
    if capacity:
        slots: int | torch.SymInt = num_prefix_tokens + capacity
    else:
        # min=2: below it torch.export would treat 1 as a special size.
        slots = torch.library.get_ctx().new_dynamic_size(min=2)
    return (
        tokens.new_empty(batch, slots, dim),
        log_size.new_empty(batch, slots),
        tokens.new_empty((batch, slots), dtype=torch.int64),
        tokens.new_empty((batch, num_tokens), dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tokens, _, log_size, _, ctx.prefix, selection, ctx.reduction, *_ = inputs
    _, _, kept_index, assignment = output
    ctx.mark_non_differentiable(kept_index, assignment)
    ctx.save_for_backward(tokens, log_size, kept_index, assignment)
    ctx.in_pairs = selection == "pairs"


def _backward(ctx, grad_tokens, grad_log_size, *_):  # type: ignore[no-untyped-def]
    """Through the merge alone: what is compared only decides, and a decision has no gradient."""
    tokens, log_size, kept_index, assignment = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tokens.detach().requires_grad_(), log_size.detach().requires_grad_()]
        decisions = (kept_index, assignment, ctx.reduction, ctx.prefix, ctx.in_pairs)
        outputs = reduce_tokens(*leaves, *decisions)
        of_tokens, of_log_size = torch.autograd.grad(
            outputs, leaves, (grad_tokens, grad_log_size), allow_unused=True
        )
    return (of_tokens, None, of_log_size, *(None,) * 8)


similarity_prune.register_autograd(_backward, setup_context=_setup_context)
