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
    capacities_of,
    exact_case,
    random_case,
    reduce_tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from simprune_deploy.pruning import operator
from simprune_deploy.pruning.operator import similarity_prune

REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
PADDINGS = ("none", "tail", "all", "mixed")

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
        "feature_dim": st.sampled_from([None, None, 5, 16, 40]),
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


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """Tokens, features (the same tensor where the tokens are compared), log-sizes, thresholds."""
    tokens = torch.from_numpy(case.tokens).to(dtype)
    return (
        tokens,
        tokens if case.features is None else torch.from_numpy(case.features).to(dtype),
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
    """The case with its tokens and features as `dtype` holds them."""
    tokens, features, *_ = (tensor.float().numpy() for tensor in tensors(case, dtype))
    return dataclasses.replace(
        case, tokens=tokens, features=None if case.features is None else features
    )


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


def one_image(patches: Any, threshold: float, **attributes: Any) -> Case:
    """A case of one image without prefix tokens and with all sizes 1."""
    tokens = np.asarray([patches], np.float32)
    values = {"prefix": 0, **attributes}
    return Case(tokens, np.zeros(tokens.shape[:2], np.float32), np.float32([threshold]), **values)


# --- the definition -------------------------------------------------------------------------------


@settings(REPRODUCIBLE, max_examples=600)
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


@pytest.mark.parametrize("patches", [1, 2, 9, 10])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_capacity_equals_the_definition(selection: str, patches: int) -> None:
    least, most = capacities_of(patches, selection)
    for capacity in range(least, most + 1):
        for prefix, reduction in itertools.product((0, 3), REDUCTIONS):
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
    threshold = 1.0 if selection == "pairs" else -1.0
    actual = run(one_image(patches, threshold, selection=selection, reduction=reduction))
    if selection == "pairs":
        np.testing.assert_array_equal(actual.kept_index, [[1, 3, 5]])
        np.testing.assert_array_equal(actual.assignment, [[1, 0, 1, 1, 0, 2]])
        np.testing.assert_allclose(np.exp(actual.kept_log_size), [[2, 3, 1]], rtol=1e-6)
        np.testing.assert_array_equal(actual.kept_tokens, [[[1, 0], [0, 2], [0, 2]]])
    else:
        # all would go: the least redundant stays, the first of the rarer kind
        np.testing.assert_array_equal(actual.kept_index, [[1]])
        np.testing.assert_allclose(np.exp(actual.kept_log_size), [[6]], rtol=1e-6)


def test_the_merge_weighs_by_size_and_drop_does_not_merge() -> None:
    case = one_image([[4, 0], [1, 0], [7, 0]], 0.5)
    case.log_size[0] = np.log([2, 1, 3])
    merged = run(case)
    np.testing.assert_allclose(merged.kept_tokens, [[[(8 + 1 + 21) / 6, 0]]], rtol=1e-6)
    dropped = run(dataclasses.replace(case, reduction="drop"))
    np.testing.assert_array_equal(dropped.kept_tokens, [[[1, 0]]])
    for result in (merged, dropped):
        np.testing.assert_allclose(np.exp(result.kept_log_size), [[6]], rtol=1e-6)


def test_the_first_patch_behind_the_prefix_is_even() -> None:
    """Whatever the prefix: numbers are those of patches, not of tokens."""
    for prefix in range(4):
        patches = [[0, 1]] * prefix + [[1, 0], [1, 0]]
        case = one_image(patches, 0.5, prefix=prefix)
        assert run(case).kept_index.tolist() == [[*range(prefix), prefix + 1]]


def test_only_even_patches_go_and_only_into_odd_ones() -> None:
    same = [1.0, 0.0]
    assert run(one_image([same] * 5, 0.5)).assignment.tolist() == [[0, 0, 0, 1, 0]]
    # even ones that are alike stay where no odd one is; so do odd ones
    assert run(one_image([same, [0, 1]] * 3, 0.5)).kept_index.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5, 1.0])
def test_zero_vectors_are_like_nothing(threshold: float) -> None:
    case = one_image([[0, 0], [0, 0], [0, 3], [0, 0]], threshold)
    actual = run(case)
    np.testing.assert_array_equal(actual.kept_index, [[1, 3] if threshold <= 0 else [0, 1, 2, 3]])
    assert_same(actual, case.expected())


