"""The calibrated curve: interpolation, its form as ramps, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError
from simprune_deploy.pruning.calibrated_curve import IDENTITY, CalibratedCurve
from simprune_deploy.pruning.config import PruneConfig, resolve_capacities

CURVE = CalibratedCurve((0.5, 0.7), ((0.3, 0.2), (0.1, 0.12)), ((0.7, 0.5), (0.9, 0.8)))


@st.composite
def curves(draw: st.DrawFn) -> CalibratedCurve:
    hundredths = draw(st.sets(st.integers(5, 99), min_size=1, max_size=6))
    layers = draw(st.integers(1, 4))
    number = st.floats(-0.5, 2, width=32)
    rows = st.tuples(*[number] * layers)
    kept = st.lists(st.floats(0.5, 1.0), min_size=layers, max_size=layers)
    shares = tuple(each / 100 for each in sorted(hundredths))
    left = tuple(tuple(map(float, np.cumprod(draw(kept)))) for _ in shares)
    return CalibratedCurve(shares, tuple(draw(rows) for _ in shares), left)


@settings(max_examples=200, deadline=None)
@given(curves(), st.floats(-0.5, 1.5))
def test_ramps_are_the_interpolation(curve: CalibratedCurve, share: float) -> None:
    starts, widths, slopes = (np.array(each) for each in curve.ramps())
    climbed = np.clip(min(share, 1.0) - starts, 0, widths)
    lowest, there = curve.at(0.0), curve.at(share)
    found = np.array([lowest.floor, *lowest.layers]) + climbed @ slopes
    np.testing.assert_allclose(found, [there.floor, *there.layers], atol=1e-9)


@given(curves())
def test_knots_are_met_and_from_one_on_nothing_is_pruned(curve: CalibratedCurve) -> None:
    for share, row in zip(curve.shares, curve.tolerances, strict=True):
        assert curve.at(share).layers == pytest.approx(row)
    for share in (1.0, 1.5, math.nan):
        assert curve.at(share).layers == (IDENTITY,) * curve.num_layers
        # whatever is left of an image
        assert all(curve.at(share).threshold(0, left) > 1 + 1e-5 for left in (0.0, 0.5, 1.0))
    assert curve.at(0.0).layers == curve.tolerances[0]


@given(curves(), st.floats(0.01, 1.5), st.integers(1, 300))
def test_counts_are_some_that_pairs_can_leave(
    curve: CalibratedCurve, share: float, patches: int
) -> None:
    counts = curve.counts(share, patches)
    if patches >> curve.num_layers:  # every layer is reached by two
        assert resolve_capacities(counts, curve.num_layers, patches) == counts
    assert curve.counts(1.0, patches) == (patches,) * curve.num_layers


@given(curves())
def test_it_survives_json(curve: CalibratedCurve) -> None:
    assert CalibratedCurve.from_dict(curve.to_dict()) == curve


def test_a_threshold_is_stricter_where_fewer_patches_are_left() -> None:
    config = PruneConfig(threshold=0.6, layers=(1, 3), curve=CURVE)
    floor = 0.8 * (0.5 + 0.8) / 2
    assert config.layer_threshold(0, 0.6, 1.0) == pytest.approx(0.8)
    assert config.layer_threshold(0, 0.6, (1 + floor) / 2) == pytest.approx(0.9)
    for left in (floor, floor / 2, 0.0):
        assert config.layer_threshold(0, 0.6, left) == pytest.approx(0.998)
    assert config.layer_threshold(1, 1.0, 0.01) > 1
    assert PruneConfig(threshold=0.6, layers=(1, 3)).layer_threshold(0, 0.6, 0.5) == 0.6


def test_a_configuration_prunes_below_a_share_of_one() -> None:
    for threshold, prunes in ((0.99, True), (1.0, False), (1.5, False)):
        assert PruneConfig(threshold=threshold, layers=(1, 3), curve=CURVE).prunes is prunes
    assert PruneConfig(threshold=1.0, layers=(1, 3)).prunes
    assert not PruneConfig(threshold=0.5).prunes


@pytest.mark.parametrize(
    ("shares", "tolerances", "left", "words"),
    [
        ((), (), (), "ascend"),
        ((0.7, 0.5), ((0.1,), (0.1,)), ((1.0,), (1.0,)), "ascend"),
        ((0.0, 0.5), ((0.1,), (0.1,)), ((1.0,), (1.0,)), "ascend"),
        ((0.5, 1.0), ((0.1,), (0.1,)), ((1.0,), (1.0,)), "ascend"),
        ((0.5,), ((0.1,), (0.1,)), ((1.0,), (1.0,)), "as many rows"),
        ((0.5,), ((0.1,),), (), "as many rows"),
        ((0.5, 0.6), ((0.1,), (0.1, 0.2)), ((1.0,), (1.0,)), "one number a prune layer"),
        ((0.5,), ((0.1,),), ((1.0, 0.5),), "one number a prune layer"),
        ((0.5,), ((),), ((),), "one number a prune layer"),
        ((0.5,), ((math.nan,),), ((1.0,),), "not a finite number"),
        ((0.5,), ((math.inf,),), ((1.0,),), "not a finite number"),
        ((0.5,), ((0.1, 0.1),), ((0.5, 0.6),), "must descend"),
        ((0.5,), ((0.1,),), ((0.0,),), "must descend"),
        ((0.5,), ((0.1,),), ((1.1,),), "must descend"),
        ((0.5,), ((0.1,),), ((math.nan,),), "must descend"),
    ],
)
def test_numbers_that_are_no_curve_are_refused(
    shares: Any, tolerances: Any, left: Any, words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        CalibratedCurve(shares, tolerances, left)


def test_a_curve_of_other_layers_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="for 2 layers, and the model prunes at 3"):
        PruneConfig(layers=(1, 2, 3), curve=CURVE)


def test_a_share_below_the_curve_is_refused() -> None:
    CURVE.check_share(0.5)
    for share in (0.4, math.nan):
        with pytest.raises(InvalidArgumentError, match=r"below 0\.5, the least"):
            CURVE.check_share(share)


def test_a_damaged_curve_says_so() -> None:
    whole = CURVE.to_dict()
    for values in ({}, {"shares": [0.5]}, {**whole, "shares": "x"}, {**whole, "left": [["x"]]}):
        with pytest.raises(ArtifactError, match="curve is damaged"):
            CalibratedCurve.from_dict(values)
