"""Were the pruning decisions right? A float64 judge of the operator's definition, in numpy.

An implementation in float32 may decide differently where a similarity lies within float noise of
the threshold or of a rival. So decisions are not compared with one "true" outcome; they are
judged: :func:`violation` is the smallest change of any similarity under which the decisions are
exactly what the definition says. Right decisions have a violation of the order of float noise
(:func:`float_noise`); a wrong one has the margin by which it is wrong.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PAD_LOG_SIZE, PruneConfig

Array = npt.NDArray[Any]


def float_noise(embed_dim: int) -> float:
    """Return the noise allowed on a float32 cosine similarity of D-dimensional tokens.

    ``4 sqrt(D) 2^-24``: the rounding errors of a dot product of unit vectors add up like a random
    walk of D steps of one unit roundoff; 4 is the margin. 4.7e-6 at D = 384.
    """
    return 4 * math.sqrt(embed_dim) * 2.0**-24


def similarity_matrix(tokens: Array, prefix: int) -> Array:
    """Return the cosine similarities float64[M, M] of the patches among tokens [N, D]."""
    patches = np.asarray(tokens[prefix:], np.float64)
    norm = np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    # in float32 the square of such a norm is infinite, and step 1 gives x / inf = 0
    features = np.where(norm**2 > np.finfo(np.float32).max, 0.0, patches / norm)
    return np.asarray(features @ features.T)


def broken_structure(record: PruneRecord, prefix: int) -> str | None:
    """Return what is wrong with indices and slots, which no float noise excuses, or None."""
    valid = record.log_size > PAD_LOG_SIZE / 2
    assignment, kept_index = record.assignment, record.kept_index
    present = valid | (np.arange(len(valid)) < prefix)
    if not np.array_equal(assignment >= 0, present) or (assignment[~present] != -1).any():
        return "assignment is -1 elsewhere than at padding, or something else there"
    if valid[prefix:].any() and len(record.heads()) <= prefix:
        return "no patch was kept"
    if (assignment[prefix:][present[prefix:]] < prefix).any():
        return "a patch is assigned to a prefix token"
    if assignment.max() >= len(kept_index):
        return "a token is assigned to a slot that does not exist"
    heads = record.heads()
    if not np.array_equal(heads[:prefix], np.arange(prefix)):
        return "the prefix tokens moved"
    if (np.diff(heads) <= 0).any():
        return "the kept tokens are not in ascending order"
    if not np.array_equal(assignment[heads], np.arange(len(heads))):
        return "a kept token is not assigned to its own slot"
    if kept_index[len(heads) :].any():
        return "a padding slot has an index"
    return None


def has_finite_tokens(record: PruneRecord) -> bool:
    """Whether no token holds NaN or infinity, beside padding; True where tokens are not known."""
    if record.tokens is None:
        return True
    valid = record.log_size > PAD_LOG_SIZE / 2
    return bool(np.isfinite(record.tokens[valid]).all())


def violation(record: PruneRecord, config: PruneConfig, capacity: int, prefix: int) -> float:
    """Return by how much similarities must change for the decisions to be right (inf: never).

    Never, too, where a token holds NaN or infinity: it has no similarities. `capacity` is the
    layer's attribute (0: dynamic), `prefix` the number of prefix tokens.
    """
    if broken_structure(record, prefix) or not has_finite_tokens(record):
        return math.inf
    valid = record.log_size[prefix:] > PAD_LOG_SIZE / 2
    if not valid.any():
        return 0.0
    similarity = similarity_matrix(record.tokens, prefix)
    kept = np.zeros(len(valid), bool)
    kept[record.heads()[prefix:] - prefix] = True
    if capacity and kept.sum() > capacity:
        return math.inf
    may_have_given_up = bool(capacity) and kept.sum() == capacity
    if config.selection == "cover":
        worst, before_give_up = _judge_cover(
            similarity, valid, kept, record.threshold, may_have_given_up
        )
    else:
        worst, before_give_up = _judge_redundancy(
            similarity, valid, kept, record.threshold, may_have_given_up
        )
    worst = max(worst, _judge_give_up(similarity, kept, before_give_up))
    heads = record.heads()[record.assignment[prefix:]] - prefix
    return max(worst, _judge_assignment(similarity, valid, kept, heads))


def _closest_before(similarity: Array, kept: Array) -> Array:
    """Return every patch's largest similarity to an earlier kept one (-inf: there is none)."""
    earlier = np.tri(len(kept), k=-1, dtype=bool) & kept
    return np.where(earlier, similarity, -np.inf).max(1)


def _judge_cover(
    similarity: Array, valid: Array, kept: Array, threshold: float, may_have_given_up: bool
) -> tuple[float, Array]:
    """Judge step 2 of "cover"; also return the set it kept, before step 6 took some away."""
    if may_have_given_up:
        kept = _cover_around(similarity, valid, kept, threshold)
    closest = _closest_before(similarity, kept)
    too_close = (closest - threshold)[kept]
    too_far = (threshold - closest)[valid & ~kept]
    return float(max(0.0, too_close.max(initial=0.0), too_far.max(initial=0.0))), kept


def _cover_around(similarity: Array, valid: Array, kept: Array, threshold: float) -> Array:
    """Return the greedy cover in which the patches of `kept` are kept whatever they resemble."""
    result = np.zeros_like(kept)
    for i in np.flatnonzero(valid):
        result[i] = kept[i] or not (similarity[i, :i][result[:i]] >= threshold).any()
    return result


def _judge_redundancy(
    similarity: Array, valid: Array, kept: Array, threshold: float, may_have_given_up: bool
) -> tuple[float, Array]:
    others = max(int(valid.sum()) - 1, 1)
    score = (similarity[:, valid].sum(1) - np.where(valid, similarity.diagonal(), 0)) / others
    if may_have_given_up:
        kept = kept | (valid & (score < threshold))
    wrongly_gone = (threshold - score)[valid & ~kept].max(initial=0.0)
    wrongly_kept = (score - threshold)[kept].max(initial=0.0)
    if kept.sum() == 1:
        # the one that stays when all would go: as far as it is from being the least redundant
        saved = max(score[kept][0] - score[valid].min(), 0.0)
        wrongly_kept = min(wrongly_kept, saved)
    return float(max(0.0, wrongly_gone, wrongly_kept)), kept


def _judge_give_up(similarity: Array, kept: Array, before: Array) -> float:
    """Judge step 6: whoever left resembles an earlier kept patch more than whoever stayed."""
    left = before & ~kept
    if not left.any():
        return 0.0
    closest = _closest_before(similarity, before)
    return float(max(0.0, closest[kept].max() - closest[left].min()))


def _judge_assignment(similarity: Array, valid: Array, kept: Array, heads: Array) -> float:
    """Judge step 3: every pruned patch went to the kept patch most like it."""
    pruned = np.flatnonzero(valid & ~kept)
    if not pruned.size:
        return 0.0
    chosen = similarity[pruned, heads[pruned]]
    best = similarity[np.ix_(pruned, np.flatnonzero(kept))].max(1)
    return float(max(0.0, (best - chosen).max()))
