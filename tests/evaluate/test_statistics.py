"""The confidence intervals: published examples, an independent formula, coverage, the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.evaluate.statistics import (
    Interval,
    images_for_drop,
    images_for_share,
    paired_drop,
    share,
)

Z = 1.959963984540054


def test_published_example_of_paired_data() -> None:
    """Bentur's airway data, 21 pairs: Fagerland, Lydersen and Laake (2014) print -0.517, -0.026."""
    found = paired_drop(1, 7, 21)
    assert (round(found.low, 3), round(found.high, 3)) == (-0.517, -0.026)
    assert found.estimate == pytest.approx(-6 / 21)


def quartic_roots(b: int, c: int, n: int) -> np.ndarray:
    """Tango's bounds as roots of a polynomial (Yang, Sun and Hardin, 2012, the method of Nam)."""
    g = Z**2
    coefficients = [
        n**2 * (n / g + 1) ** 2,
        -n * (b - c) * (n / g + 1) * (4 * n / g + 1),
        2 * n * (b - c) ** 2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
        n * (b - c) * (2 * (b + c) / g + 1) - (b - c) ** 3 * (4 * n / g + 1) / g,
        (b - c) ** 2 * ((b - c) ** 2 / g - (b + c)) / g,
    ]
    roots = np.roots(coefficients)
    return np.sort(roots[np.abs(roots.imag) < 1e-5].real)


@given(st.integers(1, 400), st.data())
def test_the_bounds_are_the_roots_of_an_independent_formula(n: int, data: st.DataObject) -> None:
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    found = paired_drop(b, c, n)
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    roots = quartic_roots(b, c, n)
    for bound in (found.low, found.high):
        if abs(bound) < 1 - 1e-6:
            assert np.abs(roots - bound).min() < 1e-5
    mirrored = paired_drop(c, b, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for shares in ([0.03, 0.01, 0.96], [0.005, 0.005, 0.99], [0.1, 0.08, 0.82]):
        draws = rng.multinomial(500, shares, size=1000)
        truth = shares[0] - shares[1]
        held = [i.low <= truth <= i.high for i in (paired_drop(b, c, 500) for b, c, _ in draws)]
        assert 0.93 < np.mean(held) < 0.975


def test_no_difference_on_few_images_is_not_certainty() -> None:
    found = paired_drop(0, 0, 20)
    assert found.high == pytest.approx(Z**2 / (20 + Z**2))
    assert found.low == pytest.approx(-found.high)


@pytest.mark.parametrize("limit", [0.001, 0.005, 0.05])
def test_the_fewest_images_are_the_fewest(limit: float) -> None:
    n = images_for_drop(limit)
    assert paired_drop(0, 0, n).high <= limit < paired_drop(0, 0, n - 1).high
    n = images_for_share(1 - limit)
    assert share(n, n).low >= 1 - limit > share(n - 1, n - 1).low


def test_wilson() -> None:
    """Newcombe's (1998) table of intervals for one proportion: 81 of 263."""
    found = share(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert share(0, 10).low == 0
    assert share(10, 10).high == pytest.approx(1)


def test_impossible_counts_are_refused() -> None:
    for bad in ((3, 3, 5), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(SimpruneError, match="do not fit"):
            paired_drop(*bad)
    with pytest.raises(SimpruneError, match="no share"):
        share(6, 5)
    for limit in (0.0, 1.0):
        with pytest.raises(SimpruneError):
            images_for_drop(limit)
        with pytest.raises(SimpruneError):
            images_for_share(limit)
    with pytest.raises(SimpruneError, match="confidence"):
        paired_drop(0, 0, 5, confidence=95)


def test_an_interval_is_plain_data() -> None:
    assert Interval(0.1, 0.0, 0.2).confidence == 0.95
