"""How a model is pruned: the choices a user makes, checked, without torch."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from simprune_deploy.common.errors import ArtifactError, InvalidArgumentError, argument
from simprune_deploy.pruning.calibrated_curve import CalibratedCurve, check_fits

PAD_LOG_SIZE = -1e4
"""log_size of a padding slot. Finite, because -inf turns a fully masked float16 row into NaN."""

SELECTIONS = ("pairs", "redundancy")
REDUCTIONS = ("merge", "drop")
PLACES = ("before", "inside")
"""Before a block, or inside it, between its attention and its MLP."""
FEATURES = ("tokens", "keys", "mean-keys", "tokens+keys")
"""What is compared: tokens, the keys of all heads side by side, their mean over the heads, or a
token and its mean key, as long as each other, side by side (the mean of both cosines)."""

USUALLY_LEFT = 0.4
"""Of the patches, behind all prune layers of a model of which nothing better is known."""

Selection = Literal["pairs", "redundancy"]
Reduction = Literal["merge", "drop"]
Place = Literal["before", "inside"]
Features = Literal["tokens", "keys", "mean-keys", "tokens+keys"]


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """A resolved pruning configuration: every number here is what the model really does.

    Args:
        threshold: Cosine similarity from which a patch counts as the same as another, in [-1, 2].
            Above 1 nothing is pruned. Default 0.85. With a `curve`, the share of the blocks' FLOPs
            that is wanted; from 1 on nothing is pruned.
        layers: Block indices, ascending; tokens are pruned before or inside each of them.
        selection: "pairs" (even patches into odd ones, the default) or "redundancy" (mean
            similarity).
        reduction: "merge" (pruned patches are averaged into their kept patch, the default) or
            "drop" (only their count is kept).
        proportional_attention: Attend with ``softmax(qk + log_size)``. Default True. Without it the
            term only masks padding.
        capacities: Patches kept by each layer, one per layer: every shape is static. Empty (the
            default) keeps as many as the image needs.
        multiple_of: Round the number of tokens up to a multiple of this. Default 1.
        place: Prune "before" the blocks (the default), or "inside" them, between attention and MLP.
        features: Compare "tokens" (the default), or a block's "keys", "mean-keys" (averaged over
            the heads) or "tokens+keys" (both), which wants layers inside blocks.
        curve: Thresholds for each layer, calibrated. Default None: `threshold`, in all of them.

    Raises:
        SimpruneError: a value is out of its range.
    """

    threshold: float = 0.85
    layers: tuple[int, ...] = ()
    selection: Selection = "pairs"
    reduction: Reduction = "merge"
    proportional_attention: bool = True
    capacities: tuple[int, ...] = ()
    multiple_of: int = 1
    place: Place = "before"
    features: Features = "tokens"
    curve: CalibratedCurve | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        object.__setattr__(self, "threshold", float(self.threshold))
        for name, known in (
            ("selection", SELECTIONS),
            ("reduction", REDUCTIONS),
            ("place", PLACES),
            ("features", FEATURES),
        ):
            if (value := getattr(self, name)) not in known:
                raise InvalidArgumentError(
                    f"{name} {value!r} is unknown: use one of {', '.join(known)}"
                )
        if self.features != "tokens" and self.place != "inside":
            raise InvalidArgumentError(
                f"{argument('features', self.features)} compares a block's keys, which are there "
                f"inside it only: add {argument('place', 'inside')}, or take "
                f"{argument('features', 'tokens')}"
            )
        if self.multiple_of < 1:
            raise InvalidArgumentError(f"multiple-of {self.multiple_of} must be 1 or more")
        if self.multiple_of > 1 and self.capacities:
            raise InvalidArgumentError(
                "a fixed number of tokens and multiple-of exclude each other: give one of them"
            )
        if self.capacities:
            _check_number(self.capacities, len(self.layers))
        if self.curve is not None and self.layers:
            check_fits(self.curve, self.layers)
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidArgumentError(
                f"layers {format_numbers(self.layers)} must ascend without repeats"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        values = dataclasses.asdict(self)
        curve = None if self.curve is None else self.curve.to_dict()
        lists = {"layers": list(self.layers), "capacities": list(self.capacities)}
        return {**values, **lists, "curve": curve}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruneConfig:
        """Build a configuration from :meth:`to_dict`'s result; unknown keys are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ArtifactError(
                f"the pruning configuration has unknown keys {', '.join(sorted(unknown))}: "
                "it was written by a newer version, update simprune-deploy"
            )
        curve = values.get("curve")
        try:
            return cls(
                **{
                    **values,
                    "curve": None if curve is None else CalibratedCurve.from_dict(curve),
                    "layers": tuple(int(layer) for layer in values.get("layers", ())),
                    "capacities": tuple(int(k) for k in values.get("capacities", ())),
                }
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the pruning configuration is damaged: {error}") from error

    @property
    def prunes(self) -> bool:
        """Whether the configuration's own threshold, or fixed counts, can prune anything."""
        can = self.threshold <= 1 if self.curve is None else self.threshold < 1
        return bool(self.layers) and (bool(self.capacities) or can)

    def layer_threshold(self, position: int, threshold: float, left: float) -> float:
        """Return the cosine threshold of a prune layer for an image.

        Args:
            position: Of the layer among the prune layers.
            threshold: The image's: what the model was given.
            left: The share of its patches that reach the layer.
        """
        if self.curve is None:
            return threshold
        return self.curve.at(threshold).threshold(position, left)

    def point(self, threshold: float | None = None) -> str:
        """Return in words how far it prunes: "0.85", or a calibrated "60% of the FLOPs".

        Args:
            threshold: What the model was given. Default None: the configuration's own.
        """
        number = self.threshold if threshold is None else threshold
        return f"{number:g}" if self.curve is None else f"{100 * number:.3g}% of the FLOPs"

    def capacity_of(self, position: int) -> int:
        """Return the operator's `capacity` attribute at the given prune layer (0: dynamic)."""
        return self.capacities[position] if self.capacities else 0

    def usual_patches(self, position: int, num_patches: int) -> int:
        """Return how many patches TensorRT may take for usual behind the given prune layer.

        What a fixed count says; otherwise a guess, until ``tune`` counts pictures: midway between
        the most and the fewest that a layer can leave, but in a chain of many layers so that 0.4
        of the patches are left at its end.
        """
        if self.capacities:
            return self.capacities[position]
        midway = 0.75 if self.selection == "pairs" else 0.5
        ratio = max(midway, USUALLY_LEFT ** (1 / len(self.layers)))
        return max(1, round(num_patches * ratio ** (position + 1)))


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is not a number in [-1, 2]."""
    if not isinstance(threshold, numbers.Real) or math.isnan(threshold):
        raise InvalidArgumentError(f"threshold {threshold!r} is not a number: use one in [-1, 2]")
    if not -1 <= threshold <= 2:
        raise InvalidArgumentError(
            f"threshold {threshold} is outside [-1, 2]: it is a cosine similarity, "
            "and above 1 nothing is pruned"
        )


def resolve_layers(layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """Turn "auto" or block indices into the blocks before or inside which tokens are pruned.

    "auto" spreads five prune layers over the depth, at its sixths: 2, 4, 6, 8, 10 of 12. Never the
    first block, where tokens are alike that will not stay so.

    Raises:
        SimpruneError: an index is outside the depth, or the order is wrong.
    """
    if layers == "auto":
        sixths = (depth * sixth // 6 for sixth in range(1, 6))
        return tuple(sorted({min(max(1, block), depth - 1) for block in sixths}))
    if isinstance(layers, str):
        raise InvalidArgumentError(f"layers {layers!r}: use 'auto' or block indices such as 3,6,9")
    _check_whole("layers", layers)
    for layer in layers:
        if not 0 <= layer < depth:
            raise InvalidArgumentError(
                f"layer {layer} is outside the model's depth: it has blocks 0 to {depth - 1}"
            )
    return tuple(int(layer) for layer in layers)


def resolve_capacities(
    tokens: int | Sequence[int] | None,
    num_layers: int,
    num_patches: int,
    selection: Selection = "pairs",
) -> tuple[int, ...]:
    """Turn the wished number of kept patches into one per prune layer.

    None keeps the count dynamic. One number is what the last layer keeps; the layers before it
    step down to it in equal ratios (196 patches, 3 layers, K = 64: 135, 93, 64). Several numbers
    are taken as they are. A layer that selects "pairs" keeps half of the patches that reach it at
    the least (rounded down), and must be reached by two.

    Raises:
        SimpruneError: a count is less than a layer can leave, more than what reaches it, or the
            number of counts is not the number of layers.
    """
    if tokens is None:
        return ()
    if isinstance(tokens, int):
        least = max(1, num_patches >> num_layers) if selection == "pairs" else 1
        if not least <= tokens <= num_patches:
            layers = "prune layer leaves" if num_layers == 1 else "prune layers leave"
            raise InvalidArgumentError(
                f"{tokens} tokens: {num_layers} {layers} between {least} and {num_patches} of the "
                f"model's patches: give a number of these{_or_more_layers(tokens, least)}"
            )
        tokens = _steps_down(tokens, num_layers, num_patches, selection)
    _check_whole("tokens", tokens)
    counts = tuple(int(count) for count in tokens)
    _check_number(counts, num_layers)
    available = num_patches
    for number, count in enumerate(counts, 1):
        least = _least(available, selection)
        if available < 2 and selection == "pairs":
            raise InvalidArgumentError(
                f"tokens {format_numbers(counts)}: prune layer {number} is reached by 1 patch, and "
                f"pairs are of two: give fewer layers, or {argument('selection', 'redundancy')}"
            )
        if not least <= count <= available:
            raise InvalidArgumentError(
                f"tokens {format_numbers(counts)}: prune layer {number} cannot leave {count} of "
                f"the {available} patches that reach it: give {least} to {available}"
                f"{_or_more_layers(count, least)}"
            )
        available = count
    return counts


def _check_number(counts: Sequence[int], num_layers: int) -> None:
    if len(counts) != num_layers:
        raise InvalidArgumentError(
            f"{len(counts)} token counts for {num_layers} prune layers: "
            "give one count, or one per layer"
        )


def _least(available: int, selection: Selection) -> int:
    """Return the fewest patches that a layer leaves of those that reach it."""
    return max(1, available // 2) if selection == "pairs" else 1


def _or_more_layers(count: int, least: int) -> str:
    return ", or more layers" if 1 <= count < least else ""


def _steps_down(
    last: int, num_layers: int, num_patches: int, selection: Selection
) -> tuple[int, ...]:
    """Return counts in equal ratios down to `last`, as far as layers can leave them."""
    ratio = (last / num_patches) ** (1 / max(1, num_layers))
    counts = [num_patches]
    for number in range(1, num_layers):
        wished = max(last, round(num_patches * ratio**number))
        counts.append(max(wished, _least(counts[-1], selection)))
    return (*counts[1:], last) if num_layers else ()


def _check_whole(name: str, values: Any) -> None:
    whole = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    if not whole or not all(isinstance(each, numbers.Integral) for each in values):
        raise InvalidArgumentError(
            f"{argument(name)} {values!r}: give whole numbers, such as [3, 6, 9]", what=name
        )


def format_numbers(values: Sequence[int]) -> str:
    """Return "3,6,9"."""
    return ",".join(str(value) for value in values)
