"""What a forward pass costs, counted by hand."""

from __future__ import annotations

import pytest

from simprune_deploy.pruning.cost import (
    BlockShape,
    BlockTokens,
    attention_flops,
    block_flops,
    flops_of,
    flops_share,
    mlp_flops,
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
