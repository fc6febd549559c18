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
SELECTIONS = ("pairs", "redundancy")
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
    """The operator's inputs (float32) and attributes. Without features the tokens are compared."""

    tokens: Array
    log_size: Array
    threshold: Array
    prefix: int
    selection: str = "pairs"
    reduction: str = "merge"
    capacity: int = 0
    multiple_of: int = 1
    features: Array | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        return {
            "num_prefix_tokens": self.prefix,
            "selection": self.selection,
            "reduction": self.reduction,
            "capacity": self.capacity,
            "multiple_of": self.multiple_of,
        }

    @property
    def compared(self) -> Array:
        """What is compared: float32[B, N, F]."""
        return self.tokens if self.features is None else self.features

    def image(self, index: int) -> Case:
        """The same image in a batch of its own."""
        one = slice(index, index + 1)
        return dataclasses.replace(
            self,
            tokens=self.tokens[one],
            features=None if self.features is None else self.features[one],
            log_size=self.log_size[one],
            threshold=self.threshold if len(self.threshold) == 1 else self.threshold[one],
        )

    def expected(self) -> Result:
        """What the definition says."""
        return similarity_prune(self)


def similarity_prune(case: Case) -> Result:
    """Steps 1 to 7 of the definition, for a batch."""
    prefix, num_tokens = case.prefix, case.tokens.shape[1]
    least, most = capacities_of(num_tokens - prefix, case.selection)
    assert case.capacity == 0 or least <= case.capacity <= most
    choose = pairs if case.selection == "pairs" else redundancy
    valid_sets: list[list[int]] = []
    gone_sets: list[dict[int, int]] = []
    for image in range(len(case.tokens)):
        limit = case.threshold[image] if len(case.threshold) > 1 else case.threshold[0]
        unit = unit_features(case.compared[image, prefix:])
        valid = [i for i in range(len(unit)) if case.log_size[image, prefix + i] > PAD / 2]
        valid_sets.append(valid)
        gone_sets.append(choose(unit, valid, np.float32(limit), case.capacity))
    kept_sets = [
        [i for i in valid if i not in gone]
        for valid, gone in zip(valid_sets, gone_sets, strict=True)
    ]

    if case.capacity:
        num_slots = prefix + case.capacity
    else:
        num_slots = prefix + max(len(kept) for kept in kept_sets)
        while num_slots % case.multiple_of and num_slots < num_tokens:
            num_slots += 1

    kept_index = np.zeros((len(case.tokens), num_slots), np.int64)
    assignment = np.full(case.log_size.shape, -1, np.int64)
    kept_index[:, :prefix] = assignment[:, :prefix] = np.arange(prefix)
    for image, (kept, gone) in enumerate(zip(kept_sets, gone_sets, strict=True)):
        for slot, patch in enumerate(kept):
            kept_index[image, prefix + slot] = prefix + patch
            assignment[image, prefix + patch] = prefix + slot
        for patch, head in gone.items():
            assignment[image, prefix + patch] = prefix + kept.index(head)
    return reduce_tokens(case.tokens, case.log_size, kept_index, assignment, case.reduction, prefix)


