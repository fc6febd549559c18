"""The PyTorch operator against the written definition, and against what the definition promises."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from definition import (
    EXACT_THRESHOLDS,
    PAD,
    REDUCTIONS,
    SELECTIONS,
    Array,
    Case,
    Result,
    exact_case,
    random_case,
    reduce_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from simprune_deploy.pruning.operator import similarity_prune

REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
PADDINGS = ("none", "tail", "holes", "all", "mixed")

ATTRIBUTES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "batch": st.integers(1, 4),
        "patches": st.integers(1, 20),
        "prefix": st.integers(0, 5),
        "selection": st.sampled_from(SELECTIONS),
        "reduction": st.sampled_from(REDUCTIONS),
        "capacity": st.one_of(st.just(0), st.integers(1, 20)),
        "multiple_of": st.sampled_from([1, 1, 2, 3, 4, 8, 64]),
        "padding": st.sampled_from(PADDINGS),
        "per_image_threshold": st.booleans(),
    }
)
EXACT_CASES = st.builds(
    lambda attributes, sizes: exact_case(sizes=sizes, **attributes),
    ATTRIBUTES,
    st.sampled_from(["ones", "several"]),
)
RANDOM_CASES = st.builds(
    lambda attributes, spread: random_case(spread=spread, **attributes),
    ATTRIBUTES,
    st.sampled_from([0.0, 0.1, 0.4, 1.0]),
)


def tensors(
    case: Case, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(case.tokens).to(dtype),
        torch.from_numpy(case.log_size),
        torch.from_numpy(case.threshold),
    )


def run(case: Case, dtype: torch.dtype = torch.float32) -> Result:
    """The operator's result; kept tokens in float64."""
    outputs = similarity_prune(*tensors(case, dtype), **case.attributes)
    assert [output.dtype for output in outputs] == [
        dtype,
        torch.float32,
        torch.int64,
        torch.int64,
    ]
    kept_tokens, *others = outputs
    return Result(kept_tokens.double().numpy(), *(output.numpy() for output in others))


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The case with its tokens as `dtype` holds them."""
    tokens = torch.from_numpy(case.tokens).to(dtype).float().numpy()
    return dataclasses.replace(case, tokens=tokens)


def assert_same_decisions(actual: Result, expected: Result) -> None:
    np.testing.assert_array_equal(actual.kept_index, expected.kept_index)
    np.testing.assert_array_equal(actual.assignment, expected.assignment)


def assert_same(actual: Result, expected: Result, tolerance: float = 1e-6) -> None:
    """Equal decisions; tokens of size about 1 and log-sizes within the tolerance."""
    assert_same_decisions(actual, expected)
    np.testing.assert_allclose(actual.kept_tokens, expected.kept_tokens, rtol=0, atol=tolerance)
    np.testing.assert_allclose(actual.kept_log_size, expected.kept_log_size, rtol=0, atol=2e-6)


def assert_identical(actual: Result, expected: Result) -> None:
    for field in dataclasses.fields(Result):
        np.testing.assert_array_equal(getattr(actual, field.name), getattr(expected, field.name))


def one_image(patches: list[list[float]], threshold: float, **attributes: Any) -> Case:
    """A case of one image without prefix tokens and with all sizes 1."""
    tokens = np.asarray([patches], np.float32)
    values = {"prefix": 0, **attributes}
    return Case(tokens, np.zeros(tokens.shape[:2], np.float32), np.float32([threshold]), **values)


# --- the definition -------------------------------------------------------------------------------


@settings(REPRODUCIBLE, max_examples=800)
@given(EXACT_CASES)
def test_exact_data_equals_the_definition(case: Case) -> None:
    assert_same(run(case), case.expected())


@settings(REPRODUCIBLE, max_examples=150)
@given(EXACT_CASES, st.sampled_from(FLOAT_TYPES))
def test_exact_data_equals_the_definition_in_every_float_type(
    case: Case, dtype: torch.dtype
) -> None:
    assert_same(run(case, dtype), case.expected(), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("threshold", EXACT_THRESHOLDS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_threshold_equals_the_definition(selection: str, threshold: float) -> None:
    for seed in range(6):
        case = exact_case(seed, selection=selection, threshold=threshold, patches=15)
        assert_same(run(case), case.expected())


@pytest.mark.parametrize("prefix", range(6))
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_capacity_equals_the_definition(selection: str, prefix: int) -> None:
    patches = 9
    for capacity in range(1, patches + 1):
        for reduction in REDUCTIONS:
            case = exact_case(
                capacity,
                patches=patches,
                prefix=prefix,
                selection=selection,
                reduction=reduction,
                capacity=capacity,
            )
            actual = run(case)
            assert actual.kept_index.shape == (2, prefix + capacity)
            assert_same(actual, case.expected())


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 4, 7, 8, 16, 100])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_every_multiple_equals_the_definition(multiple_of: int, prefix: int) -> None:
    for seed in range(5):
        case = exact_case(seed, prefix=prefix, multiple_of=multiple_of, patches=13)
        actual = run(case)
        slots = actual.kept_index.shape[1]
        assert slots % multiple_of == 0 or slots == prefix + 13
        assert_same(actual, case.expected())


@pytest.mark.parametrize("prefix", range(6))
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_patch_stays(selection: str, threshold: float, prefix: int) -> None:
    case = exact_case(
        prefix, patches=1, prefix=prefix, selection=selection, threshold=threshold, padding="none"
    )
    actual = run(case)
    assert_same(actual, case.expected())
    np.testing.assert_array_equal(actual.kept_tokens, case.tokens)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_duplicates_become_one_of_their_size(selection: str, reduction: str) -> None:
    patches = [[0, 2], [1, 0], [0, 2], [0, 2], [1, 0], [0, 2]]
    threshold = 1.0 if selection == "cover" else -1.0
    case = one_image(patches, threshold, selection=selection, reduction=reduction)
    actual = run(case)
    if selection == "cover":
        np.testing.assert_array_equal(actual.kept_index, [[0, 1]])
        np.testing.assert_array_equal(actual.assignment, [[0, 1, 0, 0, 1, 0]])
        np.testing.assert_allclose(np.exp(actual.kept_log_size), [[4, 2]], rtol=1e-6)
        np.testing.assert_array_equal(actual.kept_tokens, [[[0, 2], [1, 0]]])
    else:
        # all would go: the least redundant stays, the first of the rarer kind
        np.testing.assert_array_equal(actual.kept_index, [[1]])
        np.testing.assert_allclose(np.exp(actual.kept_log_size), [[6]], rtol=1e-6)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0])
def test_zero_vectors_are_like_nothing(threshold: float) -> None:
    case = one_image([[0, 0], [0, 0], [0, 3], [0, 0]], threshold)
    actual = run(case)
    expected_heads = [0] if threshold <= 0 else [0, 1, 2, 3]
    np.testing.assert_array_equal(actual.kept_index, [expected_heads])
    assert_same(actual, case.expected())


def test_vectors_below_the_norm_floor_are_nearly_zero_vectors() -> None:
    tiny = 2.0**-45
    case = one_image([[tiny, 0], [tiny, 0], [0, tiny]], 0.5)
    assert_same(run(case), case.expected())
    np.testing.assert_array_equal(run(case).kept_index, [[0, 1, 2]])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_is_pruned_at_a_threshold_that_is_not_a_number(
    selection: str, reduction: str
) -> None:
    case = exact_case(1, selection=selection, reduction=reduction, padding="none", prefix=2)
    case = dataclasses.replace(case, threshold=np.float32([np.nan]))
    actual = run(case)
    assert_same(actual, case.expected())
    np.testing.assert_array_equal(actual.kept_tokens, case.tokens)


def test_short_and_long_vectors_are_compared_by_direction() -> None:
    case = one_image([[2.0**-30, 0], [2.0**30, 0], [0, 2.0**-30], [0, -1]], 0.5)
    np.testing.assert_array_equal(run(case).assignment, [[0, 0, 1, 2]])


def test_ties_go_to_the_first_kept_patch() -> None:
    # the third is at 1/2 to both, the last two to none
    case = one_image([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]], 0.5)
    np.testing.assert_array_equal(run(case).assignment, [[0, 1, 0, 2, 3]])
    assert_same(run(case), case.expected())


def test_a_pruned_patch_goes_to_the_most_similar_not_to_the_first_alike() -> None:
    first, second = [1.0] * 4 + [0.0] * 12, [1.0] * 16
    near_second = [-1.0] + [1.0] * 15
    case = one_image([first, second, near_second], 0.25)
    assert run(case).assignment.tolist() == [[0, 0, 0]]
    case = one_image([first, second, near_second], 0.625)
    assert run(case).assignment.tolist() == [[0, 1, 1]]
    # alike the first (1/2) and the second (3/4)
    between = [1.0, 1.0, 1.0, -1.0] + [0.0] * 12
    case = one_image([[1.0] + [0.0] * 15, [1.0, 1.0, 1.0, 1.0] + [0.0] * 12, between], 0.5)
    assert run(case).assignment.tolist() == [[0, 0, 0]]


def test_only_kept_patches_prune() -> None:
    # each is alike its neighbours alone: the second goes, so the third stays
    chain = [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert run(one_image(chain, 0.5)).kept_index.tolist() == [[0, 2]]


def test_a_long_chain_of_alike_neighbours_is_settled() -> None:
    """Each patch depends on the one before it: as many rounds as patches."""
    count = 60
    patches = np.zeros((count, count + 3), np.float32)
    for i in range(count):
        patches[i, i : i + 4] = 1
    case = one_image(patches.tolist(), 0.75)
    actual = run(case)
    assert actual.kept_index.tolist() == [list(range(0, count, 2))]
    assert_same(actual, case.expected())


def test_the_most_similar_kept_patches_give_up_first() -> None:
    base = np.float32([1] * 16)
    patches = []
    for flips in (0, 4, 2, 8, 1):
        patch = base.copy()
        patch[:flips] = -1
        patches.append(patch.tolist())
    kept = [
        run(one_image(patches, 1.0, capacity=capacity)).kept_index.tolist()[0]
        for capacity in range(1, 6)
    ]
    for smaller, larger in itertools.pairwise(kept):
        assert set(smaller) < set(larger)
    assert kept[0] == [0]
    assert kept[3] == [0, 1, 2, 3]


def test_equally_similar_kept_patches_give_up_in_order() -> None:
    patches = np.eye(5).tolist()
    case = one_image(patches, 0.5, capacity=2)
    # all have similarity 0 to an earlier one, but the first, which has none
    assert run(case).kept_index.tolist() == [[0, 4]]
    assert_same(run(case), case.expected())


@pytest.mark.parametrize("prefix", range(4))
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("capacity", [0, 3])
def test_an_image_of_padding_alone_keeps_its_prefix(
    capacity: int, reduction: str, selection: str, prefix: int
) -> None:
    case = exact_case(
        3,
        batch=3,
        prefix=prefix,
        selection=selection,
        reduction=reduction,
        capacity=capacity,
        padding="none",
    )
    case.log_size[1, prefix:] = PAD
    actual = run(case)
    assert_same(actual, case.expected())
    assert (actual.assignment[1, prefix:] == -1).all()
    assert (actual.kept_index[1, prefix:] == 0).all()
    assert (actual.kept_log_size[1, prefix:] == PAD).all()
    assert (actual.kept_tokens[1, prefix:] == 0).all()


@pytest.mark.parametrize("prefix", range(3))
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("capacity", [0, 2])
def test_a_batch_of_padding_alone_keeps_its_prefix(
    capacity: int, selection: str, prefix: int
) -> None:
    case = exact_case(3, prefix=prefix, selection=selection, capacity=capacity, padding="none")
    case.log_size[:, prefix:] = PAD
    assert_same(run(case), case.expected())


def test_half_of_pad_is_padding_and_just_above_is_not() -> None:
    case = one_image([[1, 0], [1, 0], [1, 0]], 0.5)
    case.log_size[0] = [PAD / 2, np.nextafter(np.float32(PAD / 2), np.float32(0)), 0]
    assert run(case).assignment.tolist() == [[-1, 0, 0]]


# --- what follows from it -------------------------------------------------------------------------


def similarities(case: Case, image: int) -> tuple[Array, Array]:
    """float64 similarities of an image's patches, and which patches are valid."""
    patches = case.tokens[image, case.prefix :].astype(np.float64)
    norm = np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    features = patches / norm
    return features @ features.T, case.log_size[image, case.prefix :] > PAD / 2


