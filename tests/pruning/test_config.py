"""The user's choices, checked and resolved."""

from __future__ import annotations

import numpy as np
import pytest

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.pruning.config import PruneConfig, resolve_capacities, resolve_layers


@pytest.mark.parametrize("threshold", [1, np.float32(0.5), 0.85, -1, 2])
def test_any_real_number_is_a_threshold(threshold: float) -> None:
    config = PruneConfig(threshold=threshold, layers=(1,))
    assert type(config.threshold) is float
    assert PruneConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("threshold", [float("nan"), 2.01, -1.01, "0.5"])
def test_other_thresholds_are_refused(threshold: object) -> None:
    with pytest.raises(SimpruneError, match="threshold"):
        PruneConfig(threshold=threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("depth", "layers"), [(12, (3, 6, 9)), (24, (6, 12, 18)), (6, (1, 3, 4)), (2, (1,)), (1, (0,))]
)
def test_auto_layers_are_the_quarters_of_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert resolve_layers("auto", depth) == layers


def test_one_token_count_steps_down_in_equal_ratios() -> None:
    assert resolve_capacities(64, 3, 196) == (135, 93, 64)
    assert resolve_capacities([150, 110, 80], 3, 196) == (150, 110, 80)
    assert resolve_capacities(None, 3, 196) == ()


@pytest.mark.parametrize("tokens", [0, 197, [100, 120], [0], [197]])
def test_token_counts_that_do_not_fit_are_refused(tokens: int | list[int]) -> None:
    with pytest.raises(SimpruneError, match="token"):
        resolve_capacities(tokens, 2, 196)