def test_vectors_below_the_norm_floor_are_nearly_zero_vectors() -> None:
    tiny = 2.0**-45
    case = one_image([[tiny, 0], [tiny, 0], [0, tiny], [0, tiny]], 0.5)
    assert_same(run(case), case.expected())
    np.testing.assert_array_equal(run(case).kept_index, [[0, 1, 2, 3]])


@pytest.mark.parametrize("width", [1, 2, 16])
def test_features_whose_square_overflows_are_like_nothing(width: int) -> None:
    features = np.full((1, 4, width), 1e20, np.float32)
    features[0, 3] = 1
    tokens = np.ones((1, 4, 3), np.float32)
    case = Case(tokens, np.zeros((1, 4), np.float32), np.float32([0.5]), 0, features=features)
    assert run(case).kept_index.tolist() == [[0, 1, 2, 3]]
    case = dataclasses.replace(case, threshold=np.float32([0]))
    assert run(case).assignment.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("threshold", [np.nan, np.inf])
def test_nothing_is_pruned_at_a_threshold_that_nothing_reaches(
    threshold: float, selection: str, reduction: str
) -> None:
    case = exact_case(1, selection=selection, reduction=reduction, padding="none", prefix=2)
    case = dataclasses.replace(case, threshold=np.float32([threshold]))
    actual = run(case)
    assert_same(actual, case.expected())
    np.testing.assert_array_equal(actual.kept_tokens, case.tokens)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_all_that_can_goes_at_minus_infinity(selection: str) -> None:
    case = exact_case(1, selection=selection, padding="none", patches=9, prefix=2)
    case = dataclasses.replace(case, threshold=np.float32([-np.inf]))
    actual = run(case)
    assert_same(actual, case.expected())
    assert actual.kept_index.shape[1] == 2 + (4 if selection == "pairs" else 1)


def test_short_and_long_vectors_are_compared_by_direction() -> None:
    case = one_image([[2.0**-30, 0], [2.0**30, 0], [0, 2.0**-30], [0, -1]], 0.5)
    np.testing.assert_array_equal(run(case).assignment, [[0, 0, 1, 2]])


def test_ties_go_to_the_first_odd_patch() -> None:
    # the third is at 1/2 to all odd ones
    case = one_image([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], *np.eye(4)[1:]], 0.5)
    np.testing.assert_array_equal(run(case).assignment, [[0, 1, 1, 2, 3, 4]])
    assert_same(run(case), case.expected())


def test_a_candidate_goes_to_the_most_similar_not_to_the_first_alike() -> None:
    candidate, near, nearer = [1.0] * 16, [-1.0] * 2 + [1.0] * 14, [-1.0] + [1.0] * 15
    case = one_image([candidate, near, [0.0] * 16, nearer], 0.5)
    assert run(case).assignment.tolist() == [[2, 0, 1, 2]]