def float_noise(case: Case) -> float:
    """Room for float32 rounding in a dot product of unit vectors."""
    return float(4 * np.sqrt(case.tokens.shape[2]) * 2.0**-24)


def heads_of(result: Result, case: Case, image: int) -> Array:
    """The patches that head the slots of an image."""
    filled = result.kept_log_size[image] > PAD / 2
    filled[: case.prefix] = False
    return np.asarray(result.kept_index[image][filled] - case.prefix)


def limit_of(case: Case, image: int) -> float:
    return float(case.threshold[image if len(case.threshold) > 1 else 0])


@settings(REPRODUCIBLE, max_examples=300)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_nothing_unlike_the_rest_is_lost_and_no_two_kept_are_alike(
    case: Case, dtype: torch.dtype
) -> None:
    case = rounded(dataclasses.replace(case, selection="cover", capacity=0), dtype)
    result, noise = run(case, dtype), float_noise(case)
    for image in range(len(case.tokens)):
        similarity, valid = similarities(case, image)
        heads, limit = heads_of(result, case, image), limit_of(case, image)
        pruned = np.setdiff1d(np.flatnonzero(valid), heads)
        assert set(heads) <= set(np.flatnonzero(valid))
        among = similarity[np.ix_(heads, heads)]
        assert (among[~np.eye(len(heads), dtype=bool)] < limit + noise).all()
        if len(pruned):
            assert (similarity[np.ix_(pruned, heads)].max(1) >= limit - noise).all()


