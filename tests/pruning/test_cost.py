"""What a forward pass costs, counted by hand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simprune_deploy.pruning.cost import (
    BlockShape,
    BlockTokens,
    attention_flops,
    block_flops,
    flops_of,
    flops_share,
    mlp_flops,
    padded_flops_share,
    spread_over_blocks,
    tokens_share,
)

SHAPE = BlockShape(embed_dim=8, mlp_dim=32)


def by_hand(attention: int, mlp: int) -> int:
    """A multiply-add counts as two."""
    projections = 4 * attention * 8 * 8
    scores, mixing = attention * attention * 8, attention * attention * 8
    return 2 * (projections + scores + mixing + mlp * 8 * 32 + mlp * 32 * 8)


def test_a_block_by_hand() -> None:
    assert block_flops(SHAPE, 10) == by_hand(10, 10)
    assert attention_flops(SHAPE, 10) == by_hand(10, 0)
    assert mlp_flops(SHAPE, 10) == by_hand(0, 10)
    assert flops_of(SHAPE, [BlockTokens(10, 6), BlockTokens(6, 6)]) == by_hand(10, 6) + by_hand(
        6, 6
    )


@pytest.mark.parametrize(
    ("place", "attention", "mlp"),
    [("before", (20, 12, 12, 7), (20, 12, 12, 7)), ("inside", (20, 20, 12, 12), (20, 12, 12, 7))],
)
def test_a_layer_inside_a_block_spares_its_mlp(
    place: str, attention: tuple[int, ...], mlp: tuple[int, ...]
) -> None:
    found = spread_over_blocks(20, [1, 3], [12, 7], 4, place)
    assert found == [BlockTokens(*pair) for pair in zip(attention, mlp, strict=True)]
    expected = sum(by_hand(*pair) for pair in zip(attention, mlp, strict=True))
    assert flops_share(SHAPE, 20, found) == pytest.approx(expected / (4 * by_hand(20, 20)))
    assert tokens_share(20, found) == pytest.approx((sum(attention) + sum(mlp)) / 2 / 4 / 20)


def test_without_layers_it_is_dense() -> None:
    for place in ("before", "inside"):
        found = spread_over_blocks(20, [], [], 3, place)
        assert flops_share(SHAPE, 20, found) == 1
        assert tokens_share(20, found) == 1


def test_layers_in_the_first_and_the_last_block() -> None:
    inside = spread_over_blocks(20, [0, 2], [10, 5], 3, "inside")
    assert inside == [BlockTokens(20, 10), BlockTokens(10, 10), BlockTokens(10, 5)]
    before = spread_over_blocks(20, [0, 2], [10, 5], 3, "before")
    assert before == [BlockTokens(10, 10), BlockTokens(10, 10), BlockTokens(5, 5)]


def padded(
    images: Sequence[Sequence[int]],
    batch: int,
    layers: Sequence[int] = (1, 3),
    place: str = "before",
    multiple_of: int = 1,
) -> float:
    """Of a model of 4 blocks and 20 tokens; an image is what its layers keep."""
    kept = [Counter(column) for column in zip(*images, strict=True)]
    return padded_flops_share(SHAPE, 20, layers, kept, 4, place, batch, multiple_of)


def by_enumeration(
    images: Sequence[Sequence[int]],
    batch: int,
    layers: Sequence[int],
    place: str,
    multiple_of: int = 1,
) -> float:
    """All batches there are, each run as the operator pads it."""
    shares = []
    for chosen in itertools.product(images, repeat=batch):
        most = [max(column) for column in zip(*chosen, strict=True)]
        slots = [min(20, -(-each // multiple_of) * multiple_of) for each in most]
        shares.append(flops_share(SHAPE, 20, spread_over_blocks(20, layers, slots, 4, place)))
    return sum(shares) / len(shares)


def test_a_batch_of_two_by_hand() -> None:
    """Of (12, 7) and (8, 8) a quarter of the pairs are 8 at the first layer, and 7 at the last."""
    blocks = {n: by_hand(n, n) for n in (20, 12, 8, 7)}
    first = 0.25 * blocks[8] + 0.75 * blocks[12]
    last = 0.25 * blocks[7] + 0.75 * blocks[8]
    expected = (blocks[20] + 2 * first + last) / (4 * blocks[20])
    assert padded([(12, 7), (8, 8)], 2) == pytest.approx(expected)
    # inside a block its attention sees what came before
    first = 0.25 * by_hand(0, 8) + 0.75 * by_hand(0, 12)  # the MLP of block 1
    first += 0.25 * by_hand(8, 8) + 0.75 * by_hand(12, 12)  # block 2
    first += 0.25 * by_hand(8, 0) + 0.75 * by_hand(12, 0)  # the attention of block 3
    last = 0.25 * by_hand(0, 7) + 0.75 * by_hand(0, 8)
    expected = (blocks[20] + by_hand(20, 0) + first + last) / (4 * blocks[20])
    assert padded([(12, 7), (8, 8)], 2, place="inside") == pytest.approx(expected)


def test_a_fixed_count_is_the_same_in_every_batch() -> None:
    alone = flops_share(SHAPE, 20, spread_over_blocks(20, [1, 3], [12, 7], 4, "before"))
    for batch in (1, 2, 8, 32, 1000):
        assert padded([(12, 7)] * 5, batch) == pytest.approx(alone)
        assert padded_flops_share(SHAPE, 20, [], [], 4, "inside", batch) == 1


def test_slots_are_rounded_up_but_not_beyond_the_dense_model() -> None:
    assert padded([(17, 9), (19, 12)], 1, multiple_of=8) == padded([(20, 16)], 1)
    assert padded([(13, 9), (12, 12)], 3, multiple_of=4) == pytest.approx(
        padded([(16, 12), (12, 12)], 3)
    )


@st.composite
def measured(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[int], str, int]:
    layers = sorted(draw(st.sets(st.integers(0, 3), max_size=3)))
    falling = st.lists(st.integers(1, 20), min_size=len(layers), max_size=len(layers))
    images = draw(st.lists(falling, min_size=1, max_size=4))
    place = draw(st.sampled_from(["before", "inside"]))
    ordered = [tuple(sorted(each, reverse=True)) for each in images]
    return ordered, layers, place, draw(st.integers(1, 6))


@given(measured(), st.integers(1, 3))
def test_it_is_the_mean_over_all_batches(
    found: tuple[list[tuple[int, ...]], list[int], str, int], batch: int
) -> None:
    images, layers, place, multiple_of = found
    share = padded(images, batch, layers, place, multiple_of)
    assert share == pytest.approx(by_enumeration(images, batch, layers, place, multiple_of))


@given(measured())
def test_it_grows_with_the_batch_from_the_mean_to_the_largest(
    found: tuple[list[tuple[int, ...]], list[int], str, int],
) -> None:
    images, layers, place, _ = found
    shares = [padded(images, batch, layers, place) for batch in (1, 2, 3, 8, 32, 10_000)]
    alone = [flops_share(SHAPE, 20, spread_over_blocks(20, layers, n, 4, place)) for n in images]
    assert shares[0] == pytest.approx(sum(alone) / len(alone))
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(shares))
    largest = [max(column) for column in zip(*images, strict=True)]
    whole = flops_share(SHAPE, 20, spread_over_blocks(20, layers, largest, 4, place))
    assert shares[-1] == pytest.approx(whole)
