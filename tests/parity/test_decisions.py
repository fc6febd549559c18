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
    float_noise,
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
    tokens = torch.from_numpy(case.tokens).to(dtype)
    _, _, kept_index, assignment = similarity_prune(
        tokens, torch.from_numpy(case.log_size), torch.from_numpy(case.threshold), **case.attributes
    )
    return [
        PruneRecord(
            tokens=tokens[image].double().numpy(),
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


def decided(record: PruneRecord, heads: list[int], prefix: int, slots: int) -> PruneRecord:
    """The record as if `heads` (patches) were kept and every other went to the one most like it."""
    similarity = similarity_matrix(record.tokens, prefix)
    valid = record.log_size[prefix:] > PAD / 2
    kept_index = np.zeros(slots, np.int64)
    kept_index[:prefix] = np.arange(prefix)
    kept_index[prefix : prefix + len(heads)] = prefix + np.asarray(heads)
    assignment = np.full(len(record.log_size), -1, np.int64)
    assignment[:prefix] = np.arange(prefix)
    for patch in np.flatnonzero(valid):
        best = heads.index(patch) if patch in heads else int(similarity[patch, heads].argmax())
        assignment[prefix + patch] = prefix + best
    return changed(record, kept_index=kept_index, assignment=assignment)


def kept_patches(record: PruneRecord, prefix: int) -> list[int]:
    return [int(i) for i in record.heads()[prefix:] - prefix]


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
    }
)