@settings(REPRODUCIBLE, max_examples=250)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_every_pruned_patch_goes_to_the_kept_one_most_like_it(
    case: Case, dtype: torch.dtype
) -> None:
    case = rounded(case, dtype)
    result, noise = run(case, dtype), float_noise(case)
    for image in range(len(case.tokens)):
        similarity, valid = similarities(case, image)
        heads = heads_of(result, case, image)
        assert bool(valid.any()) == bool(len(heads))
        slots = result.assignment[image, case.prefix :]
        assert ((slots >= 0) == valid).all()
        np.testing.assert_array_equal(slots[heads], case.prefix + np.arange(len(heads)))
        for patch in np.setdiff1d(np.flatnonzero(valid), heads):
            chosen = heads[slots[patch] - case.prefix]
            assert similarity[patch, chosen] >= similarity[patch, heads].max() - noise


@settings(REPRODUCIBLE, max_examples=250)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_sizes_and_the_weighted_sum_of_the_patches_are_kept(case: Case, dtype: torch.dtype) -> None:
    case = rounded(case, dtype)
    result = run(case, dtype)
    into = np.where(case.log_size > PAD / 2, np.exp(case.log_size.astype(np.float64)), 0)
    out = np.where(result.kept_log_size > PAD / 2, np.exp(result.kept_log_size), 0)
    np.testing.assert_allclose(out.sum(1), into.sum(1), rtol=1e-5)
    if case.reduction == "merge":
        before = (into[:, :, None] * case.tokens).sum(1)
        after = (out[:, :, None] * result.kept_tokens).sum(1)
        largest = (into[:, :, None] * np.abs(case.tokens)).sum(1).max()
        room = max(torch.finfo(dtype).eps, 1e-6) * largest + 1e-6
        np.testing.assert_allclose(after, before, rtol=0, atol=room)


