"""`simprune::similarity_prune`, version 1: the operator in PyTorch, the reference for every other.

Definition of selection "cover" (exact; every implementation gives this, however it computes it)

1. ``valid = log_size > PAD/2``. ``f = patch / max(|patch|, 1e-12)``, ``s_ij = f_i . f_j``, both in
   float32 whatever the tokens' type is.
2. In ascending order a valid patch i is *kept* iff no kept j < i has ``s_ij >= threshold``.
3. Every other valid patch is assigned to the kept patch with the largest s (lowest index on a
   tie); a kept one to itself.
4. "merge": a kept token becomes ``sum size_j x_j / sum size_j`` over its members; "drop": it stays
   as it is. In both its size becomes ``sum size_j``.
5. ``K = P + max over the batch of the kept counts``, rounded up to `multiple_of`, at most N. Slots
   hold the kept tokens in ascending order, then padding (token 0, log_size PAD, index 0).
6. `capacity` k: an image that keeps more than k gives up the kept tokens with the largest
   similarity to an earlier kept one (lowest index on a tie; both over the set that step 2 kept)
   until k stay, then step 3 runs. K = P + k always.

"redundancy" replaces step 2: ``r_i = mean of s_ij over the other valid patches``; patches with
``r_i >= threshold`` go. If that is all of them, the one with the smallest r (lowest index on a
tie) stays.
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
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "cover",
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
        log_size: float32[B, N], the natural log of how many patches a token stands for; PAD = -1e4
            in a padding slot.
        threshold: float32[1] or float32[B], the cosine threshold.
        num_prefix_tokens: P, the class, distillation and register tokens.
        selection: "cover" or "redundancy". Default "cover".
        reduction: "merge" or "drop". Default "merge".
        capacity: Patches kept by every image; 0 (default) keeps as many as the images need.
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
    call = (tokens, log_size, threshold, num_prefix_tokens)
    return _reference(*call, selection, reduction, capacity, multiple_of)


def _reference(
    tokens: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    prefix: int,
    selection: str,
    reduction: str,
    capacity: int,
    multiple_of: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator in PyTorch, on any device."""
    _check(tokens, log_size, threshold, prefix, selection, reduction, capacity, multiple_of)
    batch, num_tokens, _ = tokens.shape
    patches = tokens[:, prefix:].float()
    valid = log_size[:, prefix:] > PAD_LOG_SIZE / 2
    limit = threshold.float().view(-1, 1, 1)

    with full_precision(tokens.device):
        similarity = similarities(patches)
        if selection == "cover":
            kept = _greedy_cover(similarity >= limit, valid)
        else:
            kept = _below_mean(similarity, valid, limit[:, :, 0])
    if capacity:
        kept = _give_up(similarity, kept, capacity)
    counts = kept.sum(1)
    num_slots = capacity or _round_up(prefix + int(counts.max()), multiple_of, num_tokens) - prefix

    # Slot of every patch: its own if kept, else that of the most similar kept patch.
    rank = kept.cumsum(1) - 1
    head = similarity.masked_fill(~kept[:, None, :], -torch.inf).argmax(2)
    positions = torch.arange(num_tokens - prefix, device=tokens.device)
    head = torch.where(kept, positions, head)
    slot = torch.where(valid, rank.gather(1, head), -1)

    # The kept patches in ascending order, then (value 0) anything: those slots are padding.
    order = torch.where(kept, num_tokens - positions, 0)
    order, index = order.sort(dim=1, descending=True, stable=True)
    filled, index = order[:, :num_slots] > 0, index[:, :num_slots]
    index = torch.where(filled, index, 0)

    kept_index = torch.cat(
        [
            torch.arange(prefix, device=tokens.device).expand(batch, -1),
            torch.where(filled, index + prefix, 0),
        ],
        1,
    )
    assignment = torch.cat(
        [
            torch.arange(prefix, device=tokens.device).expand(batch, -1),
            torch.where(slot >= 0, slot + prefix, -1),
        ],
        1,
    )
    if kept_index.shape[1] == 0:  # no prefix, and nothing but padding in the whole batch
        return tokens[:, :0].clone(), log_size[:, :0].clone(), kept_index, assignment
    kept_tokens, kept_log_size = reduce_tokens(
        tokens, log_size, kept_index, assignment, reduction, prefix
    )
    return kept_tokens, kept_log_size, kept_index, assignment


