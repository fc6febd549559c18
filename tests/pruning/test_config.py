"""The user's choices, checked and resolved."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.pruning.calibrated_curve import CalibratedCurve
from simprune_deploy.pruning.config import (
    FEATURES,
    PruneConfig,
    resolve_capacities,
    resolve_layers,
)


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
    ("depth", "layers"),
    [
        (12, (2, 4, 6, 8, 10)),
        (24, (4, 8, 12, 16, 20)),
        (40, (6, 13, 20, 26, 33)),
        (6, (1, 2, 3, 4, 5)),
        (3, (1, 2)),
        (2, (1,)),
        (1, (0,)),
    ],
)
def test_auto_layers_are_the_sixths_of_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert resolve_layers("auto", depth) == layers


def test_one_token_count_steps_down_in_equal_ratios() -> None:
    assert resolve_capacities(64, 3, 196) == (135, 93, 64)
    assert resolve_capacities([150, 110, 80], 3, 196) == (150, 110, 80)
    assert resolve_capacities(None, 3, 196) == ()


@pytest.mark.parametrize("tokens", [0, 197, [100, 120], [0], [197]])
def test_token_counts_that_do_not_fit_are_refused(tokens: int | list[int]) -> None:
    with pytest.raises(SimpruneError, match="token"):
        resolve_capacities(tokens, 2, 196)


@pytest.mark.parametrize(
    ("tokens", "layers", "message"),
    [
        (97, 1, "97 tokens: 1 prune layer leaves between 98 and 196 .*, or more layers"),
        (23, 3, "23 tokens: 3 prune layers leave between 24 and 196 .*, or more layers"),
        (200, 3, "200 tokens: 3 prune layers leave between 24 and 196 .*: give a number of these$"),
        (
            [97, 60],
            2,
            "prune layer 1 cannot leave 97 of the 196 .*: give 98 to 196, or more layers",
        ),
        ([99, 48], 2, "prune layer 2 cannot leave 48 of the 99 .*: give 49 to 99, or more layers"),
        ([99, 100], 2, "prune layer 2 cannot leave 100 of the 99 .*: give 49 to 99$"),
    ],
)
def test_counts_that_pairs_cannot_leave_are_refused_in_a_line(
    tokens: int | list[int], layers: int, message: str
) -> None:
    with pytest.raises(SimpruneError, match=message) as raised:
        resolve_capacities(tokens, layers, 196)
    assert "\n" not in str(raised.value)


def test_the_odd_half_is_the_least_that_pairs_leave() -> None:
    assert resolve_capacities([98, 49, 24], 3, 196) == (98, 49, 24)
    assert resolve_capacities([3, 1], 2, 7) == (3, 1)
    with pytest.raises(SimpruneError, match=r"reached by 1 patch.*selection='redundancy'"):
        resolve_capacities([1, 1], 2, 3)
    assert resolve_capacities([1, 1], 2, 196, "redundancy") == (1, 1)
    assert resolve_capacities(1, 2, 196, "redundancy") == (14, 1)


@pytest.mark.parametrize("num_patches", [16, 31, 49, 196, 197, 255, 256, 1369])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_every_target_within_reach_is_stepped_down_to(num_patches: int, num_layers: int) -> None:
    for target in range(num_patches >> num_layers, num_patches + 1):
        counts = resolve_capacities(target, num_layers, num_patches)
        assert counts[-1] == target
        for before, after in itertools.pairwise((num_patches, *counts)):
            assert before // 2 <= after <= before
    if beyond := (num_patches >> num_layers) - 1:
        with pytest.raises(SimpruneError, match="or more layers"):
            resolve_capacities(beyond, num_layers, num_patches)


@pytest.mark.parametrize("features", FEATURES)
def test_place_and_features_are_carried(features: str) -> None:
    config = PruneConfig(layers=(1,), place="inside", features=features)  # type: ignore[arg-type]
    assert config.to_dict()["place"] == "inside"
    assert config.to_dict()["features"] == features
    assert PruneConfig.from_dict(config.to_dict()) == config


def test_place_and_features_of_older_files_are_the_defaults() -> None:
    values = PruneConfig(layers=(1,)).to_dict()
    del values["place"], values["features"]
    assert PruneConfig.from_dict(values) == PruneConfig(layers=(1,), place="before")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"place": "behind"}, "place 'behind' is unknown: use one of before, inside"),
        ({"features": "values"}, "features 'values' is unknown: use one of tokens, keys, mean-"),
        ({"features": "keys"}, "features='keys'.*add place='inside', or take features='tokens'"),
        ({"features": "mean-keys", "place": "before"}, "add place='inside'"),
    ],
)
def test_other_places_and_features_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SimpruneError, match=message):
        PruneConfig(**values)


def test_how_far_is_pruned_is_said_as_what_it_is() -> None:
    assert PruneConfig(0.85).point() == "0.85"
    curve = CalibratedCurve((0.5,), ((0.2,),), ((0.6,),))
    config = PruneConfig(0.655, layers=(1,), place="inside", curve=curve)
    assert (config.point(), config.point(0.8)) == ("65.5% of the FLOPs", "80% of the FLOPs")


def test_what_is_usual_falls_from_layer_to_layer_and_leaves_enough() -> None:
    def usual(layers: int, **values: Any) -> list[int]:
        config = PruneConfig(layers=tuple(range(layers)), **values)
        return [config.usual_patches(position, 196) for position in range(layers)]

    assert usual(1) == [147]
    assert usual(3) == [147, 110, 83]
    assert usual(1, selection="redundancy") == [98]
    assert usual(12)[-1] == usual(8)[-1] == 78
    assert usual(3, capacities=(150, 110, 80)) == [150, 110, 80]
