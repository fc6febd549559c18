"""The float64 judge: it accepts what the operator does and convicts every planted mistake."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from definition import PAD, SELECTIONS, Array, Case, exact_case, random_case
from hypothesis import given, settings
from hypothesis import strategies as st

from simprune_deploy.parity.decisions import (
    broken_structure,
    compared_similarities,
    float_noise,
    has_finite_features,
    kept_at_threshold,
    similarity_matrix,
    violation,
)
from simprune_deploy.predict.records import PruneRecord
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.operator import similarity_prune

REPRODUCIBLE = settings(deadline=None, derandomize=True, database=None)
EXACT = 1e-12
"""Room for float64 rounding in margins that are known."""


def config_of(case: Case) -> PruneConfig:
    return PruneConfig(
        layers=(0,),
        selection=case.selection,  # type: ignore[arg-type]
        capacities=(case.capacity,) if case.capacity else (),
    )


def records_of(case: Case, dtype: torch.dtype = torch.float32) -> list[PruneRecord]:
    """What the operator decided on each image of a case."""
    tokens, features = (torch.from_numpy(x).to(dtype) for x in (case.tokens, case.compared))
    others = (torch.from_numpy(case.log_size), torch.from_numpy(case.threshold))
    _, _, kept_index, assignment = similarity_prune(tokens, features, *others, **case.attributes)
    return [
        PruneRecord(
            features=features[image].double().numpy(),
            log_size=case.log_size[image],
            threshold=float(case.threshold[image if len(case.threshold) > 1 else 0]),
            kept_index=kept_index[image].numpy(),
            assignment=assignment[image].numpy(),
        )
        for image in range(len(case.tokens))
    ]


def judge(case: Case, record: PruneRecord) -> float:
    return violation(record, config_of(case), case.capacity, case.prefix)


def changed(record: PruneRecord, **values: Any) -> PruneRecord:
    return dataclasses.replace(record, **{name: np.array(v) for name, v in values.items()})


def decided(record: PruneRecord, gone: dict[int, int], prefix: int, slots: int) -> PruneRecord:
    """The record as if the patches in `gone` had gone to those given there, and no others."""
    valid = np.flatnonzero(record.log_size[prefix:] > PAD / 2)
    kept = [int(i) for i in valid if i not in gone]
    kept_index = np.zeros(slots, np.int64)
    kept_index[:prefix] = np.arange(prefix)
    kept_index[prefix : prefix + len(kept)] = prefix + np.asarray(kept)
    assignment = np.full(len(record.log_size), -1, np.int64)
    assignment[:prefix] = np.arange(prefix)
    for patch in valid:
        assignment[prefix + patch] = prefix + kept.index(gone.get(int(patch), int(patch)))
    return changed(record, kept_index=kept_index, assignment=assignment)


def gone_of(record: PruneRecord, prefix: int) -> dict[int, int]:
    """The patches that went, and where to."""
    heads = record.kept_index[np.maximum(record.assignment, 0)] - prefix
    return {
        patch: int(heads[prefix + patch])
        for patch in range(len(heads) - prefix)
        if record.assignment[prefix + patch] >= 0 and heads[prefix + patch] != patch
    }


# --- it accepts what is right ---------------------------------------------------------------------

CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "batch": st.integers(1, 3),
        "patches": st.integers(1, 24),
        "prefix": st.integers(0, 3),
        "selection": st.sampled_from(SELECTIONS),
        "capacity": st.one_of(st.just(0), st.integers(1, 24)),
        "multiple_of": st.sampled_from([1, 4]),
        "feature_dim": st.sampled_from([None, 16, 40]),
    }
)


@settings(REPRODUCIBLE, max_examples=400)
@given(CASES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_operator_on_random_data_is_right_within_float_noise(
    values: dict[str, Any], dtype: torch.dtype
) -> None:
    case = random_case(**values)
    for record in records_of(case, dtype):
        assert broken_structure(record, case.prefix, case.selection) is None
        assert judge(case, record) <= float_noise(case.compared.shape[2])


@settings(REPRODUCIBLE, max_examples=300)
@given(CASES)
def test_the_operator_on_exact_data_is_right_without_any_noise(values: dict[str, Any]) -> None:
    case = exact_case(**values)
    for record in records_of(case):
        # a mean of similarities is rounded, everything else is exact
        assert judge(case, record) <= (1e-7 if case.selection == "redundancy" else 0)


@settings(REPRODUCIBLE, max_examples=200)
@given(CASES)
def test_what_would_stay_at_the_threshold_is_what_stays_with_dynamic_counts(
    values: dict[str, Any],
) -> None:
    """Whatever capacity the layer itself has."""
    make = exact_case if values["selection"] == "pairs" else random_case
    case = make(**values)
    dynamic = records_of(dataclasses.replace(case, capacity=0, multiple_of=1))
    for record, free in zip(records_of(case), dynamic, strict=True):
        found = kept_at_threshold(record, config_of(case), case.prefix)
        assert found == len(free.heads()) - case.prefix


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_image_of_padding_alone_is_right(selection: str) -> None:
    case = exact_case(0, batch=2, prefix=1, selection=selection, padding="none")
    case.log_size[1, 1:] = PAD
    assert judge(case, records_of(case)[1]) == 0


def test_float_noise_grows_with_the_square_root_of_the_width() -> None:
    assert float_noise(384) == pytest.approx(4.67e-6, rel=1e-2)
    assert float_noise(400) == pytest.approx(2 * float_noise(100))


def test_only_what_decides_is_compared() -> None:
    features = np.random.default_rng(0).standard_normal((8, 5))
    whole = similarity_matrix(features, 1)
    assert whole.shape == (7, 7)
    np.testing.assert_allclose(np.diag(whole), 1)
    np.testing.assert_array_equal(compared_similarities(features, 1, "redundancy"), whole)
    halves = compared_similarities(features, 1, "pairs")
    np.testing.assert_allclose(halves, whole[::2, 1::2], atol=EXACT)


def test_a_decision_within_noise_of_the_threshold_may_go_either_way() -> None:
    """Both outcomes are accepted, each with its distance from the threshold."""
    angle = math.acos(0.8)
    features = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    both = PruneRecord(features, np.zeros(2), 0.8 - 3e-7, np.array([0, 1]), np.array([0, 1]))
    one = PruneRecord(features, np.zeros(2), 0.8 - 3e-7, np.array([1]), np.array([0, 0]))
    assert violation(both, PAIRS, 0, 0) == pytest.approx(3e-7, rel=1e-6)
    assert violation(one, PAIRS, 0, 0) == 0


def near_ties(seed: int, width: int) -> Array:
    """features float32[1, 41, width]: candidates as alike one odd patch as another, nearly.

    All entries are positive, so that errors of a sum do not cancel.
    """
    rng = np.random.default_rng(seed)
    odd = np.abs(rng.standard_normal((20, width))) + 0.1
    odd /= np.linalg.norm(odd, axis=1, keepdims=True)
    first, second = rng.integers(20, size=(2, 21))
    even = odd[first] + odd[second] + 1e-7 * rng.standard_normal((21, width))
    even[::3] = odd[first[::3]] * (1 + 1e-7)
    features = np.zeros((41, width))
    features[::2], features[1::2] = even, odd
    return np.float32(features * np.exp(3 * rng.standard_normal((41, 1))))[None]


@pytest.mark.parametrize("width", [16, 64, 384, 1024])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("capacity", [0, 27])
def test_the_operator_is_right_within_noise_where_everything_is_near_a_tie(
    capacity: int, selection: str, width: int
) -> None:
    for seed in range(6):
        features = near_ties(seed, width)
        similarity = similarity_matrix(features[0], 0)
        scores = (similarity.sum(1) - 1) / 40 if selection == "redundancy" else similarity[0, 1::2]
        case = Case(
            tokens=np.zeros((1, 41, 2), np.float32),
            log_size=np.zeros((1, 41), np.float32),
            # at a similarity, as float32 has it
            threshold=np.float32([np.sort(scores)[len(scores) // 2]]),
            prefix=0,
            selection=selection,
            capacity=capacity,
            features=features,
        )
        (record,) = records_of(case)
        assert judge(case, record) <= float_noise(width)


# --- it convicts what is wrong, by the right margin -----------------------------------------------


def similar_rows(cosines: list[list[float]]) -> Array:
    """Vectors with the given cosine similarities."""
    return np.linalg.cholesky(np.asarray(cosines))


COSINES = [
    [1.0, 0.9, 0.25, 0.2, 0.5],
    [0.9, 1.0, 0.3, 0.25, 0.6],
    [0.25, 0.3, 1.0, 0.8, 0.35],
    [0.2, 0.25, 0.8, 1.0, 0.5],
    [0.5, 0.6, 0.35, 0.5, 1.0],
]
"""At 0.7 patch 0 goes to patch 1 and patch 2 to patch 3; patch 4 is at 0.6 to patch 1."""

SCORES = (np.asarray(COSINES).sum(1) - 1) / 4
"""Of "redundancy": 0.4625, 0.5125, 0.425, 0.4375, 0.4875."""


def known(prefix: int = 0, threshold: float = 0.7) -> PruneRecord:
    features = np.concatenate([np.ones((prefix, 5)), similar_rows(COSINES)])
    empty = np.zeros(0, np.int64)
    record = PruneRecord(features, np.zeros(prefix + 5), threshold, empty, empty)
    return decided(record, {0: 1, 2: 3}, prefix, prefix + 3)


def by_redundancy(record: PruneRecord, gone: list[int], prefix: int) -> PruneRecord:
    """The record as if these had gone, each to the one most like it."""
    stayed = [patch for patch in range(5) if patch not in gone]
    similarity = np.asarray(COSINES)
    heads = {patch: stayed[int(similarity[patch, stayed].argmax())] for patch in gone}
    return decided(record, heads, prefix, prefix + len(stayed))


@pytest.fixture(params=[0, 1, 4])
def prefix(request: pytest.FixtureRequest) -> int:
    return int(request.param)


PAIRS = PruneConfig(layers=(0,))
REDUNDANCY = PruneConfig(layers=(0,), selection="redundancy")


def test_the_right_decisions_of_the_known_image_are_accepted(prefix: int) -> None:
    assert violation(known(prefix), PAIRS, 0, prefix) <= EXACT


@pytest.mark.parametrize(
    ("gone", "margin"),
    [
        ({}, 0.9 - 0.7),
        ({2: 3}, 0.9 - 0.7),  # patch 0 stays
        ({0: 1}, 0.8 - 0.7),  # patch 2 stays
        ({0: 1, 2: 3, 4: 1}, 0.7 - 0.6),  # patch 4 goes
        ({0: 1, 2: 3, 4: 3}, 0.6 - 0.5),  # and to the wrong one
        ({0: 3, 2: 3}, 0.9 - 0.2),
        ({0: 1, 2: 1}, 0.8 - 0.3),
        ({0: 3, 2: 1, 4: 1}, 0.9 - 0.2),
        ({1: 3}, math.inf),  # an odd one goes
        ({0: 1, 3: 1, 2: 1}, math.inf),
        ({0: 1, 2: 4}, math.inf),  # to an even one
    ],
)
def test_a_wrong_choice_of_pairs_is_convicted_by_its_margin(
    gone: dict[int, int], margin: float, prefix: int
) -> None:
    wrong = decided(known(prefix), gone, prefix, prefix + 5 - len(gone))
    assert violation(wrong, PAIRS, 0, prefix) == pytest.approx(margin, abs=EXACT)


@pytest.mark.parametrize(("capacity", "right"), [(2, [0, 2, 4]), (3, [0, 2]), (4, [0]), (5, [])])
@pytest.mark.parametrize("threshold", [-1.0, 0.7, 2.0, math.nan])
def test_of_all_sets_of_capacity_size_only_the_right_one_is_accepted(
    capacity: int, right: list[int], threshold: float, prefix: int
) -> None:
    config = dataclasses.replace(PAIRS, capacities=(capacity,))
    best = {0: 0.9, 2: 0.8, 4: 0.6}
    partner = {0: 1, 2: 3, 4: 1}
    for count in range(4):
        for going in itertools.combinations(best, count):
            gone = {patch: partner[patch] for patch in going}
            record = decided(known(prefix, threshold), gone, prefix, prefix + 5)
            margin = violation(record, config, capacity, prefix)
            if count != 5 - capacity:
                assert margin == math.inf
            elif list(going) == right:
                assert margin == 0
            else:
                stayed = max(best[patch] for patch in best if patch not in going)
                left = min(best[patch] for patch in going)
                assert margin == pytest.approx(stayed - left, abs=EXACT)
                assert margin >= 0.1 - EXACT


def test_with_a_capacity_the_wrong_partner_is_convicted_too(prefix: int) -> None:
    config = dataclasses.replace(PAIRS, capacities=(4,))
    wrong = decided(known(prefix), {0: 3}, prefix, prefix + 4)
    assert violation(wrong, config, 4, prefix) == pytest.approx(0.9 - 0.2, abs=EXACT)


def test_padding_counts_for_no_capacity(prefix: int) -> None:
    """Of three valid patches and a capacity of two one goes, whatever lies behind them."""
    record = known(prefix)
    log_size = record.log_size.copy()
    log_size[prefix + 3 :] = PAD
    features = record.features.copy()
    features[prefix + 3 :] = math.nan
    record = changed(record, log_size=log_size, features=features)
    config = dataclasses.replace(PAIRS, capacities=(2,))
    right = decided(record, {0: 1}, prefix, prefix + 2)
    assert violation(right, config, 2, prefix) == 0
    assert violation(right, PAIRS, 0, prefix) == 0
    wrong = decided(record, {2: 1}, prefix, prefix + 2)
    assert violation(wrong, config, 2, prefix) == pytest.approx(0.9 - 0.3, abs=EXACT)
    none = decided(record, {}, prefix, prefix + 3)
    assert violation(none, config, 2, prefix) == math.inf


@pytest.mark.parametrize(
    ("gone", "margin"),
    [
        ([0, 1, 4], 0),
        ([1, 4], 0.4625 - 0.45),
        ([0, 4], 0.5125 - 0.45),
        ([0, 1, 2, 4], 0.45 - 0.425),
        ([0, 1, 2, 3], 0.4875 - 0.45),
    ],
)
def test_a_patch_too_few_or_too_many_by_redundancy_is_convicted(
    gone: list[int], margin: float, prefix: int
) -> None:
    record = by_redundancy(known(prefix, 0.45), gone, prefix)
    assert violation(record, REDUNDANCY, 0, prefix) == pytest.approx(margin, abs=EXACT)


@pytest.mark.parametrize(
    ("heads", "margin"),
    [
        ({0: 2, 1: 2, 4: 3}, 0),
        ({0: 2, 1: 3, 4: 3}, 0.3 - 0.25),
        ({0: 2, 1: 3, 4: 2}, 0.5 - 0.35),
    ],
)
def test_a_wrong_head_by_redundancy_is_convicted_by_the_gap_to_the_best(
    heads: dict[int, int], margin: float, prefix: int
) -> None:
    record = decided(known(prefix, 0.45), heads, prefix, prefix + 2)
    assert violation(record, REDUNDANCY, 0, prefix) == pytest.approx(margin, abs=EXACT)


def test_the_one_that_redundancy_saves_is_the_least_redundant(prefix: int) -> None:
    for saved in range(5):
        gone = [patch for patch in range(5) if patch != saved]
        record = by_redundancy(known(prefix, -0.5), gone, prefix)
        margin = violation(record, REDUNDANCY, 0, prefix)
        assert margin == pytest.approx(SCORES[saved] - SCORES.min(), abs=EXACT)


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5])
def test_of_all_sets_the_most_redundant_go_with_a_capacity(capacity: int, prefix: int) -> None:
    config = dataclasses.replace(REDUNDANCY, capacities=(capacity,))
    right = np.sort(np.argsort(-SCORES)[: 5 - capacity]).tolist()
    for count in range(5):
        for going in map(list, itertools.combinations(range(5), count)):
            record = by_redundancy(known(prefix, 2.0), going, prefix)
            margin = violation(record, config, capacity, prefix)
            if count != 5 - capacity:
                assert margin == math.inf
                continue
            assert (margin <= EXACT) == (going == right)
            if going != right:
                stayed = max(score for patch, score in enumerate(SCORES) if patch not in going)
                assert margin == pytest.approx(stayed - SCORES[going].min(), abs=EXACT)


@pytest.mark.parametrize("config", [PAIRS, REDUNDANCY])
def test_nothing_goes_at_a_threshold_that_is_not_a_number(config: PruneConfig, prefix: int) -> None:
    record = known(prefix, math.nan)
    assert violation(decided(record, {}, prefix, prefix + 5), config, 0, prefix) == 0
    assert violation(record, config, 0, prefix) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_never_right(value: float, prefix: int) -> None:
    record = known(prefix)
    features = record.features.copy()
    features[prefix + 2, 1] = value
    wrong = changed(record, features=features)
    assert not has_finite_features(wrong)
    assert violation(wrong, PAIRS, 0, prefix) == math.inf
    assert has_finite_features(dataclasses.replace(wrong, features=None))
    assert has_finite_features(record)


def test_features_whose_square_overflows_float32_are_like_nothing() -> None:
    features = np.array([[1e20, 0], [1e20, 0], [1, 0], [1, 0]])
    record = PruneRecord(features, np.zeros(4), 0.5, np.zeros(0), np.zeros(0))
    assert violation(decided(record, {2: 3}, 0, 3), PAIRS, 0, 0) == 0
    assert violation(decided(record, {0: 1, 2: 3}, 0, 2), PAIRS, 0, 0) == pytest.approx(0.5)


def swap_slots(record: PruneRecord) -> PruneRecord:
    index, assignment = record.kept_index.copy(), record.assignment.copy()
    index[[-1, -2]] = index[[-2, -1]]
    last = len(index) - 1
    assignment = np.select(
        [assignment == last, assignment == last - 1], [last - 1, last], assignment
    )
    return changed(record, kept_index=index, assignment=assignment)


def set_assignment(position: int, value: int) -> Callable[[PruneRecord], PruneRecord]:
    def change(record: PruneRecord) -> PruneRecord:
        assignment = record.assignment.copy()
        assignment[position] = value
        return changed(record, assignment=assignment)

    return change


def set_index(position: int, value: int) -> Callable[[PruneRecord], PruneRecord]:
    def change(record: PruneRecord) -> PruneRecord:
        kept_index = record.kept_index.copy()
        kept_index[position] = value
        return changed(record, kept_index=kept_index)

    return change


def with_padding() -> PruneRecord:
    """The known image behind a prefix token, with one padding token and one padding slot."""
    record = known(1)
    log_size = np.append(record.log_size, PAD)
    features = np.concatenate([record.features, np.zeros((1, 5))])
    return changed(
        record,
        features=features,
        log_size=log_size,
        kept_index=np.append(record.kept_index, 0),
        assignment=np.append(record.assignment, -1),
    )


def test_the_padded_image_is_accepted_as_it_is() -> None:
    record = with_padding()
    assert record.kept_index.tolist() == [0, 2, 4, 5, 0]
    assert record.assignment.tolist() == [0, 1, 1, 2, 2, 3, -1]
    assert broken_structure(record, 1, "pairs") is None
    assert violation(record, PAIRS, 0, 1) <= EXACT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_assignment(6, 1), "-1 elsewhere"),
        (set_assignment(3, -1), "-1 elsewhere"),
        (set_assignment(0, -1), "-1 elsewhere"),
        (set_assignment(6, -2), "assignment"),
        (set_assignment(3, 0), "assigned to a prefix token"),
        (set_assignment(3, 5), "slot that does not exist"),
        (set_assignment(3, 3), "went to one with an even number"),
        (set_assignment(0, 1), "not assigned to its own slot"),
        (set_assignment(2, 2), "not assigned to its own slot"),
        (set_index(0, 1), "prefix tokens moved"),
        (set_index(2, 1), "ascending"),
        (set_index(2, 3), "odd number went"),
        (set_index(1, 1), "odd number went"),
        (set_index(4, 3), "padding slot has an index"),
        (lambda record: swap_slots(known(1)), "ascending"),
        (
            lambda record: changed(record, kept_index=[0], assignment=[0, 0, 0, 0, 0, 0, -1]),
            "no patch was kept",
        ),
    ],
)
def test_broken_indices_have_no_margin_that_excuses_them(
    change: Callable[[PruneRecord], PruneRecord], reason: str
) -> None:
    wrong = change(with_padding())
    found = broken_structure(wrong, 1, "pairs")
    assert found is not None
    assert reason in found
    assert violation(wrong, PAIRS, 0, 1) == math.inf


def test_odd_and_even_matter_to_pairs_alone() -> None:
    wrong = set_index(2, 3)(with_padding())
    for selection in (None, "redundancy"):
        assert broken_structure(wrong, 1, selection) is None


def test_a_patch_assigned_to_a_prefix_token_is_never_right() -> None:
    """Not even where the last patch is the right head, one before the first if counted round."""
    features = np.concatenate([np.ones((1, 2)), similar_rows([[1.0, 0.8], [0.8, 1.0]])])
    record = PruneRecord(features, np.zeros(3), 0.7, np.array([0, 2]), np.array([0, 1, 1]))
    assert violation(record, PAIRS, 0, 1) <= EXACT
    assert violation(set_assignment(1, 0)(record), PAIRS, 0, 1) == math.inf


@settings(REPRODUCIBLE, max_examples=300)
@given(CASES, st.integers(0, 2**32 - 1))
def test_a_random_mistake_on_random_data_is_convicted(values: dict[str, Any], seed: int) -> None:
    """One that stays, one that goes, another head: wrong by what it says in float64."""
    fixed = {"capacity": 0, "batch": 1, "threshold": 0.6, "padding": "none", "selection": "pairs"}
    case = random_case(**{**values, **fixed})
    prefix, patches = case.prefix, case.tokens.shape[1] - case.prefix
    rng = np.random.default_rng(seed)
    (record,) = records_of(case)
    gone = gone_of(record, prefix)
    similarity = similarity_matrix(record.features, prefix)
    odd = np.arange(1, patches, 2)

    def margin(decisions: dict[int, int]) -> float:
        return judge(case, decided(record, decisions, prefix, prefix + patches - len(decisions)))

    assert margin(gone) <= 2e-6
    if gone:
        patch = int(rng.choice(list(gone)))
        fewer = {each: head for each, head in gone.items() if each != patch}
        best = similarity[patch, odd].max()
        assert margin(fewer) == pytest.approx(best - 0.6, abs=2e-6)
        other = int(rng.choice(odd))
        gap = best - similarity[patch, other]
        assert margin({**gone, patch: other}) == pytest.approx(gap, abs=2e-6)
    if len(odd) and (stayed := [patch for patch in range(0, patches, 2) if patch not in gone]):
        patch = int(rng.choice(stayed))
        best = similarity[patch, odd].max()
        more = {**gone, patch: int(odd[similarity[patch, odd].argmax()])}
        assert margin(more) == pytest.approx(0.6 - best, abs=2e-6)


@settings(REPRODUCIBLE, max_examples=150)
@given(CASES, st.integers(0, 2**32 - 1))
def test_a_random_mistake_of_redundancy_is_convicted(values: dict[str, Any], seed: int) -> None:
    fixed = {"capacity": 0, "batch": 1, "padding": "none", "selection": "redundancy"}
    case = random_case(**{**values, **fixed})
    prefix, patches = case.prefix, case.tokens.shape[1] - case.prefix
    if patches < 2:
        return
    rng = np.random.default_rng(seed)
    similarity = similarity_matrix(case.compared[0], prefix)
    scores = (similarity.sum(1) - 1) / (patches - 1)
    middle = float(np.sort(scores)[patches // 2 - 1 : patches // 2 + 1].mean())
    case = dataclasses.replace(case, threshold=np.float32([middle]))
    (record,) = records_of(case)
    gone = gone_of(record, prefix)
    stayed = [patch for patch in range(patches) if patch not in gone]
    patch = int(rng.integers(patches))
    if patch in gone:
        stayed = sorted([*stayed, patch])
    elif len(stayed) > 1:
        stayed.remove(patch)
    else:
        return
    heads = {
        each: stayed[int(similarity[each, stayed].argmax())]
        for each in range(patches)
        if each not in stayed
    }
    wrong = decided(record, heads, prefix, prefix + len(stayed))
    assert judge(case, wrong) == pytest.approx(abs(scores[patch] - middle), abs=2e-6)


@settings(REPRODUCIBLE, max_examples=100)
@given(CASES, st.integers(0, 2**32 - 1))
def test_a_random_mistake_with_a_capacity_is_convicted(values: dict[str, Any], seed: int) -> None:
    """One goes in another's place: wrong by how much less alike its partner it is."""
    fixed = {"batch": 1, "padding": "none", "selection": "pairs", "capacity": 1}
    case = random_case(**{**values, **fixed})
    prefix, patches = case.prefix, case.tokens.shape[1] - case.prefix
    rng = np.random.default_rng(seed)
    case = dataclasses.replace(case, capacity=int(rng.integers(max(1, patches // 2), patches + 1)))
    (record,) = records_of(case)
    gone = gone_of(record, prefix)
    stayed = [patch for patch in range(0, patches, 2) if patch not in gone]
    if not gone or not stayed:
        return
    similarity = compared_similarities(record.features, prefix, "pairs")
    best, partner = similarity.max(1), 2 * similarity.argmax(1) + 1
    out, into = int(rng.choice(list(gone))), int(rng.choice(stayed))
    swapped = {each: head for each, head in gone.items() if each != out}
    swapped[into] = int(partner[into // 2])
    wrong = decided(record, swapped, prefix, prefix + case.capacity)
    assert judge(case, wrong) == pytest.approx(best[out // 2] - best[into // 2], abs=2e-6)


# --- comparing two records ------------------------------------------------------------------------


def test_padding_that_the_batch_added_does_not_make_decisions_differ() -> None:
    short, long = known(1), with_padding()
    assert short.same_decisions(long)
    assert long.same_decisions(short)


@pytest.mark.parametrize("change", [set_assignment(4, 3), set_index(3, 4), swap_slots])
def test_other_decisions_differ(change: Callable[[PruneRecord], PruneRecord]) -> None:
    assert known(1).same_decisions(known(1))
    assert not known(1).same_decisions(change(known(1)))
    assert not change(known(1)).same_decisions(known(1))