def test_the_candidates_most_alike_their_partners_go_first() -> None:
    base = np.ones(16, np.float32)
    patches = []
    for flips in (4, 2, 8, 1):
        patch = base.copy()
        patch[:flips] = -1
        patches += [patch, np.eye(16, dtype=np.float32)[0]]
    patches[1] = base
    # candidates 0, 2, 4, 6 are at 1/2, 3/4, 0 and 7/8 to the first odd patch
    kept = [
        run(one_image(patches, threshold, capacity=capacity)).kept_index.tolist()[0]
        for capacity, threshold in itertools.product(range(4, 9), (-1.0, 2.0))
    ]
    assert kept[::2] == kept[1::2]
    assert kept[::2] == [
        [1, 3, 5, 7],
        [1, 3, 4, 5, 7],
        [0, 1, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_of_equally_similar_candidates_the_first_go() -> None:
    case = one_image(np.eye(7), 0.5, capacity=5)
    assert run(case).kept_index.tolist() == [[1, 3, 4, 5, 6]]
    assert_same(run(case), case.expected())
    redundant = dataclasses.replace(case, selection="redundancy")
    assert run(redundant).kept_index.tolist() == [[2, 3, 4, 5, 6]]
    assert_same(run(redundant), redundant.expected())


@pytest.mark.parametrize("capacity", [0, 1])
@pytest.mark.parametrize("threshold", [-1.0, -np.inf])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_valid_patch_among_padding_stays(
    selection: str, threshold: float, capacity: int
) -> None:
    case = one_image(np.ones((3, 2)), threshold, capacity=capacity, selection=selection)
    case.log_size[0, 1:] = PAD
    assert run(case).assignment.tolist() == [[0, -1, -1]]
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
    case = one_image([[1, 0], [1, 0], [1, 0], [1, 0]], 0.5)
    just_above = np.nextafter(np.float32(PAD / 2), np.float32(0))
    case.log_size[0] = [0, 0, just_above, PAD / 2]
    assert run(case).assignment.tolist() == [[0, 0, 0, -1]]


def test_more_that_must_stay_than_there_are_slots_stay_in_range() -> None:
    """With padding in all odd places, which is outside the definition, nothing can go."""
    case = one_image(np.ones((9, 2)), 0.5, capacity=4)
    case.log_size[0, 1::2] = PAD
    actual = run(case)
    assert actual.kept_index.tolist() == [[0, 2, 4, 6]]
    assert actual.assignment.max() == 3


# --- what follows from it -------------------------------------------------------------------------


def similarities(case: Case, image: int) -> tuple[Array, Array]:
    """float64 similarities of an image's patches, and which patches are valid."""
    patches = case.compared[image, case.prefix :].astype(np.float64)
    norm = np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    features = patches / norm
    return features @ features.T, case.log_size[image, case.prefix :] > PAD / 2


def float_noise(case: Case) -> float:
    """Room for float32 rounding in a dot product of unit vectors."""
    return float(4 * np.sqrt(case.compared.shape[2]) * 2.0**-24)


def heads_of(result: Result, case: Case, image: int) -> Array:
    """The patches that head the slots of an image."""
    filled = result.kept_log_size[image] > PAD / 2
    filled[: case.prefix] = False
    return np.asarray(result.kept_index[image][filled] - case.prefix)


def limit_of(case: Case, image: int) -> float:
    return float(case.threshold[image if len(case.threshold) > 1 else 0])


@settings(REPRODUCIBLE, max_examples=300)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_what_goes_has_an_odd_patch_alike_and_what_stays_has_none(
    case: Case, dtype: torch.dtype
) -> None:
    case = rounded(dataclasses.replace(case, selection="pairs", capacity=0), dtype)
    result, noise = run(case, dtype), float_noise(case)
    for image in range(len(case.tokens)):
        similarity, valid = similarities(case, image)
        heads, limit = heads_of(result, case, image), limit_of(case, image)
        numbers = np.arange(len(valid))
        odd = numbers[valid & (numbers % 2 == 1)]
        gone = np.setdiff1d(numbers[valid], heads)
        assert set(odd) <= set(heads) <= set(numbers[valid])
        assert len(gone) <= (valid.sum() + 1) // 2
        if not len(odd):
            assert not len(gone)
            continue
        partners = heads[result.assignment[image, case.prefix + gone] - case.prefix]
        assert (partners % 2 == 1).all()
        assert (similarity[gone, partners] >= limit - noise).all()
        stayed = np.setdiff1d(heads, odd)
        assert (similarity[np.ix_(stayed, odd)] < limit + noise).all()


@settings(REPRODUCIBLE, max_examples=150)
@given(EXACT_CASES, st.integers(0, 2**32 - 1))
def test_a_candidate_goes_or_stays_whatever_the_other_candidates_are(case: Case, seed: int) -> None:
    """Not even the number of those that go matters to the others, nor that there are others."""
    case = dataclasses.replace(case, selection="pairs", capacity=0)
    rng = np.random.default_rng(seed)
    own = 2 * int(rng.integers((case.tokens.shape[1] - case.prefix + 1) // 2))
    others = [
        position
        for position in range(case.prefix, case.tokens.shape[1], 2)
        if position != case.prefix + own
    ]
    compared = case.compared.copy()
    kind = rng.choice(["zero", "same", "random", "opposite"])
    if kind == "zero":
        compared[:, others] = 0
    elif kind == "same":
        compared[:, others] = compared[:, case.prefix + own][:, None]
    elif kind == "opposite":
        compared[:, others] *= -1
    else:
        compared[:, others] = rng.standard_normal(compared[:, others].shape)
    before, after = run(case), run(dataclasses.replace(case, features=compared))
    for image in range(len(case.tokens)):
        assert head_of(before, image, case.prefix + own) == head_of(after, image, case.prefix + own)


@settings(REPRODUCIBLE, max_examples=60)
@given(EXACT_CASES)
def test_leaving_out_the_last_candidate_changes_no_other_decision(case: Case) -> None:
    patches = case.tokens.shape[1] - case.prefix
    if patches % 2 == 0 or patches == 1:
        return
    case = dataclasses.replace(case, selection="pairs", capacity=0)
    less = dataclasses.replace(
        case,
        tokens=case.tokens[:, :-1],
        features=case.compared[:, :-1],
        log_size=case.log_size[:, :-1],
    )
    if case.prefix == 0 and (less.log_size <= PAD / 2).all():
        return
    before, after = run(case), run(less)
    for image, position in np.ndindex(*less.log_size.shape):
        assert head_of(before, image, position) == head_of(after, image, position)


def head_of(result: Result, image: int, position: int) -> int | None:
    """The input position of the token that heads the slot which a token went to."""
    slot = result.assignment[image, position]
    return None if slot < 0 else int(result.kept_index[image, slot])


@settings(REPRODUCIBLE, max_examples=100)
@given(EXACT_CASES)
def test_only_the_features_decide(case: Case) -> None:
    """Other tokens, of another width, give the same decisions."""
    rng = np.random.default_rng(case.tokens.shape[1])
    tokens = rng.standard_normal((*case.tokens.shape[:2], 3)).astype(np.float32)
    other = dataclasses.replace(case, tokens=tokens, features=case.compared)
    assert_same_decisions(run(other), run(case))
    assert_same(run(other), other.expected(), 3e-6)


@settings(REPRODUCIBLE, max_examples=150)
@given(RANDOM_CASES)
def test_a_capacity_is_kept_exactly(case: Case) -> None:
    if not case.capacity:
        case = dataclasses.replace(case, capacity=case.tokens.shape[1] - case.prefix)
    result = run(case)
    assert result.kept_index.shape[1] == case.prefix + case.capacity
    for image in range(len(case.tokens)):
        valid = int((case.log_size[image, case.prefix :] > PAD / 2).sum())
        assert len(heads_of(result, case, image)) == min(valid, case.capacity)


@settings(REPRODUCIBLE, max_examples=100)
@given(RANDOM_CASES)
def test_redundancy_leaves_one_at_least(case: Case) -> None:
    lowest = np.full_like(case.threshold, -1.5)
    case = dataclasses.replace(case, selection="redundancy", capacity=0, threshold=lowest)
    result = run(case)
    for image in range(len(case.tokens)):
        any_valid = (case.log_size[image, case.prefix :] > PAD / 2).any()
        assert len(heads_of(result, case, image)) == int(any_valid)


@settings(REPRODUCIBLE, max_examples=100)
@given(ATTRIBUTES, st.sampled_from([np.nan, np.inf, 1e30, 0.0]))
def test_indices_stay_in_range_on_what_is_outside_the_definition(
    attributes: dict[str, Any], value: float
) -> None:
    """Padding among the patches, and features and tokens that are not finite."""
    case = random_case(**{**attributes, "padding": "holes"})
    rng = np.random.default_rng(attributes["seed"])
    compared = case.compared.copy()
    compared[rng.random(compared.shape) < 0.2] = value
    case = dataclasses.replace(case, features=compared)
    result = run(case)
    slots = result.kept_index.shape[1]
    assert result.kept_index.min(initial=0) >= 0
    assert result.kept_index.max(initial=0) < case.tokens.shape[1]
    assert result.assignment.min() >= -1
    assert result.assignment.max() < slots
    assert slots == case.prefix + case.capacity or not case.capacity


@settings(REPRODUCIBLE, max_examples=250)
@given(RANDOM_CASES, st.sampled_from(FLOAT_TYPES))
def test_every_pruned_patch_goes_to_the_one_most_like_it(case: Case, dtype: torch.dtype) -> None:
    case = rounded(case, dtype)
    result, noise = run(case, dtype), float_noise(case)
    for image in range(len(case.tokens)):
        similarity, valid = similarities(case, image)
        heads = heads_of(result, case, image)
        assert bool(valid.any()) == bool(len(heads))
        slots = result.assignment[image, case.prefix :]
        assert ((slots >= 0) == valid).all()
        np.testing.assert_array_equal(slots[heads], case.prefix + np.arange(len(heads)))
        takers = heads[heads % 2 == 1] if case.selection == "pairs" else heads
        for patch in np.setdiff1d(np.flatnonzero(valid), heads):
            chosen = heads[slots[patch] - case.prefix]
            assert chosen in takers
            assert similarity[patch, chosen] >= similarity[patch, takers].max() - noise


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
    tokens, features, log_size, _ = tensors(case, dtype)
    tokens[:, :, 0] *= -0.0  # -0 too comes out as it went in
    log_size = torch.where(log_size > PAD / 2, log_size, 0.5)
    limit = torch.tensor([threshold])
    attributes = {**case.attributes, "capacity": 0}
    kept_tokens, kept_log_size, kept_index, assignment = similarity_prune(
        tokens, features, log_size, limit, **attributes
    )
    everywhere = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
    assert torch.equal(kept_tokens, tokens)
    assert torch.equal(kept_tokens.signbit(), tokens.signbit())
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
@given(EXACT_CASES)
def test_an_image_does_not_depend_on_the_padding_behind_it(case: Case) -> None:
    padded = run(dataclasses.replace(case, capacity=0, multiple_of=1))
    for image in range(len(case.tokens)):
        valid = case.log_size[image] > PAD / 2
        valid[: case.prefix] = True
        length = int(valid.sum())
        if length == case.prefix:
            continue
        one = dataclasses.replace(case.image(image), capacity=0, multiple_of=1)
        bare = run(
            dataclasses.replace(
                one,
                tokens=one.tokens[:, :length],
                features=one.compared[:, :length],
                log_size=one.log_size[:, :length],
            )
        )
        slots = bare.kept_index.shape[1]
        np.testing.assert_array_equal(bare.assignment[0], padded.assignment[image, :length])
        np.testing.assert_array_equal(bare.kept_index[0], padded.kept_index[image, :slots])


@settings(REPRODUCIBLE, max_examples=100)
@given(EXACT_CASES, st.sampled_from([0.0, 1.0, -37.5]))
def test_the_contents_of_padding_do_not_matter(case: Case, value: float) -> None:
    other = dataclasses.replace(case, tokens=case.tokens.copy(), features=case.compared.copy())
    padding = case.log_size <= PAD / 2
    padding[:, : case.prefix] = False
    other.tokens[padding] = value
    other.features[padding] = value  # type: ignore[index]
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
    other = dataclasses.replace(case, tokens=case.tokens.copy(), features=case.compared.copy())
    other.tokens[:, : case.prefix] = case.tokens[:, -1:]
    other.features[:, : case.prefix] = case.compared[:, -1:]  # type: ignore[index]
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
    least, most = capacities_of(room, case.selection)
    capacity = min(max(case.capacity, least), most) if case.capacity else 0
    attributes = {**case.attributes, "capacity": capacity}
    limit = torch.from_numpy(case.threshold) - 0.2
    _, log_size, _, second = similarity_prune(
        kept_tokens, kept_tokens, kept_log_size, limit, **attributes
    )
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
    for capacity in (0, 12)
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
    tokens, _, log_size, threshold = tensors(case)
    turned = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([log_size, log_size + 1], 2)[:, :, 0]
    a_part = torch.cat([tokens, tokens], 2)[:, :, : tokens.shape[2]]
    for strided in (turned, every_other, a_part):
        assert not strided.is_contiguous()
    strided = similarity_prune(turned, a_part, every_other, threshold, **case.attributes)
    plain = similarity_prune(tokens, tokens, log_size, threshold, **case.attributes)
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


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        # numbers that the host reads, and shapes that depend on data
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("selection", "reduction", "capacity"), VARIANTS)
def test_the_host_waits_for_the_count_alone(selection: str, reduction: str, capacity: int) -> None:
    case = random_case(5, selection=selection, reduction=reduction, capacity=capacity)
    with Waits() as waits:
        operator._reference(*tensors(case), 1, selection, reduction, case.capacity, 1)
    assert waits.count == (0 if capacity else 1)


class _ThreeLayers(torch.nn.Module):
    """Chained prune layers, as a model has them; features of their own width."""

    def __init__(self, selection: str, capacities: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.selection, self.capacities = selection, capacities
        self.keys = torch.nn.ModuleList(torch.nn.Linear(8, 4) for _ in capacities)

    def forward(self, x: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_size = x.new_zeros(x.shape[:2])
        for keys, capacity in zip(self.keys, self.capacities, strict=True):
            x, log_size, _, _ = similarity_prune(
                x, keys(x), log_size, threshold, 1, self.selection, capacity=capacity
            )
            x = x + log_size[:, :, None]
        return x.sum(1), log_size


@pytest.mark.parametrize(
    ("selection", "capacities"),
    [("pairs", (0, 0, 0)), ("pairs", (12, 8, 4)), ("redundancy", (0, 0, 0))],
)
def test_chained_layers_can_be_exported(selection: str, capacities: tuple[int, ...]) -> None:
    model = _ThreeLayers(selection, capacities).eval()
    generator = torch.Generator().manual_seed(1)
    example = (torch.randn(2, 17, 8, generator=generator), torch.tensor([0.3]))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, example, dynamic_shapes=({0: batch}, None))
    calls = [node for node in program.graph.nodes if "similarity_prune" in str(node.target)]
    assert len(calls) == 3
    for size in (1, 2, 5):
        x = torch.randn(size, 17, 8, generator=generator)
        exported, plain = program.module()(x, example[1]), model(x, example[1])
        for one, other in zip(exported, plain, strict=True):
            torch.testing.assert_close(one, other)


def small_case(reduction: str, capacity: int) -> Case:
    """Two images with padding, of which some patches go."""
    rng = np.random.default_rng(11)
    features = np.eye(4)[np.array([[0, 0, 0, 2, 1, 1, 3], [0, 2, 2, 1, 0, 3, 3]])]
    features += 0.1 * rng.standard_normal(features.shape)
    tokens = rng.standard_normal((2, 7, 3)).astype(np.float32)
    log_size = np.log(rng.integers(1, 5, (2, 7))).astype(np.float32)
    log_size[1, 5:] = PAD
    return Case(
        tokens,
        log_size,
        np.float32([0.7]),
        1,
        reduction=reduction,
        capacity=capacity,
        features=features.astype(np.float32),
    )


@pytest.mark.parametrize("capacity", [0, 3, 5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_tokens_pass_gradcheck(reduction: str, capacity: int) -> None:
    case = small_case(reduction, capacity)
    _, features, log_size, threshold = tensors(case, torch.float64)

    def prune_tokens(tokens: torch.Tensor) -> torch.Tensor:
        return similarity_prune(tokens, features, log_size, threshold, **case.attributes)[0]

    tokens = torch.from_numpy(case.tokens).double().requires_grad_()
    assert torch.autograd.gradcheck(prune_tokens, tokens, atol=1e-6)


@pytest.mark.parametrize("capacity", [0, 3, 5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_log_sizes_pass_gradcheck(reduction: str, capacity: int) -> None:
    """log_size is float32, so the finite step is large; no decision depends on it."""
    case = small_case(reduction, capacity)
    tokens, features, log_size, threshold = tensors(case, torch.float64)

    def prune_sizes(log_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = log_size.float()
        return similarity_prune(tokens, features, sizes, threshold, **case.attributes)[:2]

    leaf = log_size.double().requires_grad_()
    # a step of PAD's own rounding is visible there: those are constants
    assert torch.autograd.gradcheck(prune_sizes, leaf, eps=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_compared_gets_no_gradient(selection: str) -> None:
    case = random_case(3, selection=selection, threshold=0.3, feature_dim=5)
    tokens, features, log_size, threshold = tensors(case)
    attributes = case.attributes
    tokens.requires_grad_()
    features.requires_grad_()
    similarity_prune(tokens, features, log_size, threshold, **attributes)[0].sum().backward()
    assert tokens.grad is not None
    assert features.grad is None
    # one tensor as both gets that of the merge alone
    both = case.tokens.copy()
    apart, whole = (torch.from_numpy(both.copy()).requires_grad_() for _ in range(2))
    for leaf, compared in ((apart, apart.detach()), (whole, whole)):
        kept = similarity_prune(leaf, compared, log_size, threshold, **attributes)[0]
        kept.square().sum().backward()
    assert torch.equal(apart.grad, whole.grad)  # type: ignore[arg-type]


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
            seed, selection=selection, reduction=reduction, capacity=capacity, patches=14
        )
        tokens, features, log_size, threshold = tensors(case)
        features = features.clone()
        tokens.requires_grad_()
        log_size.requires_grad_()
        kept, kept_log_size, index, assignment = similarity_prune(
            tokens, features, log_size, threshold, **case.attributes
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
    tokens, features, log_size, threshold = tensors(random_case(0, feature_dim=7))
    tokens.requires_grad_()
    _, _, index, assignment = similarity_prune(tokens, features, log_size, threshold, 1)
    assert not index.requires_grad
    assert not assignment.requires_grad


@pytest.mark.parametrize(
    ("selection", "reduction", "capacity", "prefix"),
    [("pairs", "merge", 0, 1), ("pairs", "drop", 4, 0), ("redundancy", "merge", 4, 2)],
)
def test_opcheck_passes(selection: str, reduction: str, capacity: int, prefix: int) -> None:
    case = random_case(
        2,
        prefix=prefix,
        selection=selection,
        reduction=reduction,
        capacity=capacity,
        patches=8,
        feature_dim=6,
    )
    tokens, features, log_size, threshold = tensors(case)
    results = torch.library.opcheck(
        similarity_prune,
        (tokens.requires_grad_(), features, log_size.requires_grad_(), threshold),
        case.attributes,
    )
    assert set(results.values()) == {"SUCCESS"}


def inputs_with(**changes: Any) -> dict[str, Any]:
    values = {
        "tokens": torch.zeros(2, 5, 3),
        "features": torch.zeros(2, 5, 4),
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
        ({"features": torch.zeros(2, 4, 3)}, r"features must be float32\[2, 5, F\]"),
        ({"features": torch.zeros(1, 5, 3)}, "features must be float32"),
        ({"features": torch.zeros(2, 5)}, "features must be float32"),
        ({"features": torch.zeros(2, 5, 3).half()}, "features must be float32"),
        ({"tokens": torch.zeros(2, 5, 3).half()}, "features must be float16"),
        ({"log_size": torch.zeros(2, 4)}, "log_size must be float32"),
        ({"log_size": torch.zeros(5)}, "log_size must be float32"),
        ({"log_size": torch.zeros(2, 5, dtype=torch.float64)}, "log_size must be float32"),
        ({"log_size": torch.zeros(2, 5, dtype=torch.float16)}, "log_size must be float32"),
        ({"threshold": torch.tensor(0.5)}, "threshold must be float32"),
        ({"threshold": torch.zeros(3)}, "threshold must be float32"),
        ({"threshold": torch.zeros(2, 1)}, "threshold must be float32"),
        ({"threshold": torch.zeros(0)}, "threshold must be float32"),
        ({"threshold": torch.zeros(1, dtype=torch.float64)}, "threshold must be float32"),
        (
            {
                "tokens": torch.zeros(0, 5, 3),
                "features": torch.zeros(0, 5, 3),
                "log_size": torch.zeros(0, 5),
            },
            "batch is empty",
        ),
        ({"num_prefix_tokens": -1}, "leaves no patches"),
        ({"num_prefix_tokens": 5}, "leaves no patches"),
        ({"num_prefix_tokens": 6}, "leaves no patches"),
        ({"selection": "cover"}, "selection 'cover'"),
        ({"reduction": "sum"}, "reduction 'sum'"),
        ({"capacity": -1}, "capacity -1"),
        ({"capacity": 1}, r"capacity 1 is outside \[2, 4\], what 'pairs' can leave of 4"),
        ({"capacity": 5}, "capacity 5"),
        ({"capacity": 5, "selection": "redundancy"}, r"capacity 5 is outside \[1, 4\]"),
        ({"num_prefix_tokens": 0, "capacity": 1}, r"capacity 1 is outside \[2, 5\]"),
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
        lambda: inputs_with(capacity=2),
        lambda: inputs_with(capacity=4),
        lambda: inputs_with(num_prefix_tokens=0, capacity=2),
        lambda: inputs_with(num_prefix_tokens=4, capacity=1),
        lambda: inputs_with(capacity=1, selection="redundancy"),
        lambda: inputs_with(features=torch.zeros(2, 5, 1)),
        lambda: inputs_with(multiple_of=100),
    ]
    for build in accepted:
        values = build()
        kept_tokens, _, _, assignment = similarity_prune(**values)
        assert kept_tokens.shape[1] <= 5
        assert assignment.shape == (2, 5)
