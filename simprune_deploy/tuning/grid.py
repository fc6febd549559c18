"""The settings that a sweep measures: all combinations of what was asked for."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.requests import check_listed
from simprune_deploy.predict.source import ModelSource
from simprune_deploy.pruning.config import (
    Features,
    Place,
    PruneConfig,
    check_threshold,
    resolve_capacities,
    resolve_layers,
)
from simprune_deploy.tuning.results import OURS, Setting
from simprune_deploy.tuning.sweep import setting_of

THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)

LayerSet = str | Sequence[int]
"""The blocks before or inside which a setting prunes: numbers, or "auto"."""

TokenSet = int | Sequence[int] | None
"""Patches left after the last prune layer, or after each; None: as many as the image needs."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The settings of a sweep: all combinations.

    Args:
        thresholds: Cosine thresholds, each in [-1, 2].
        layers: Sets of blocks; [3, 6, 9] is one set.
        selections: "pairs", "redundancy" or both.
        reductions: "merge", "drop" or both.
        tokens: Counts.
        place: "before" those blocks, or "inside" them.
        features: What is compared: "tokens", "keys", "mean-keys" or "tokens+keys".

    Raises:
        InvalidArgumentError: a threshold is out of its range.
    """

    thresholds: Sequence[float] = THRESHOLDS
    layers: Sequence[LayerSet] = ("auto",)
    selections: Sequence[str] = ("pairs",)
    reductions: Sequence[str] = ("merge",)
    tokens: Sequence[TokenSet] = (None,)
    place: Place = "before"
    features: Features = "tokens"

    def __post_init__(self) -> None:
        for name in ("thresholds", "layers", "selections", "reductions", "tokens"):
            object.__setattr__(self, name, several(getattr(self, name)))
            check_listed(name, getattr(self, name), 1)
        object.__setattr__(self, "layers", layer_sets(self.layers))
        for threshold in self.thresholds:
            check_threshold(threshold)
        PruneConfig(place=self.place, features=self.features)

    def settings(self, depth: int, num_patches: int) -> list[Setting]:
        """Return the settings for a model of this depth and number of patches.

        Raises:
            SimpruneError: a part does not fit the model.
        """
        layer_sets = [resolve_layers(each, depth) for each in self.layers]
        found = []
        for layers, selection, reduction, tokens in itertools.product(
            layer_sets, self.selections, self.reductions, self.tokens
        ):
            capacities = resolve_capacities(
                tokens,
                len(layers),
                num_patches,
                selection,  # type: ignore[arg-type]
            )
            # checks the names, the order of the layers and the number of counts
            PruneConfig(
                layers=layers,
                selection=selection,  # type: ignore[arg-type]
                reduction=reduction,  # type: ignore[arg-type]
                capacities=capacities,
            )
            rest = (selection, reduction, capacities or None, self.place, self.features)
            found += [Setting(OURS, threshold, layers, *rest) for threshold in self.thresholds]
        return list(dict.fromkeys(found))


def several(values: Any) -> Any:
    """Return one value, such as "pairs" or 64, as a list of one; others as they are."""
    return (values,) if values is None or isinstance(values, (str, numbers.Real)) else values


def layer_sets(layers: Any) -> tuple[LayerSet, ...]:
    """Return the sets of blocks; "auto", or the numbers of one set, are the only one."""
    layers = tuple(several(layers))
    one = layers and all(isinstance(each, numbers.Integral) for each in layers)
    return (layers,) if one else layers


def settings_for(source: ModelSource, asked: Mapping[str, Any]) -> list[Setting]:
    """Return the settings to measure; of an export only its thresholds can be chosen.

    What was not asked for is as the checkpoint has it, if it was saved pruned.

    Args:
        source: The model.
        asked: Fields of :class:`Grid`, those that were given.

    Raises:
        SimpruneError: a setting does not fit the model, or an export is fixed otherwise.
    """
    if source.graph is None:
        own = source.metadata.pruning
        saved: dict[str, Any] = {
            "layers": (own.layers,) if own.layers else (),
            "selections": (own.selection,),
            "reductions": (own.reduction,),
            "place": own.place,
            "features": own.features,
        }
        if own.capacities and "layers" not in asked:
            saved["tokens"] = (own.capacities,)
        left = {name: value for name, value in saved.items() if value and name not in asked}
        grid = Grid(**{**left, **asked})
        return grid.settings(source.metadata.depth, source.metadata.num_patches)
    if fixed := sorted(asked.keys() - {"thresholds"}):
        raise InvalidArgumentError(
            f"the {fixed[0]} of {source.name} are fixed in the graph: sweep the checkpoint to "
            "choose them"
        )
    own_setting = setting_of(source)
    if not source.runtime_threshold:
        if "thresholds" in asked:
            raise InvalidArgumentError(
                f"the threshold of {source.name} is fixed at {own_setting.threshold:g}: leave "
                f"{argument('thresholds')} out to measure it, or export with "
                f"{argument('runtime_threshold', True)}"
            )
        return [own_setting]
    thresholds = Grid(**dict(asked)).thresholds
    return [dataclasses.replace(own_setting, threshold=each) for each in thresholds]
