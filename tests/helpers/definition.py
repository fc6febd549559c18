"""The operator's written definition, step by step, slow and literal; and data to hold others to it.

Nothing here is shared with the implementations: no torch, no ONNX, one loop for every sentence.
:func:`exact_case` makes data on which float32 is exact: a patch has 1, 4 or 16 entries of the same
power of two, so its norm is a power of two, its feature's entries are too, and every similarity and
every sum of them has few bits. On such data there is no float noise to hide behind: each decision,
ties included, must be equal.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PAD = -1e4
SELECTIONS = ("cover", "redundancy")
REDUCTIONS = ("merge", "drop")
EXACT_THRESHOLDS = (-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class Result:
    """The operator's outputs; tokens and log-sizes in float64."""

    kept_tokens: Array
    kept_log_size: Array
    kept_index: Array
    assignment: Array


@dataclasses.dataclass(frozen=True)
class Case:
    """The operator's inputs (float32) and attributes."""

    tokens: Array
    log_size: Array
    threshold: Array
    prefix: int
    selection: str = "cover"
    reduction: str = "merge"
    capacity: int = 0
    multiple_of: int = 1

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_prefix_tokens": self.prefix,
            "selection": self.selection,
            "reduction": self.reduction,
            "capacity": self.capacity,
            "multiple_of": self.multiple_of,
        }

    def image(self, index: int) -> Case:
        """The same image in a batch of its own."""
        one = slice(index, index + 1)
        limit = self.threshold if len(self.threshold) == 1 else self.threshold[one]
        return dataclasses.replace(
            self, tokens=self.tokens[one], log_size=self.log_size[one], threshold=limit
        )

    def expected(self) -> Result:
        """What the definition says."""
        return similarity_prune(self)


def similarity_prune(case: Case) -> Result:
    """Steps 1 to 6 of the definition, for a batch."""
    prefix, num_tokens = case.prefix, case.tokens.shape[1]
    valid_sets: list[list[int]] = []
    kept_sets: list[list[int]] = []
    similarities: list[Array] = []
    for image in range(len(case.tokens)):
        limit = case.threshold[image] if len(case.threshold) > 1 else case.threshold[0]
        patches = case.tokens[image, prefix:]
        similarity = similarity_of(patches)
        valid = [i for i in range(len(patches)) if case.log_size[image, prefix + i] > PAD / 2]
        choose = cover if case.selection == "cover" else redundancy
        kept = choose(similarity, valid, np.float32(limit))
        if case.capacity:
            kept = give_up(similarity, kept, case.capacity)
        valid_sets.append(valid)
        kept_sets.append(kept)
        similarities.append(similarity)

    if case.capacity:
        num_slots = prefix + case.capacity
    else:
        num_slots = prefix + max(len(kept) for kept in kept_sets)
        while num_slots % case.multiple_of and num_slots < num_tokens:
            num_slots += 1

    kept_index = np.zeros((len(case.tokens), num_slots), np.int64)
    assignment = np.full(case.log_size.shape, -1, np.int64)
    kept_index[:, :prefix] = assignment[:, :prefix] = np.arange(prefix)
    for image, (valid, kept) in enumerate(zip(valid_sets, kept_sets, strict=True)):
        for slot, patch in enumerate(kept):
            kept_index[image, prefix + slot] = prefix + patch
        for patch in valid:
            head = patch if patch in kept else most_similar(similarities[image], patch, kept)
            assignment[image, prefix + patch] = prefix + kept.index(head)
    return reduce_tokens(case.tokens, case.log_size, kept_index, assignment, case.reduction, prefix)


def similarity_of(patches: Array) -> Array:
    """Step 1, in float32."""
    patches = patches.astype(np.float32)
    count = len(patches)
    features = np.zeros_like(patches)
    for i in range(count):
        norm = np.float32(math.sqrt(sum(float(x) ** 2 for x in patches[i])))
        features[i] = patches[i] / np.maximum(norm, np.float32(1e-12))
    similarity = np.zeros((count, count), np.float32)
    for i in range(count):
        for j in range(count):
            similarity[i, j] = (features[i] * features[j]).sum(dtype=np.float32)
    return similarity