@settings(REPRODUCIBLE, max_examples=400)
@given(CASES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_operator_on_random_data_is_right_within_float_noise(
    values: dict[str, Any], dtype: torch.dtype
) -> None:
    case = random_case(**values)
    for record in records_of(case, dtype):
        assert broken_structure(record, case.prefix) is None
        assert judge(case, record) <= float_noise(case.tokens.shape[2])


@settings(REPRODUCIBLE, max_examples=300)
@given(CASES)
def test_the_operator_on_exact_data_is_right_without_any_noise(values: dict[str, Any]) -> None:
    case = exact_case(**values)
    for record in records_of(case):
        # a mean of similarities is rounded, everything else is exact
        assert judge(case, record) <= (1e-7 if case.selection == "redundancy" else 0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_image_of_padding_alone_is_right(selection: str) -> None:
    case = exact_case(0, batch=2, prefix=1, selection=selection, padding="none")
    case.log_size[1, 1:] = PAD
    assert judge(case, records_of(case)[1]) == 0


def test_float_noise_grows_with_the_square_root_of_the_width() -> None:
    assert float_noise(384) == pytest.approx(4.67e-6, rel=1e-2)
    assert float_noise(400) == pytest.approx(2 * float_noise(100))


def test_a_decision_within_noise_of_the_threshold_may_go_either_way() -> None:
    """Both outcomes are accepted, each with its distance from the threshold."""
    angle = math.acos(0.8)
    tokens = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    both = PruneRecord(tokens, np.zeros(2), 0.8 - 3e-7, np.array([0, 1]), np.array([0, 1]))
    one = PruneRecord(tokens, np.zeros(2), 0.8 - 3e-7, np.array([0]), np.array([0, 0]))
    config = PruneConfig(layers=(0,))
    assert violation(both, config, 0, 0) == pytest.approx(3e-7, rel=1e-6)
    assert violation(one, config, 0, 0) == 0


# --- it convicts what is wrong, by the right margin -----------------------------------------------


def similar_rows(cosines: list[list[float]]) -> Array:
    """Vectors with the given cosine similarities."""
    return np.linalg.cholesky(np.asarray(cosines))


COSINES = [
    [1.0, 0.1, 0.9, 0.2, 0.3],
    [0.1, 1.0, 0.3, 0.8, 0.6],
    [0.9, 0.3, 1.0, 0.25, 0.4],
    [0.2, 0.8, 0.25, 1.0, 0.5],
    [0.3, 0.6, 0.4, 0.5, 1.0],
]
"""At 0.7 the third goes to the first and the fourth to the second."""


def known(prefix: int = 0, threshold: float = 0.7) -> PruneRecord:
    tokens = np.concatenate([np.ones((prefix, 5)), similar_rows(COSINES)])
    empty = np.zeros(0, np.int64)
    record = PruneRecord(tokens, np.zeros(prefix + 5), threshold, empty, empty)
    return decided(record, [0, 1, 4], prefix, prefix + 3)


@pytest.fixture(params=[0, 1, 4])
def prefix(request: pytest.FixtureRequest) -> int:
    return int(request.param)


COVER = PruneConfig(layers=(0,))
REDUNDANCY = PruneConfig(layers=(0,), selection="redundancy")


def test_the_right_decisions_of_the_known_image_are_accepted(prefix: int) -> None:
    assert violation(known(prefix), COVER, 0, prefix) <= EXACT


def test_a_swapped_assignment_is_convicted_by_the_gap_to_the_best(prefix: int) -> None:
    record = known(prefix)
    assignment = record.assignment.copy()
    assignment[prefix + 3] = prefix + 2  # the fifth, at 0.5, instead of the second, at 0.8
    wrong = changed(record, assignment=assignment)
    assert violation(wrong, COVER, 0, prefix) == pytest.approx(0.3, abs=EXACT)


def test_an_extra_kept_patch_is_convicted_by_its_excess_over_the_threshold(prefix: int) -> None:
    wrong = decided(known(prefix), [0, 1, 3, 4], prefix, prefix + 4)
    assert violation(wrong, COVER, 0, prefix) == pytest.approx(0.8 - 0.7, abs=EXACT)
    wrong = decided(known(prefix), [0, 1, 2, 4], prefix, prefix + 4)
    assert violation(wrong, COVER, 0, prefix) == pytest.approx(0.9 - 0.7, abs=EXACT)


def test_a_missing_kept_patch_is_convicted_by_its_distance_from_the_threshold(prefix: int) -> None:
    wrong = decided(known(prefix), [0, 1], prefix, prefix + 2)
    assert violation(wrong, COVER, 0, prefix) == pytest.approx(0.7 - 0.6, abs=EXACT)


def test_a_missing_first_patch_can_never_be_right(prefix: int) -> None:
    """It has nothing before it, so no similarity makes it go."""
    wrong = decided(known(prefix), [1, 2, 4], prefix, prefix + 3)
    assert violation(wrong, COVER, 0, prefix) == math.inf


def test_the_wrong_one_of_two_alike_is_convicted(prefix: int) -> None:
    wrong = decided(known(prefix), [0, 3, 4], prefix, prefix + 3)
    # the second went, though nothing before it is nearer than 0.1
    assert violation(wrong, COVER, 0, prefix) == pytest.approx(0.7 - 0.1, abs=EXACT)


def test_a_patch_kept_by_redundancy_too_few_or_too_many_is_convicted(prefix: int) -> None:
    scores = (np.asarray(COSINES).sum(1) - 1) / 4
    threshold = 0.44
    assert np.flatnonzero(scores < threshold).tolist() == [0, 3]
    right = decided(known(prefix, threshold), [0, 3], prefix, prefix + 2)
    assert violation(right, REDUNDANCY, 0, prefix) == 0
    extra = decided(known(prefix, threshold), [0, 2, 3], prefix, prefix + 3)
    assert violation(extra, REDUNDANCY, 0, prefix) == pytest.approx(
        scores[2] - threshold, abs=EXACT
    )
    missing = decided(known(prefix, threshold), [3], prefix, prefix + 1)
    assert violation(missing, REDUNDANCY, 0, prefix) == pytest.approx(
        threshold - scores[0], abs=EXACT
    )


def test_the_one_that_redundancy_saves_is_the_least_redundant(prefix: int) -> None:
    scores = (np.asarray(COSINES).sum(1) - 1) / 4
    least = int(scores.argmin())
    for saved in range(5):
        record = decided(known(prefix, -0.5), [saved], prefix, prefix + 1)
        margin = violation(record, REDUNDANCY, 0, prefix)
        assert margin == pytest.approx(scores[saved] - scores[least], abs=EXACT)


def test_a_wrong_giving_up_is_convicted_by_the_gap_of_the_two(prefix: int) -> None:
    """Kept at 0.95 are all five; the closest before are none, .1, .9, .8 and .6."""
    record = known(prefix, 0.95)
    config = dataclasses.replace(COVER, capacities=(4,))
    right = decided(record, [0, 1, 3, 4], prefix, prefix + 4)
    assert violation(right, config, 4, prefix) <= EXACT
    wrong = decided(record, [0, 1, 2, 4], prefix, prefix + 4)
    assert violation(wrong, config, 4, prefix) == pytest.approx(0.9 - 0.8, abs=EXACT)
    wrong = decided(record, [0, 2, 3, 4], prefix, prefix + 4)
    assert violation(wrong, config, 4, prefix) == pytest.approx(0.9 - 0.1, abs=EXACT)


@pytest.mark.parametrize(
    ("capacity", "right"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 4]), (4, [0, 1, 3, 4])]
)
def test_of_all_sets_of_capacity_size_only_the_right_one_is_accepted(
    capacity: int, right: list[int], prefix: int
) -> None:
    config = dataclasses.replace(COVER, capacities=(capacity,))
    for heads in itertools.combinations(range(5), capacity):
        record = decided(known(prefix, 0.95), list(heads), prefix, prefix + capacity)
        margin = violation(record, config, capacity, prefix)
        assert (margin <= EXACT) == (list(heads) == right)
        assert margin <= EXACT or margin >= 0.1 - EXACT