@settings(REPRODUCIBLE, max_examples=250)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_slots_are_prefix_then_kept_in_order_then_padding(case: Case, dtype: torch.dtype) -> None:
    case = rounded(case, dtype)
    result, prefix = run(case, dtype), case.prefix
    num_tokens, slots = case.log_size.shape[1], result.kept_index.shape[1]
    np.testing.assert_array_equal(result.kept_tokens[:, :prefix], case.tokens[:, :prefix])
    np.testing.assert_array_equal(result.kept_log_size[:, :prefix], case.log_size[:, :prefix])
    places = np.tile(np.arange(prefix), (len(case.tokens), 1))
    np.testing.assert_array_equal(result.kept_index[:, :prefix], places)
    np.testing.assert_array_equal(result.assignment[:, :prefix], places)
    counts = []
    for image in range(len(case.tokens)):
        heads = heads_of(result, case, image)
        counts.append(len(heads))
        assert (np.diff(heads) > 0).all()
        padding = slice(prefix + len(heads), None)
        assert (result.kept_tokens[image, padding] == 0).all()
        assert (result.kept_log_size[image, padding] == PAD).all()
        assert (result.kept_index[image, padding] == 0).all()
        assert result.assignment[image].max(initial=-1) < prefix + len(heads)
    if case.capacity:
        assert slots == prefix + case.capacity
    else:
        assert prefix + max(counts) <= slots <= num_tokens
        assert slots - (prefix + max(counts)) < case.multiple_of