def cover(similarity: Array, valid: list[int], limit: np.float32) -> list[int]:
    """Step 2."""
    kept: list[int] = []
    for i in valid:
        if not any(similarity[i, j] >= limit for j in kept):
            kept.append(i)
    return kept


def redundancy(similarity: Array, valid: list[int], limit: np.float32) -> list[int]:
    """Step 2 of "redundancy"."""
    score: dict[int, np.float32] = {}
    for i in valid:
        total = np.float32(0)
        for j in valid:
            if j != i:
                total += similarity[i, j]
        score[i] = total / np.float32(max(len(valid) - 1, 1))
    kept = [i for i in valid if not score[i] >= limit]
    if not kept and valid:
        kept = [min(valid, key=lambda i: (score[i], i))]
    return kept


def most_similar(similarity: Array, patch: int, kept: list[int]) -> int:
    """Step 3: the kept patch with the largest similarity, the lowest index on a tie."""
    best = kept[0]
    for j in kept:
        if similarity[patch, j] > similarity[patch, best]:
            best = j
    return best


def give_up(similarity: Array, kept: list[int], capacity: int) -> list[int]:
    """Step 6."""
    closest = {
        i: max((similarity[i, j] for j in kept if j < i), default=np.float32(-np.inf)) for i in kept
    }
    staying = list(kept)
    while len(staying) > capacity:
        leaver = staying[0]
        for i in staying:
            if closest[i] > closest[leaver]:
                leaver = i
        staying.remove(leaver)
    return staying


def reduce_tokens(
    tokens: Array,
    log_size: Array,
    kept_index: Array,
    assignment: Array,
    reduction: str,
    prefix: int,
) -> Result:
    """Step 4 and the padding of step 5, in float64, for decisions that are given."""
    batch, num_slots = kept_index.shape
    kept_tokens = np.zeros((batch, num_slots, tokens.shape[2]))
    kept_log_size = np.full((batch, num_slots), PAD)
    for image in range(batch):
        for slot in range(num_slots):
            members = np.flatnonzero(assignment[image] == slot)
            if not len(members):
                continue
            if slot < prefix:
                kept_tokens[image, slot] = tokens[image, slot]
                kept_log_size[image, slot] = log_size[image, slot]
                continue
            sizes = np.exp(log_size[image, members].astype(np.float64))
            kept_log_size[image, slot] = math.log(sizes.sum())
            values = tokens[image, members].astype(np.float64)
            if reduction == "merge":
                kept_tokens[image, slot] = (sizes[:, None] * values).sum(0) / sizes.sum()
            else:
                kept_tokens[image, slot] = tokens[image, kept_index[image, slot]]
    return Result(kept_tokens, kept_log_size, kept_index, assignment)


def exact_patch(rng: np.random.Generator, dim: int) -> Array:
    """One patch with 1, 4 or 16 equal entries, as long as a power of two."""
    counts = [count for count in (1, 4, 16) if count <= dim]
    count = int(rng.choice(counts))
    patch = np.zeros(dim, np.float32)
    patch[rng.choice(dim, count, replace=False)] = rng.choice([-1.0, 1.0], count)
    return patch


def flip_some(rng: np.random.Generator, patch: Array) -> Array:
    """The patch with the signs of a few entries turned: similar to it, by a known amount."""
    flips = np.where(rng.random(len(patch)) < 0.15, -1, 1)
    return (patch * flips).astype(np.float32)


