"""Were the pruning decisions right? A float64 judge of the operator's definition, in numpy.

An implementation in float32 may decide differently where a similarity lies within float noise of
the threshold or of a rival. So decisions are not compared with one "true" outcome; they are
judged: :func:`violation` is the margin by which the worst of them is wrong. Right decisions have a
violation of the order of float noise (:func:`float_noise`). No decision depends on another (but
which one stays where "redundancy" would take all), so each is judged by itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PAD_LOG_SIZE, PruneConfig

Array = npt.NDArray[Any]


def float_noise(width: int) -> float:
    """Return the noise allowed on a float32 cosine similarity of features [N, width].

    ``4 sqrt(F) 2^-24``: the rounding errors of a dot product of unit vectors add up like a random
    walk of F steps of one unit roundoff; 4 is the margin. 4.7e-6 at F = 384.
    """
    return 4 * math.sqrt(width) * 2.0**-24


def unit_features(features: Array, prefix: int) -> Array:
    """Return step 1's f, float64[M, F], of the patches among features [N, F]."""
    patches = np.asarray(features[prefix:], np.float64)
    norm = np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    # in float32 the square of such a norm is infinite, and step 1 gives x / inf = 0
    return np.where(norm**2 > np.finfo(np.float32).max, 0.0, patches / norm)


def similarity_matrix(features: Array, prefix: int) -> Array:
    """Return the cosine similarities float64[M, M] of the patches among features [N, F]."""
    unit = unit_features(features, prefix)
    return np.asarray(unit @ unit.T)


def compared_similarities(features: Array, prefix: int, selection: str) -> Array:
    """Return those that decide, float64: of "pairs" even patches by odd ones, else [M, M]."""
    unit = unit_features(features, prefix)
    return np.asarray(unit[::2] @ unit[1::2].T if selection == "pairs" else unit @ unit.T)


def broken_structure(record: PruneRecord, prefix: int, selection: str | None = None) -> str | None:
    """Return what is wrong with indices and slots, which no float noise excuses, or None.

    Without `selection` only what holds for every one is looked at.
    """
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
    if selection == "pairs":
        head = _heads_of_patches(record, prefix)
        numbers = np.arange(len(head))
        gone = valid[prefix:] & (head != numbers)
        if (numbers[gone] % 2 == 1).any():
            return "a patch with an odd number went"
        if (head[gone] % 2 == 0).any():
            return "a patch went to one with an even number"
    return None


def _heads_of_patches(record: PruneRecord, prefix: int) -> Array:
    """Return int64[M], the patch that heads the slot of every patch (padding: of any)."""
    slots = np.maximum(record.assignment[prefix:], 0)
    return np.asarray(record.kept_index[slots] - prefix)


def has_finite_features(record: PruneRecord) -> bool:
    """Whether no feature holds NaN or infinity, beside padding's; True where they are not known."""
    if record.features is None:
        return True
    valid = record.log_size > PAD_LOG_SIZE / 2
    return bool(np.isfinite(record.features[valid]).all())


def kept_at_threshold(record: PruneRecord, config: PruneConfig, prefix: int) -> int:
    """Return how many of the patches that a layer read would stay at the record's threshold.

    Of a layer with a fixed capacity it is what the capacity overrules. `prefix` is the number of
    prefix tokens; the record has its features.
    """
    valid = record.log_size[prefix:] > PAD_LOG_SIZE / 2
    unit = unit_features(record.features, prefix)
    if config.selection == "pairs":
        if not valid[1::2].any():
            return int(valid.sum())
        best = np.where(valid[1::2], unit[::2] @ unit[1::2].T, -np.inf).max(1)
        return int(valid.sum() - (valid[::2] & (best >= record.threshold)).sum())
    stays = valid & (_redundancy(unit, valid) < record.threshold)
    return max(int(stays.sum()), int(valid.any()))


def violation(record: PruneRecord, config: PruneConfig, capacity: int, prefix: int) -> float:
    """Return the margin by which the decisions are wrong (inf: they can never be right).

    That of a patch that went is the larger of what its similarity lacks to the threshold and what
    the one it went to lacks to the best; of one that stayed, what it has above the threshold. With
    a capacity the two sides are held to each other instead of the threshold. Never right is a
    feature that holds NaN or infinity, too: it has no similarities. `capacity` is the layer's
    attribute (0: dynamic), `prefix` the number of prefix tokens.
    """
    if broken_structure(record, prefix, config.selection) or not has_finite_features(record):
        return math.inf
    valid = record.log_size[prefix:] > PAD_LOG_SIZE / 2
    if not valid.any():
        return 0.0
    head = _heads_of_patches(record, prefix)
    gone = valid & (head != np.arange(len(head)))
    if capacity and gone.sum() != max(valid.sum() - capacity, 0):
        return math.inf
    unit = unit_features(record.features, prefix)
    judge = _judge_pairs if config.selection == "pairs" else _judge_redundancy
    return max(0.0, judge(unit, valid, gone, head, record.threshold, capacity))


def _judge_pairs(
    unit: Array, valid: Array, gone: Array, head: Array, threshold: float, capacity: int
) -> float:
    if not valid[1::2].any():
        return 0.0  # nobody to go to, and nobody went
    similarity = np.where(valid[1::2], unit[::2] @ unit[1::2].T, -np.inf)
    best, went = similarity.max(1), gone[::2]
    chosen = similarity[went, (head[::2][went] - 1) // 2]
    detour = (best[went] - chosen).max(initial=0.0)
    return float(max(detour, _judge_choice(best, went, valid[::2] & ~went, threshold, capacity)))


def _judge_redundancy(
    unit: Array, valid: Array, gone: Array, head: Array, threshold: float, capacity: int
) -> float:
    score = _redundancy(unit, valid)
    stayed = valid & ~gone
    wrong = _judge_choice(score, gone, stayed, threshold, capacity)
    if not capacity and stayed.sum() == 1:
        # the one that stays when all would go: as far as it is from being the least redundant
        saved = score[stayed][0] - score[valid].min()
        lacking = _judge_choice(score, gone, np.zeros_like(stayed), threshold, capacity)
        wrong = min(wrong, max(saved, lacking))
    similarity = unit[gone] @ unit[stayed].T
    chosen = (unit[gone] * unit[head[gone]]).sum(1)
    return float(max(wrong, (similarity.max(1) - chosen).max(initial=0.0)))


def _redundancy(unit: Array, valid: Array) -> Array:
    """Return the mean similarity float64[M] of every patch to the other valid ones."""
    total, others = unit[valid].sum(0), max(int(valid.sum()) - 1, 1)
    return np.asarray(((total - unit) * unit).sum(1) / others)


def _judge_choice(
    score: Array, gone: Array, stayed: Array, threshold: float, capacity: int
) -> float:
    """Judge who went by the scores: those at the threshold, or with a capacity the highest."""
    if not gone.any() and (capacity or math.isnan(threshold)):
        return 0.0
    if capacity:
        return float(score[stayed].max(initial=-np.inf) - score[gone].min())
    if math.isnan(threshold):  # nothing reaches it
        return math.inf
    lacking = (threshold - score[gone]).max(initial=-np.inf)
    return float(max(lacking, (score[stayed] - threshold).max(initial=-np.inf)))