@settings(REPRODUCIBLE, max_examples=150)
@given(RANDOM_CASES)
def test_tokens_and_sizes_follow_from_the_assignment(case: Case) -> None:
    result = run(case)
    expected = reduce_tokens(
        case.tokens,
        case.log_size,
        result.kept_index,
        result.assignment,
        case.reduction,
        case.prefix,
    )
    largest = 1 + np.abs(case.tokens).max()
    np.testing.assert_allclose(
        result.kept_tokens, expected.kept_tokens, rtol=0, atol=1e-6 * largest
    )
    np.testing.assert_allclose(result.kept_log_size, expected.kept_log_size, rtol=0, atol=2e-6)


@settings(REPRODUCIBLE, max_examples=150)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES), st.sampled_from([1.0009765625, 1.5, 2.0]))
def test_a_threshold_above_one_is_the_identity(
    case: Case, dtype: torch.dtype, threshold: float
) -> None:
    tokens, log_size, _ = tensors(case, dtype)
    log_size = torch.where(log_size > PAD / 2, log_size, 0.5)
    limit = torch.tensor([threshold])
    attributes = {**case.attributes, "capacity": 0}
    kept_tokens, kept_log_size, kept_index, assignment = similarity_prune(
        tokens, log_size, limit, **attributes
    )
    everywhere = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
    assert torch.equal(kept_tokens, tokens)
    assert torch.equal(kept_log_size, log_size)
    assert torch.equal(kept_index, everywhere)
    assert torch.equal(assignment, everywhere)


@settings(REPRODUCIBLE, max_examples=100)
@given(RANDOM_CASES)
def test_a_token_that_stands_alone_comes_out_bit_for_bit(case: Case) -> None:
    result = run(case)
    for image in range(len(case.tokens)):
        slots, counts = np.unique(result.assignment[image], return_counts=True)
        for slot in slots[(counts == 1) & (slots >= 0)]:
            source = result.kept_index[image, slot]
            np.testing.assert_array_equal(
                result.kept_tokens[image, slot], case.tokens[image, source]
            )
            assert result.kept_log_size[image, slot] == case.log_size[image, source]


@settings(REPRODUCIBLE, max_examples=200)
@given(EXACT_CASES)
def test_an_image_does_not_depend_on_the_others_in_its_batch(case: Case) -> None:
    together = run(case)
    for image in range(len(case.tokens)):
        one = case.image(image)
        if one.prefix == 0 and (one.log_size <= PAD / 2).all():
            continue
        alone = run(one)
        slots = alone.kept_index.shape[1]
        filled = int((together.kept_log_size[image] > PAD / 2).sum())
        assert filled <= slots <= together.kept_index.shape[1]
        np.testing.assert_array_equal(together.assignment[image], alone.assignment[0])
        np.testing.assert_array_equal(together.kept_index[image, :slots], alone.kept_index[0])
        # where sums of sizes are exact, and nothing is divided by them, so is what comes out
        ones = (case.log_size[image][case.log_size[image] > PAD / 2] == 0).all()
        room = 0 if ones else 1e-6
        np.testing.assert_allclose(
            together.kept_log_size[image, :slots], alone.kept_log_size[0], rtol=0, atol=room
        )
        room = 0 if case.reduction == "drop" else 1e-6
        np.testing.assert_allclose(
            together.kept_tokens[image, :slots], alone.kept_tokens[0], rtol=0, atol=room
        )


@settings(REPRODUCIBLE, max_examples=100)
@given(EXACT_CASES, st.randoms(use_true_random=False))
def test_the_contents_of_padding_do_not_matter(case: Case, random: Any) -> None:
    other = dataclasses.replace(case, tokens=case.tokens.copy())
    padding = case.log_size <= PAD / 2
    padding[:, : case.prefix] = False
    other.tokens[padding] = random.choice([0.0, 1.0, -37.5])
    assert_identical(run(other), run(case))