def test_fewer_kept_than_the_capacity_allows_is_convicted(prefix: int) -> None:
    """At 0.7 three are kept of a capacity of 4: one less is a mistake, and one more too."""
    config = dataclasses.replace(COVER, capacities=(4,))
    record = known(prefix)
    assert violation(decided(record, [0, 1, 4], prefix, prefix + 4), config, 4, prefix) <= EXACT
    fewer = decided(record, [0, 1], prefix, prefix + 4)
    assert violation(fewer, config, 4, prefix) == pytest.approx(0.1, abs=EXACT)
    more = decided(record, [0, 1, 3, 4], prefix, prefix + 4)
    assert violation(more, config, 4, prefix) == pytest.approx(0.1, abs=EXACT)


def test_more_kept_than_the_capacity_is_never_right(prefix: int) -> None:
    record = decided(known(prefix), [0, 1, 4], prefix, prefix + 3)
    config = dataclasses.replace(COVER, capacities=(2,))
    assert violation(record, config, 2, prefix) == math.inf


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
    tokens = np.concatenate([record.tokens, np.zeros((1, 5))])
    return changed(
        record,
        tokens=tokens,
        log_size=log_size,
        kept_index=np.append(record.kept_index, 0),
        assignment=np.append(record.assignment, -1),
    )


def test_the_padded_image_is_accepted_as_it_is() -> None:
    record = with_padding()
    assert record.kept_index.tolist() == [0, 1, 2, 5, 0]
    assert record.assignment.tolist() == [0, 1, 2, 1, 2, 3, -1]
    assert broken_structure(record, 1) is None
    assert violation(record, COVER, 0, 1) <= EXACT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_assignment(6, 1), "-1 elsewhere"),
        (set_assignment(3, -1), "-1 elsewhere"),
        (set_assignment(0, -1), "-1 elsewhere"),
        (set_assignment(6, -2), "assignment"),
        (set_assignment(4, 0), "assigned to a prefix token"),
        (set_assignment(3, 5), "slot that does not exist"),
        (set_assignment(0, 1), "not assigned to its own slot"),
        (set_assignment(2, 1), "not assigned to its own slot"),
        (set_index(0, 1), "prefix tokens moved"),
        (set_index(2, 1), "ascending"),
        (set_index(2, 3), "not assigned to its own slot"),
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
    found = broken_structure(wrong, 1)
    assert found is not None
    assert reason in found
    assert violation(wrong, COVER, 0, 1) == math.inf


def test_a_patch_assigned_to_a_prefix_token_is_never_right() -> None:
    """Not even where the last patch is the right head, one before the first if counted round."""
    tokens = np.concatenate(
        [np.ones((1, 3)), similar_rows([[1.0, 0.75, 0.3], [0.75, 1.0, 0.8], [0.3, 0.8, 1.0]])]
    )
    kept_index, assignment = np.array([0, 1, 3]), np.array([0, 1, 2, 2])
    record = PruneRecord(tokens, np.zeros(4), 0.7, kept_index, assignment)
    assert violation(record, COVER, 0, 1) <= EXACT
    assert violation(set_assignment(2, 0)(record), COVER, 0, 1) == math.inf


@settings(REPRODUCIBLE, max_examples=300)
@given(CASES, st.integers(0, 2**32 - 1))
def test_a_random_mistake_on_random_data_is_convicted(values: dict[str, Any], seed: int) -> None:
    """A patch more, a patch less, or another head: wrong by what it says in float64."""
    case = random_case(**{**values, "capacity": 0, "batch": 1, "threshold": 0.6, "padding": "none"})
    rng = np.random.default_rng(seed)
    (record,) = records_of(case)
    heads = kept_patches(record, case.prefix)
    pruned = sorted(set(range(case.tokens.shape[1] - case.prefix)) - set(heads))
    similarity = similarity_matrix(record.tokens, case.prefix)
    if pruned:
        patch = int(rng.choice(pruned))
        more = sorted([*heads, patch])
        margin = judge(case, decided(record, more, case.prefix, case.prefix + len(more)))
        if case.selection == "cover":
            before = [j for j in heads if j < patch]
            assert margin >= similarity[patch, before].max() - 0.6 - 1e-6
        assert margin > 0
    if pruned and len(heads) > 1:
        patch = int(rng.choice(pruned))
        right = int(record.assignment[case.prefix + patch]) - case.prefix
        other = int(rng.choice([slot for slot in range(len(heads)) if slot != right]))
        wrong = set_assignment(case.prefix + patch, case.prefix + other)(record)
        gap = similarity[patch, heads[right]] - similarity[patch, heads[other]]
        assert judge(case, wrong) == pytest.approx(gap, abs=2e-6)
    if len(heads) > 1:
        fewer = list(heads)
        fewer.remove(int(rng.choice(heads[1:])))
        assert judge(case, decided(record, fewer, case.prefix, case.prefix + len(fewer))) > 0


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
