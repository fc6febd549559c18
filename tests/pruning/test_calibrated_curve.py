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
from simprune_deploy.pruning.config import PruneConfig

CURVE = CalibratedCurve((0.5, 0.7), ((0.3, 0.2), (0.1, 0.12)))


@st.composite
def curves(draw: st.DrawFn) -> CalibratedCurve:
    hundredths = draw(st.sets(st.integers(5, 99), min_size=1, max_size=6))
    layers = draw(st.integers(1, 4))
    number = st.floats(-0.5, 2, width=32)
    rows = st.tuples(*[number] * layers)
    shares = tuple(each / 100 for each in sorted(hundredths))
    return CalibratedCurve(shares, tuple(draw(rows) for _ in shares))


@settings(max_examples=200, deadline=None)
@given(curves(), st.floats(-0.5, 1.5))
def test_ramps_are_the_interpolation(curve: CalibratedCurve, share: float) -> None:
    starts, widths, slopes = (np.array(each) for each in curve.ramps())
    climbed = np.clip(min(share, 1.0) - starts, 0, widths)
    found = np.array(curve.tolerances[0]) + climbed @ slopes
    np.testing.assert_allclose(found, curve.at(share), atol=1e-9)


@given(curves())
def test_knots_are_met_and_from_one_on_nothing_is_pruned(curve: CalibratedCurve) -> None:
    for share, row in zip(curve.shares, curve.tolerances, strict=True):
        assert curve.at(share) == pytest.approx(row)
    for share in (1.0, 1.5, math.nan):
        assert curve.at(share) == (IDENTITY,) * curve.num_layers
    assert curve.at(0.0) == curve.tolerances[0]


@given(curves())
def test_it_survives_json(curve: CalibratedCurve) -> None:
    assert CalibratedCurve.from_dict(curve.to_dict()) == curve


def test_a_threshold_is_stricter_where_fewer_patches_are_left() -> None:
    config = PruneConfig(threshold=0.6, layers=(1, 3), curve=CURVE)
    assert config.layer_threshold(0, 0.6, 1.0) == pytest.approx(0.8)
    assert config.layer_threshold(0, 0.6, 0.5) == pytest.approx(0.9)
    assert config.layer_threshold(1, 1.0, 0.01) > 1
    assert PruneConfig(threshold=0.6, layers=(1, 3)).layer_threshold(0, 0.6, 0.5) == 0.6


def test_a_configuration_prunes_below_a_share_of_one() -> None:
    for threshold, prunes in ((0.99, True), (1.0, False), (1.5, False)):
        assert PruneConfig(threshold=threshold, layers=(1, 3), curve=CURVE).prunes is prunes
    assert PruneConfig(threshold=1.0, layers=(1, 3)).prunes
    assert not PruneConfig(threshold=0.5).prunes


@pytest.mark.parametrize(
    ("shares", "tolerances", "words"),
    [
        ((), (), "ascend"),
        ((0.7, 0.5), ((0.1,), (0.1,)), "ascend"),
        ((0.0, 0.5), ((0.1,), (0.1,)), "ascend"),
        ((0.5, 1.0), ((0.1,), (0.1,)), "ascend"),
        ((0.5,), ((0.1,), (0.1,)), "as many rows"),
        ((0.5, 0.6), ((0.1,), (0.1, 0.2)), "one number a prune layer"),
        ((0.5,), ((math.nan,),), "not a finite number"),
        ((0.5,), ((math.inf,),), "not a finite number"),
    ],
)
def test_numbers_that_are_no_curve_are_refused(shares: Any, tolerances: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        CalibratedCurve(shares, tolerances)


def test_a_curve_of_other_layers_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="for 2 layers, and the model prunes at 3"):
        PruneConfig(layers=(1, 2, 3), curve=CURVE)


def test_a_share_below_the_curve_is_refused() -> None:
    CURVE.check_share(0.5)
    for share in (0.4, math.nan):
        with pytest.raises(InvalidArgumentError, match=r"below 0\.5, the least"):
            CURVE.check_share(share)


def test_a_damaged_curve_says_so() -> None:
    for values in ({}, {"shares": [0.5]}, {"shares": "x", "tolerances": [[1]]}):
        with pytest.raises(ArtifactError, match="curve is damaged"):
            CalibratedCurve.from_dict(values)