@settings(REPRODUCIBLE, max_examples=60)
@given(EXACT_CASES)
def test_one_threshold_is_the_same_as_that_threshold_for_every_image(case: Case) -> None:
    single = dataclasses.replace(case, threshold=case.threshold[:1])
    repeated = dataclasses.replace(case, threshold=np.repeat(case.threshold[:1], len(case.tokens)))
    assert_identical(run(single), run(repeated))


@settings(REPRODUCIBLE, max_examples=60)
@given(EXACT_CASES)
def test_the_prefix_is_never_compared(case: Case) -> None:
    """Prefix tokens that are copies of patches change nothing beside themselves."""
    other = dataclasses.replace(case, tokens=case.tokens.copy())
    other.tokens[:, : case.prefix] = case.tokens[:, -1:]
    assert_same_decisions(run(other), run(case))


@settings(REPRODUCIBLE, max_examples=60)
@given(EXACT_CASES)
def test_hints_for_tensorrt_change_nothing(case: Case) -> None:
    hinted = similarity_prune(*tensors(case), **case.attributes, opt_tokens=5, max_tokens=7)
    for actual, expected in zip(
        hinted, similarity_prune(*tensors(case), **case.attributes), strict=True
    ):
        assert torch.equal(actual, expected)


@settings(REPRODUCIBLE, max_examples=60)
@given(RANDOM_CASES)
def test_a_second_layer_keeps_the_number_of_patches(case: Case) -> None:
    """What one layer gives, padding and sizes included, is what the next one takes."""
    kept_tokens, kept_log_size, _, assignment = similarity_prune(*tensors(case), **case.attributes)
    room = kept_tokens.shape[1] - case.prefix
    if room == 0:
        return
    attributes = {**case.attributes, "capacity": min(case.capacity, room)}
    limit = torch.from_numpy(case.threshold) - 0.2
    _, log_size, _, second = similarity_prune(kept_tokens, kept_log_size, limit, **attributes)
    before = np.where(case.log_size > PAD / 2, np.exp(case.log_size), 0).sum(1)
    after = torch.where(log_size > PAD / 2, log_size.exp(), 0).sum(1)
    np.testing.assert_allclose(after, before, rtol=1e-5)
    composed = second.gather(1, assignment.clamp_min(0))
    assert (composed[assignment >= 0] >= 0).all()


# --- the operator as a part of PyTorch ------------------------------------------------------------

VARIANTS = [
    (selection, reduction, capacity)
    for selection in SELECTIONS
    for reduction in REDUCTIONS
    for capacity in (0, 4)
]


@pytest.mark.parametrize(("selection", "reduction", "capacity"), VARIANTS)
def test_the_result_repeats_and_inputs_stay_as_they_are(
    selection: str, reduction: str, capacity: int
) -> None:
    case = random_case(5, selection=selection, reduction=reduction, capacity=capacity)
    inputs = tensors(case)
    before = [tensor.clone() for tensor in inputs]
    first = similarity_prune(*inputs, **case.attributes)
    second = similarity_prune(*inputs, **case.attributes)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_strided_inputs_give_the_same() -> None:
    case = exact_case(8, padding="tail")
    tokens, log_size, threshold = tensors(case)
    turned = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([log_size, log_size + 1], 2)[:, :, 0]
    assert not turned.is_contiguous()
    assert not every_other.is_contiguous()
    strided = similarity_prune(turned, every_other, threshold, **case.attributes)
    plain = similarity_prune(tokens, log_size, threshold, **case.attributes)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_autocast_changes_no_decision(selection: str) -> None:
    for seed in range(20):
        case = random_case(seed, selection=selection, patches=40, dim=64, threshold=0.5)
        plain = run(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_identical(run(case), plain)
            assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_matmul_precision_changes_no_decision_and_is_put_back(
    selection: str, precision: str
) -> None:
    cases = [
        random_case(seed, selection=selection, patches=40, dim=64, threshold=0.5)
        for seed in range(20)
    ]
    plain = [run(case) for case in cases]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for case, expected in zip(cases, plain, strict=True):
            assert_identical(run(case), expected)
            assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ValueError, match="capacity"):
            similarity_prune(*tensors(cases[0]), 1, capacity=1000)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_similarities_of_half_precision_tokens_do_not_overflow(dtype: torch.dtype) -> None:
    big = 2.0**15
    case = one_image([[big, big, big, big], [big, big, big, -big], [-big, big, 0, 0]], 0.5)
    assert run(case, dtype).assignment.tolist() == [[0, 0, 1]]