def exact_image(rng: np.random.Generator, patches: int, dim: int) -> Array:
    """Patches around a few others, with duplicates, opposites and zero vectors among them."""
    kind = rng.choice(["mixed", "few", "unlike", "same", "zero", "opposite"], p=[0.5, *[0.1] * 5])
    if kind == "zero":
        return np.zeros((patches, dim), np.float32)
    num_centres = {"mixed": 1 + patches // 3, "few": 2, "same": 1, "opposite": 1}.get(kind, patches)
    centres = [exact_patch(rng, dim) for _ in range(num_centres)]
    image = np.stack([centres[rng.integers(num_centres)] for _ in range(patches)])
    if kind in ("mixed", "few"):
        image = np.stack([flip_some(rng, patch) for patch in image])
        image[rng.random(patches) < 0.1] = 0
    if kind == "opposite":
        image *= rng.choice([-1.0, 1.0], (patches, 1)).astype(np.float32)
    return (image * 2.0 ** rng.integers(-3, 1, (patches, 1))).astype(np.float32)


def sizes_and_padding(
    rng: np.random.Generator, batch: int, patches: int, prefix: int, sizes: str, padding: str
) -> Array:
    """log_size float32[B, P + M]: of ones or of small numbers, with padding or without.

    `padding` is "none", "tail" (as an earlier layer leaves it), "holes" (anywhere), "all" (some
    images hold nothing else), or "mixed", any of these by image.
    """
    number = np.ones if sizes == "ones" else lambda shape: rng.integers(1, 10, shape)
    log_size = np.log(number((batch, prefix + patches))).astype(np.float32)
    log_size[:, :prefix] = 0
    for image in range(batch):
        how = padding
        if padding == "mixed":
            how = str(rng.choice(["none", "tail", "holes", "all"]))
        if how == "tail":
            log_size[image, prefix + int(rng.integers(patches + 1)) :] = PAD
        elif how == "holes":
            holes = np.flatnonzero(rng.random(patches) < 0.3)
            log_size[image, prefix + holes] = PAD
        elif how == "all" and (padding == "mixed" or image % 2 == 0):
            log_size[image, prefix:] = PAD
    return log_size


def exact_case(
    seed: int,
    batch: int = 2,
    patches: int = 12,
    prefix: int = 1,
    selection: str = "cover",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    sizes: str = "several",
    padding: str = "mixed",
    per_image_threshold: bool = True,
    threshold: float | None = None,
    dim: int = 16,
) -> Case:
    """A batch of images on which float32 is exact; without `threshold` one that may tie is drawn.

    Padding slots hold zeros or, which must not matter, anything. Without a prefix one patch of the
    batch at least is valid.
    """
    rng = np.random.default_rng(seed)
    tokens = np.stack([exact_image(rng, prefix + patches, dim) for _ in range(batch)])
    log_size = sizes_and_padding(rng, batch, patches, prefix, sizes, padding)
    if prefix == 0 and (log_size <= PAD / 2).all():
        log_size[0, 0] = 0
    if rng.random() < 0.5:
        tokens[log_size <= PAD / 2] = 0
    if threshold is None:
        limits = rng.choice(EXACT_THRESHOLDS, batch if per_image_threshold else 1)
    else:
        limits = np.full(batch if per_image_threshold else 1, threshold)
    return Case(
        tokens,
        log_size,
        limits.astype(np.float32),
        prefix,
        selection,
        reduction,
        min(capacity, patches),
        multiple_of,
    )


def random_case(
    seed: int,
    batch: int = 2,
    patches: int = 20,
    prefix: int = 1,
    selection: str = "cover",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    padding: str = "mixed",
    spread: float = 0.6,
    per_image_threshold: bool = True,
    threshold: float | None = None,
    dim: int = 24,
) -> Case:
    """A batch of Gaussian patches around a few centres, `spread` apart, of any length."""
    rng = np.random.default_rng(seed)
    num_centres = 1 + int(rng.integers(patches))
    centres = rng.standard_normal((batch, num_centres, dim))
    chosen = rng.integers(num_centres, size=(batch, prefix + patches))
    tokens = np.take_along_axis(centres, chosen[:, :, None], 1)
    tokens = tokens + spread * rng.standard_normal(tokens.shape)
    tokens *= np.exp(rng.standard_normal((batch, prefix + patches, 1)))
    log_size = sizes_and_padding(rng, batch, patches, prefix, "several", padding)
    if prefix == 0 and (log_size <= PAD / 2).all():
        log_size[0, 0] = 0
    tokens[log_size <= PAD / 2] = 0
    if threshold is None:
        limits = rng.uniform(-0.2, 1.05, batch if per_image_threshold else 1)
    else:
        limits = np.full(batch if per_image_threshold else 1, threshold)
    return Case(
        tokens.astype(np.float32),
        log_size,
        limits.astype(np.float32),
        prefix,
        selection,
        reduction,
        min(capacity, patches),
        multiple_of,
    )