def _check(
    tokens: torch.Tensor,
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
    if not 0 <= capacity <= num_tokens - prefix:
        raise ValueError(f"capacity {capacity} is outside [0, {num_tokens - prefix}] patches")
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


def similarities(patches: torch.Tensor) -> torch.Tensor:
    """Step 1: cosine similarities float32[B, M, M] of float32[B, M, D]."""
    norm = torch.linalg.vector_norm(patches, dim=-1, keepdim=True)
    features = patches / norm.clamp_min(NORM_FLOOR)
    return features @ features.transpose(1, 2)


def _greedy_cover(alike: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Step 2 in parallel rounds.

    "Kept iff no earlier kept patch is alike" has one solution, and applying the rule to all
    patches at once, over and over, reaches it: after r rounds every patch whose chain of earlier
    alike patches is shorter than r is settled.
    """
    earlier = alike.tril(-1).float()
    kept = valid
    while True:
        conflict = (earlier @ kept.float().unsqueeze(2)).squeeze(2) > 0.5
        update = valid & ~conflict
        if torch.equal(update, kept):
            return kept
        kept = update


def redundancy(similarity: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Scores float32[B, M] of "redundancy": the mean similarity to the other valid patches."""
    weight = valid.float()
    own = similarity.diagonal(dim1=1, dim2=2)
    total = (similarity @ weight.unsqueeze(2)).squeeze(2) - own
    return total / (weight.sum(1, keepdim=True) - 1).clamp_min(1)


def _below_mean(similarity: torch.Tensor, valid: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Step 2 of "redundancy": keep the valid patches whose mean similarity is below the limit."""
    score = redundancy(similarity, valid)
    kept = valid & ~(score >= limit)  # nothing goes at a threshold that is not a number
    least = score.masked_fill(~valid, torch.inf).argmin(1, keepdim=True)
    positions = torch.arange(valid.shape[1], device=valid.device)
    return kept | ((positions == least) & valid & ~kept.any(1, keepdim=True))


def _give_up(similarity: torch.Tensor, kept: torch.Tensor, capacity: int) -> torch.Tensor:
    """Step 6: of an image's kept patches the most similar to an earlier kept one go first."""
    excess = kept.sum(1, keepdim=True) - capacity
    size = kept.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=kept.device).tril(-1)
    score = similarity.masked_fill(~(before & kept[:, None, :]), -4.0).amax(2)
    order = score.masked_fill(~kept, -8.0).argsort(dim=1, descending=True, stable=True)
    stays = torch.arange(size, device=kept.device) >= excess
    return kept & torch.zeros_like(kept).scatter(1, order, stays.expand_as(order))


def _round_up(value: int, multiple: int, at_most: int) -> int:
    return min(at_most, -(-value // multiple) * multiple)


def reduce_tokens(
    tokens: torch.Tensor,
    log_size: torch.Tensor,
    kept_index: torch.Tensor,
    assignment: torch.Tensor,
    reduction: str,
    prefix: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4, differentiable in `tokens` and `log_size`, with the decisions given.

    A member's weight is ``size_j / sum size``, computed relative to the head of its slot so that
    a token that stands alone comes out bit for bit as it went in. A patch that is assigned to -1
    leaves nothing behind.
    """
    with full_precision(tokens.device):
        wide = torch.promote_types(tokens.dtype, torch.float32)
        slots = torch.arange(kept_index.shape[1], device=tokens.device)
        heads = kept_index.gather(1, assignment.clamp_min(0))
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        folded = (assignment >= 0) & (heads != positions)

        head_log_size = log_size.gather(1, heads)
        relative = torch.where(folded, (log_size - head_log_size).exp(), 0.0)
        member = (assignment[:, None, :] == slots[:, None]) & folded[:, None, :]
        others = (member.float() @ relative.unsqueeze(2)).squeeze(2)

        # A slot is padding when nothing was assigned to it; only patches can be.
        last_slot = assignment.amax(1, keepdim=True).clamp_min(prefix - 1)
        filled = slots <= last_slot
        kept_log_size = torch.where(
            filled, log_size.gather(1, kept_index) + torch.log(1 + others), PAD_LOG_SIZE
        )
        gathered = tokens.gather(1, kept_index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
        if reduction == "merge":
            share = member.to(wide) * (relative.unsqueeze(1) / (1 + others).unsqueeze(2))
            merged = gathered.to(wide) / (1 + others).unsqueeze(2) + share @ tokens.to(wide)
            gathered = merged.to(tokens.dtype)
        return gathered * filled.unsqueeze(2), kept_log_size


@similarity_prune.register_kernel("cuda")
def similarity_prune_on_gpu(
    tokens: torch.Tensor,
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "cover",
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
    call = (tokens, log_size, threshold, num_prefix_tokens)
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
    log_size: torch.Tensor,
    threshold: torch.Tensor,
    num_prefix_tokens: int,
    selection: str = "cover",
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
    tokens, log_size = inputs[:2]
    _, _, kept_index, assignment = output
    ctx.mark_non_differentiable(kept_index, assignment)
    ctx.save_for_backward(tokens, log_size, kept_index, assignment)
    ctx.prefix, ctx.reduction = inputs[3], inputs[5]


def _backward(ctx, grad_tokens, grad_log_size, *_):  # type: ignore[no-untyped-def]
    tokens, log_size, kept_index, assignment = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tokens.detach().requires_grad_(), log_size.detach().requires_grad_()]
        outputs = reduce_tokens(*leaves, kept_index, assignment, ctx.reduction, ctx.prefix)
        grads = torch.autograd.grad(
            outputs, leaves, (grad_tokens, grad_log_size), allow_unused=True
        )
    return (*grads, *(None,) * 8)


similarity_prune.register_autograd(_backward, setup_context=_setup_context)