def well_separated(reduction: str, capacity: int) -> Case:
    """Clusters whose decisions a small change of a token leaves alone, with padding."""
    rng = np.random.default_rng(11)
    centres = np.eye(4, 6)
    which = np.array([[0, 1, 0, 2, 1, 0, 3], [2, 2, 1, 0, 3, 3, 0]])
    tokens = centres[which] + 0.1 * rng.standard_normal((2, 7, 6))
    tokens = np.concatenate([rng.standard_normal((2, 1, 6)), tokens], 1).astype(np.float32)
    log_size = np.log(rng.integers(1, 5, (2, 8))).astype(np.float32)
    log_size[1, 6:] = PAD
    return Case(tokens, log_size, np.float32([0.7]), 1, "cover", reduction, capacity)


@pytest.mark.parametrize("capacity", [0, 3, 6])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_tokens_pass_gradcheck(reduction: str, capacity: int) -> None:
    case = well_separated(reduction, capacity)
    _, log_size, threshold = tensors(case)

    def prune_tokens(tokens: torch.Tensor) -> torch.Tensor:
        return similarity_prune(tokens, log_size, threshold, **case.attributes)[0]

    tokens = torch.from_numpy(case.tokens).double().requires_grad_()
    assert torch.autograd.gradcheck(prune_tokens, tokens, atol=1e-6)