def capacities_of(patches: int, selection: str) -> tuple[int, int]:
    """The smallest and the largest capacity that the definition has for that many patches."""
    return (max(1, patches // 2) if selection == "pairs" else 1), patches


def unit_features(features: Array) -> Array:
    """Step 1's f, in float32."""
    features = features.astype(np.float32)
    unit = np.zeros_like(features)
    for i in range(len(features)):
        norm = np.float32(math.sqrt(sum(float(x) ** 2 for x in features[i].tolist())))
        unit[i] = features[i] / np.maximum(norm, np.float32(1e-12))
    return unit


def alike(unit: Array, i: int, j: int) -> np.float32:
    """Step 1's s_ij, in float32."""
    return np.float32((unit[i] * unit[j]).sum(dtype=np.float32))


def similarity_of(features: Array) -> Array:
    """Step 1's s of all, in float32."""
    unit, count = unit_features(features), len(features)
    similarity = np.zeros((count, count), np.float32)
    for i in range(count):
        for j in range(count):
            similarity[i, j] = alike(unit, i, j)
    return similarity


def pairs(unit: Array, valid: list[int], limit: np.float32, capacity: int) -> dict[int, int]:
    """Steps 2, 3 and 6: the patches that go, and the patch that each goes to."""
    partner: dict[int, int] = {}
    likeness: dict[int, np.float32] = {}
    for i in valid:
        if i % 2 == 1:
            continue
        for j in valid:
            if j % 2 == 1:
                s = alike(unit, i, j)
                if i not in partner or s > likeness[i]:
                    partner[i], likeness[i] = j, s
    if capacity:
        going = most_alike_first(likeness)[: max(0, len(valid) - capacity)]
    else:
        going = [i for i in partner if likeness[i] >= limit]
    return {i: partner[i] for i in going}


def redundancy(unit: Array, valid: list[int], limit: np.float32, capacity: int) -> dict[int, int]:
    """Step 7: the patches that go, and the patch that each goes to."""
    score: dict[int, np.float32] = {}
    for i in valid:
        total = np.float32(0)
        for j in valid:
            if j != i:
                total += alike(unit, i, j)
        score[i] = total / np.float32(max(len(valid) - 1, 1))
    if capacity:
        going = most_alike_first(score)[: max(0, len(valid) - capacity)]
    else:
        going = [i for i in valid if score[i] >= limit]
        if going == valid and valid:
            going.remove(min(valid, key=lambda i: (score[i], i)))
    staying = [i for i in valid if i not in going]
    head: dict[int, int] = {}
    for i in going:
        head[i] = staying[0]
        for j in staying:
            if alike(unit, i, j) > alike(unit, i, head[i]):
                head[i] = j
    return head


def most_alike_first(score: dict[int, np.float32]) -> list[int]:
    """Patches by their score, the largest first, the lower number first on a tie."""
    return sorted(score, key=lambda i: (-score[i], i))


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

    `padding` is "none", "tail" (as an earlier layer leaves it), "all" (some images hold nothing
    else), or "mixed", any of these by image. "holes" (anywhere) is outside the definition: for
    tests of what must hold even so.
    """
    if padding not in ("none", "tail", "all", "mixed", "holes"):
        raise ValueError(f"padding {padding!r}")
    number = np.ones if sizes == "ones" else lambda shape: rng.integers(1, 10, shape)
    log_size = np.log(number((batch, prefix + patches))).astype(np.float32)
    log_size[:, :prefix] = 0
    for image in range(batch):
        how = padding
        if padding == "mixed":
            how = str(rng.choice(["none", "tail", "tail", "all"]))
        if how == "tail":
            log_size[image, prefix + int(rng.integers(patches + 1)) :] = PAD
        elif how == "holes":
            log_size[image, prefix + np.flatnonzero(rng.random(patches) < 0.3)] = PAD
        elif how == "all" and (padding == "mixed" or image % 2 == 0):
            log_size[image, prefix:] = PAD
    if prefix == 0 and (log_size <= PAD / 2).all():
        log_size[0, 0] = 0
    return log_size


def fitting(capacity: int, patches: int, selection: str) -> int:
    """The capacity that the definition has and that is nearest to a wished one; 0 stays 0."""
    least, most = capacities_of(patches, selection)
    return min(max(capacity, least), most) if capacity else 0


def thresholds(drawn: Array, batch: int, per_image: bool, given: float | None) -> Array:
    """float32[B] or [1]: the given one for all, else as drawn."""
    count = batch if per_image else 1
    return np.asarray(drawn[:count] if given is None else np.full(count, given), np.float32)


def exact_case(
    seed: int,
    batch: int = 2,
    patches: int = 12,
    prefix: int = 1,
    selection: str = "pairs",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    sizes: str = "several",
    padding: str = "mixed",
    per_image_threshold: bool = True,
    threshold: float | None = None,
    dim: int = 16,
    feature_dim: int | None = None,
) -> Case:
    """A batch of images on which float32 is exact; without `threshold` one that may tie is drawn.

    Without `feature_dim` the tokens are compared, else features of that width. Padding slots hold
    zeros or, which must not matter, anything. Without a prefix one patch of the batch at least is
    valid. A capacity that the definition does not have becomes the nearest that it has.
    """
    rng = np.random.default_rng(seed)
    tokens = np.stack([exact_image(rng, prefix + patches, dim) for _ in range(batch)])
    features = None
    if feature_dim is not None:
        features = np.stack([exact_image(rng, prefix + patches, feature_dim) for _ in range(batch)])
    log_size = sizes_and_padding(rng, batch, patches, prefix, sizes, padding)
    if rng.random() < 0.5:
        tokens[log_size <= PAD / 2] = 0
    limits = thresholds(rng.choice(EXACT_THRESHOLDS, batch), batch, per_image_threshold, threshold)
    return Case(
        tokens,
        log_size,
        limits,
        prefix,
        selection,
        reduction,
        fitting(capacity, patches, selection),
        multiple_of,
        features,
    )


def random_case(
    seed: int,
    batch: int = 2,
    patches: int = 20,
    prefix: int = 1,
    selection: str = "pairs",
    reduction: str = "merge",
    capacity: int = 0,
    multiple_of: int = 1,
    padding: str = "mixed",
    spread: float = 0.6,
    per_image_threshold: bool = True,
    threshold: float | None = None,
    dim: int = 24,
    feature_dim: int | None = None,
) -> Case:
    """A batch of Gaussian patches around a few centres, `spread` apart, of any length.

    Without `feature_dim` the tokens are compared, else features of that width. A capacity that the
    definition does not have becomes the nearest that it has.
    """
    rng = np.random.default_rng(seed)
    shape = (batch, prefix + patches)
    tokens = gaussian_images(rng, *shape, dim, spread)
    features = None
    if feature_dim is not None:
        features = gaussian_images(rng, *shape, feature_dim, spread)
    log_size = sizes_and_padding(rng, batch, patches, prefix, "several", padding)
    tokens[log_size <= PAD / 2] = 0
    limits = thresholds(rng.uniform(-0.2, 1.05, batch), batch, per_image_threshold, threshold)
    return Case(
        tokens,
        log_size,
        limits,
        prefix,
        selection,
        reduction,
        fitting(capacity, patches, selection),
        multiple_of,
        features,
    )


def gaussian_images(
    rng: np.random.Generator, batch: int, count: int, dim: int, spread: float
) -> Array:
    """float32[B, count, dim]: vectors around a few centres, `spread` apart, of any length."""
    num_centres = 1 + int(rng.integers(count))
    centres = rng.standard_normal((batch, num_centres, dim))
    chosen = rng.integers(num_centres, size=(batch, count))
    vectors = np.take_along_axis(centres, chosen[:, :, None], 1)
    vectors = vectors + spread * rng.standard_normal(vectors.shape)
    vectors *= np.exp(rng.standard_normal((batch, count, 1)))
    return np.asarray(vectors, np.float32)