@pytest.mark.parametrize("capacity", [0, 3, 6])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_log_sizes_pass_gradcheck(reduction: str, capacity: int) -> None:
    """log_size is float32, so the finite step is large; no decision depends on it."""
    case = well_separated(reduction, capacity)
    tokens, log_size, threshold = tensors(case)
    tokens = tokens.double()

    def prune_sizes(log_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return similarity_prune(tokens, log_size.float(), threshold, **case.attributes)[:2]

    leaf = log_size.double().requires_grad_()
    # a step of PAD's own rounding is visible there: those are constants
    assert torch.autograd.gradcheck(prune_sizes, leaf, eps=2.0**-7, atol=1e-3)


def written_reduction(
    tokens: torch.Tensor,
    log_size: torch.Tensor,
    kept_index: torch.Tensor,
    assignment: torch.Tensor,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 4 as it is written, in float64, left to autograd."""
    batch, slots = kept_index.shape
    kept_tokens, kept_log_size = [], []
    for image in range(batch):
        for slot in range(slots):
            members = assignment[image] == slot
            if not members.any():
                kept_tokens.append(tokens.new_zeros(tokens.shape[2]))
                kept_log_size.append(log_size.new_full((), PAD))
                continue
            size = log_size[image][members].exp()
            mean = (size[:, None] * tokens[image][members]).sum(0) / size.sum()
            head = tokens[image, kept_index[image, slot]]
            kept_tokens.append(mean if reduction == "merge" else head)
            kept_log_size.append(size.sum().log())
    shape = (batch, slots, -1)
    return torch.stack(kept_tokens).view(shape), torch.stack(kept_log_size).view(shape[:2])


@pytest.mark.parametrize(("selection", "reduction", "capacity"), VARIANTS)
def test_gradients_are_those_of_the_written_formula(
    selection: str, reduction: str, capacity: int
) -> None:
    for seed in range(3):
        case = random_case(
            seed, selection=selection, reduction=reduction, capacity=capacity, patches=10
        )
        tokens, log_size, threshold = tensors(case)
        tokens.requires_grad_()
        log_size.requires_grad_()
        kept, kept_log_size, index, assignment = similarity_prune(
            tokens, log_size, threshold, **case.attributes
        )
        upstream = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
        (kept * upstream).sum().add((kept_log_size * upstream[:, :, 0]).sum()).backward()
        wide = [leaf.detach().double().requires_grad_() for leaf in (tokens, log_size)]
        written, written_log_size = written_reduction(*wide, index, assignment, reduction)
        (written * upstream).sum().add((written_log_size * upstream[:, :, 0]).sum()).backward()
        for leaf, expected in zip((tokens, log_size), wide, strict=True):
            assert leaf.grad is not None
            assert expected.grad is not None
            torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)
        padding = case.log_size <= PAD / 2
        assert (tokens.grad[torch.from_numpy(padding)] == 0).all()  # type: ignore[index]


def test_indices_carry_no_gradient() -> None:
    tokens, log_size, threshold = tensors(random_case(0))
    _, _, index, assignment = similarity_prune(tokens.requires_grad_(), log_size, threshold, 1)
    assert not index.requires_grad
    assert not assignment.requires_grad


@pytest.mark.parametrize(
    ("selection", "reduction", "capacity", "prefix"),
    [("cover", "merge", 0, 1), ("cover", "drop", 4, 0), ("redundancy", "merge", 4, 2)],
)
def test_opcheck_passes(selection: str, reduction: str, capacity: int, prefix: int) -> None:
    case = random_case(
        2, prefix=prefix, selection=selection, reduction=reduction, capacity=capacity, patches=8
    )
    tokens, log_size, threshold = tensors(case)
    results = torch.library.opcheck(
        similarity_prune,
        (tokens.requires_grad_(), log_size.requires_grad_(), threshold),
        case.attributes,
    )
    assert set(results.values()) == {"SUCCESS"}


def inputs_with(**changes: Any) -> dict[str, Any]:
    values = {
        "tokens": torch.zeros(2, 5, 3),
        "log_size": torch.zeros(2, 5),
        "threshold": torch.tensor([0.5]),
        "num_prefix_tokens": 1,
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(5, 3)}, "tokens must be floating point"),
        ({"tokens": torch.zeros(2, 5, 3, 1)}, "tokens must be floating point"),
        ({"tokens": torch.zeros(2, 5, 3, dtype=torch.int64)}, "tokens must be floating point"),
        ({"log_size": torch.zeros(2, 4)}, "log_size must be float32"),
        ({"log_size": torch.zeros(5)}, "log_size must be float32"),
        ({"log_size": torch.zeros(2, 5, dtype=torch.float64)}, "log_size must be float32"),
        ({"log_size": torch.zeros(2, 5, dtype=torch.float16)}, "log_size must be float32"),
        ({"threshold": torch.tensor(0.5)}, "threshold must be float32"),
        ({"threshold": torch.zeros(3)}, "threshold must be float32"),
        ({"threshold": torch.zeros(2, 1)}, "threshold must be float32"),
        ({"threshold": torch.zeros(0)}, "threshold must be float32"),
        ({"threshold": torch.zeros(1, dtype=torch.float64)}, "threshold must be float32"),
        ({"tokens": torch.zeros(0, 5, 3), "log_size": torch.zeros(0, 5)}, "batch is empty"),
        ({"num_prefix_tokens": -1}, "leaves no patches"),
        ({"num_prefix_tokens": 5}, "leaves no patches"),
        ({"num_prefix_tokens": 6}, "leaves no patches"),
        ({"selection": "random"}, "selection 'random'"),
        ({"reduction": "sum"}, "reduction 'sum'"),
        ({"capacity": -1}, "capacity -1"),
        ({"capacity": 5}, "capacity 5"),
        ({"multiple_of": 0}, "multiple_of 0"),
        ({"multiple_of": -2}, "multiple_of -2"),
    ],
)
def test_what_the_definition_does_not_cover_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        similarity_prune(**inputs_with(**changes))


def test_the_values_next_to_the_refused_ones_are_taken() -> None:
    accepted: list[Callable[[], dict[str, Any]]] = [
        lambda: inputs_with(),
        lambda: inputs_with(threshold=torch.zeros(2)),
        lambda: inputs_with(num_prefix_tokens=0),
        lambda: inputs_with(num_prefix_tokens=4),
        lambda: inputs_with(capacity=4),
        lambda: inputs_with(multiple_of=100),
    ]
    for build in accepted:
        values = build()
        kept_tokens, _, _, assignment = similarity_prune(**values)
        assert kept_tokens.shape[1] <= 5
        assert assignment.shape == (2, 5)
