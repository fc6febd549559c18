"""Find how tolerant each prune layer should be, from pictures without labels.

The loss is what pruning does to the dense model's output. The pictures run through the model layer
by layer, each with its own tokens: at a prune layer all of them are there, so the tolerance that
lets as many patches go as are wished *on average* is a quantile, and needs no search. What is
compared is how many are wished, where, and by which features. That tolerances fall with an image's
own patches (:mod:`simprune_deploy.pruning.calibrated_curve`) is worth as much as all of that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    UnsupportedModelError,
    argument,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.pruning.attention import (
    Sizes,
    attention_half,
    features_of,
    has_keys,
    has_two_halves,
    mlp_half,
    run_block,
    sizes_of,
)
from simprune_deploy.pruning.calibrated_curve import IDENTITY, CalibratedCurve, check_flops
from simprune_deploy.pruning.config import FEATURES, Features, PruneConfig, format_numbers
from simprune_deploy.pruning.cost import BlockTokens, flops_share, spread_over_blocks
from simprune_deploy.pruning.model import PrunedViT
from simprune_deploy.pruning.operator import similarity_prune, unit_features

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the FLOPs: where a curve has its knots, as far as they can be reached."""

RESAMPLES = 2000
LEAST_IMAGES = 4
"""Fewer show nothing of what images have in common."""

LAYER_COST = 0.004
"""What a prune layer costs of a dense forward, in time: 0.3 to 0.6 % measured on a CPU."""

HELD_OUT_FROM = 16
"""From so many pictures on half of them are held out, to be measured on."""

STEEPNESS = 6.0
"""By how much the logarithm of the loss grows with that of the FLOPs saved: what compares
candidates whose FLOPs come out a little apart."""

LEAST_GAIN = 0.03
"""Of the logarithm of the loss: less is noise."""

AIMS, CLOSE = 4, 0.002
"""Tries to meet a share of the FLOPs on average over the pictures, and how closely."""

SHAPES: dict[str, Callable[[float], float]] = {
    "all alike": lambda place: 1.0,
    "more behind": lambda place: 0.5 + place,
    "more in front": lambda place: 1.5 - place,
}
"""Where patches go: a weight by a layer's place among the prune layers, from 0 to 1. Weights for
every block by itself, searched on 37 photographs, lost less on these and more on others."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """How a model could be pruned: what is compared inside which blocks, and where patches go.

    Attributes:
        features: What is compared.
        weights: One a block: how much of the patches goes there, relative to the others; 0 is no
            prune layer.
    """

    features: Features
    weights: tuple[float, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks inside which patches go."""
        return tuple(block for block, weight in enumerate(self.weights) if weight)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of pictures through a pruned model.

    Attributes:
        losses: float64[n], ``1 - cosine`` of the output to the dense model's; of a single output
            the squared difference over the dense outputs' variance.
        flops: float64[n], the share of the dense blocks' FLOPs.
        kept: int64[n, layers], patches behind each prune layer.
        tolerances: Of the layers.
    """

    losses: np.ndarray
    flops: np.ndarray
    kept: np.ndarray
    tolerances: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What calibration found.

    Attributes:
        config: The model's configuration with the curve, at the share that was asked for.
        calibration: The pictures that it was found with, pruned at that share.
        held_out: Others, that it was not; None if there were too few for both.
        evaluated: How many ways of pruning were compared.
    """

    config: PruneConfig
    calibration: Pass
    held_out: Pass | None
    evaluated: int

    @property
    def measured(self) -> Pass:
        """What the numbers are of: held-out pictures, where there were enough."""
        return self.held_out or self.calibration

    def __str__(self) -> str:
        found, config = self.measured, self.config
        count = len(found.losses)
        which = (
            f"{count} held-out pictures"
            if self.held_out
            else f"the {count} pictures it was calibrated on"
        )
        low, high = interval_of_mean(found.losses)
        return (
            f"{config.features} inside blocks {format_numbers(config.layers)}: on {which} "
            f"{found.flops.mean():.1%} of the blocks' FLOPs, a cosine of "
            f"{1 - found.losses.mean():.4f} to the dense model's output "
            f"({1 - high:.4f} to {1 - low:.4f}), of {1 - found.losses.max():.4f} at worst"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says of it, as JSON types."""
        found = {"calibration": self.calibration, "held_out": self.held_out}
        return {
            "share": self.config.threshold,
            "evaluated": self.evaluated,
            **{name: each and _described(each) for name, each in found.items()},
        }


def _described(found: Pass) -> dict[str, Any]:
    return {
        "images": len(found.losses),
        "loss": float(found.losses.mean()),
        "loss_95": list(interval_of_mean(found.losses)),
        "worst_loss": float(found.losses.max()),
        "flops": float(found.flops.mean()),
        "kept": [float(each) for each in found.kept.mean(0)],
    }


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of 95 % of a mean over resampled values (bootstrap, percentiles)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


class Calibrator:
    """A model and pictures, ready to be run in many ways.

    Args:
        vit: A timm ``VisionTransformer``.
        images: float32[n, C, H, W], normalized.

    Raises:
        SimpruneError: there are too few pictures, or all are alike.
    """

    def __init__(self, vit: torch.nn.Module, images: torch.Tensor) -> None:
        # with a layer, so that its head pools by the sizes; what runs is decided in each run
        self.model = PrunedViT(vit, PruneConfig(layers=(0,))).eval()
        self.vit = self.model.vit
        if len(images) < LEAST_IMAGES:
            raise InvalidArgumentError(
                f"{len(images)} pictures are too few to calibrate on: give {LEAST_IMAGES} or more, "
                "better dozens"
            )
        with torch.inference_mode():
            chunks = [image[None] for image in images]
            self.tokens = [self.model.embed(chunk) for chunk in chunks]
            self.dense = torch.cat([self.vit(chunk) for chunk in chunks]).double()
        if bool((self.dense == self.dense[0]).all()):
            raise InvalidArgumentError(
                f"all {len(images)} pictures give the same output, which shows nothing of what "
                f"pruning loses: give others with {argument('images')}"
            )
        self.shape = self.model.block_shape

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    def usable_blocks(self, features: Features) -> list[int]:
        """Return the blocks inside which these features can be compared."""
        fits = has_two_halves if features == "tokens" else has_keys
        return [index for index, block in enumerate(self.vit.blocks) if fits(block)]

    def left_at(self, candidate: Candidate, share: float) -> list[float]:
        """Return the share of the patches left behind each of the candidate's layers.

        So that the blocks' FLOPs are that share of the dense ones: each layer lets a part of the
        patches that reach it go, in proportion to its weight, and at most half.

        Raises:
            SimpruneError: even half in every layer is not enough.
        """
        weights = [candidate.weights[layer] for layer in candidate.layers]

        def left(scale: float) -> list[float]:
            return list(np.cumprod([1 - min(0.5, scale * weight) for weight in weights]))

        low, high = 0.0, 0.5 / min(weights)
        if (least := self.flops_of(candidate, left(high))) > share:
            raise InvalidArgumentError(
                f"{argument('flops', share)} cannot be reached: {len(weights)} prune layers fold "
                f"half of the patches each, and {least:.0%} of the FLOPs are left"
            )
        for _ in range(40):
            middle = (low + high) / 2
            if self.flops_of(candidate, left(middle)) > share:
                low = middle
            else:
                high = middle
        return left(high)

    def flops_of(self, candidate: Candidate, left: Sequence[float]) -> float:
        """Return the share of FLOPs where shares `left` of the patches pass the layers."""
        patches, prefix = self.model.num_patches, self.model.num_prefix_tokens
        kept = [prefix + each * patches for each in left]
        total = prefix + patches
        spread = spread_over_blocks(total, candidate.layers, kept, self.depth, "inside")
        return flops_share(self.shape, total, spread)

    @torch.inference_mode()
    def run(
        self,
        candidate: Candidate,
        images: Sequence[int],
        left: Sequence[float] | None = None,
        tolerances: Sequence[float] | None = None,
    ) -> Pass:
        """Run pictures with tolerances, or with those that leave shares of the patches on average.

        Args:
            candidate: What is compared where.
            images: Their numbers.
            left: For each layer, the share of all patches behind it; or
            tolerances: one for each layer.
        """
        model, prefix, patches = self.model, self.model.num_prefix_tokens, self.model.num_patches
        tokens = [self.tokens[image] for image in images]
        log_sizes = [each.new_zeros(each.shape[:2], dtype=torch.float32) for each in tokens]
        sizes: list[Sizes | None] = [None] * len(images)
        spread: list[list[BlockTokens]] = [[] for _ in images]
        kept: list[list[int]] = []
        found: list[float] = []
        for index, block in enumerate(self.vit.blocks):
            if index not in candidate.layers:
                for i, each in enumerate(tokens):
                    spread[i].append(BlockTokens(each.shape[1], each.shape[1]))
                    tokens[i] = run_block(block, each, sizes[i])
                continue
            halves = [attention_half(block, *pair) for pair in zip(tokens, sizes, strict=True)]
            features = [features_of(candidate.features, each, keys) for each, keys in halves]
            reach = [(each.shape[1] - prefix) / patches for each in tokens]
            position = len(found)
            if tolerances is not None:
                tolerance = tolerances[position]
            else:
                assert left is not None
                going = sum(reach) - left[position] * len(images)
                tolerance = _quantile(features, reach, prefix, round(going * patches))
            found.append(tolerance)
            for i, (each, _) in enumerate(halves):
                limit = torch.tensor([1 - tolerance * reach[i]])
                before = each.shape[1]
                each, log_sizes[i], *_ = similarity_prune(
                    each, features[i], log_sizes[i], limit, prefix
                )
                sizes[i] = sizes_of(log_sizes[i], each)
                spread[i].append(BlockTokens(before, each.shape[1]))
                tokens[i] = mlp_half(block, each)
            kept.append([each.shape[1] - prefix for each in tokens])
        outputs = [
            model.forward_head(self.vit.norm(each), log_size)
            for each, log_size in zip(tokens, log_sizes, strict=True)
        ]
        total = prefix + patches
        return Pass(
            self._losses(torch.cat(outputs).double(), images),
            np.array([flops_share(self.shape, total, each) for each in spread]),
            np.array(kept, np.int64).reshape(len(kept), len(images)).T,
            tuple(found),
        )

    def _losses(self, outputs: torch.Tensor, images: Sequence[int]) -> np.ndarray:
        dense = self.dense[list(images)]
        if dense.shape[1] == 1:
            off = (outputs - dense).square()[:, 0] / self.dense.var().clamp_min(1e-30)
            return np.asarray(off.numpy())
        return np.asarray(1 - torch.cosine_similarity(outputs, dense, dim=1).numpy())


def _quantile(
    features: Sequence[torch.Tensor], reach: Sequence[float], prefix: int, going: int
) -> float:
    """Return the tolerance at which so many patches of all images together go."""
    needed = []
    for each, left in zip(features, reach, strict=True):
        unit = unit_features(each[:, prefix:].float())[0]
        if len(unit) < 2:
            continue
        best = (unit[0::2] @ unit[1::2].T).amax(1)
        needed.append((1 - best.double().numpy()) / left)
    ranked = np.sort(np.concatenate(needed)) if needed else np.zeros(0)
    going = min(going, len(ranked))
    if going < 1:
        return IDENTITY
    if going == len(ranked):
        return float(ranked[-1] + 1e-6)
    return float((ranked[going - 1] + ranked[going]) / 2)


def calibrate(
    vit: torch.nn.Module,
    images: torch.Tensor,
    share: float,
    *,
    features: Features | None = None,
    layers: Sequence[int] | None = None,
    layer_cost: float = LAYER_COST,
    hold_out: bool = True,
    progress: Progress = silent,
) -> Calibrated:
    """Find what is compared, in which blocks, and how tolerantly, so that least is lost.

    Args:
        vit: A timm ``VisionTransformer``.
        images: float32[n, C, H, W], normalized; labels are not needed.
        share: Of the dense blocks' FLOPs that may be spent, in (0, 1).
        features: What is compared. Default None: whichever loses least.
        layers: The blocks to prune inside. Default None: whichever lose least.
        layer_cost: What a prune layer costs, as a share of the dense model's time. Default 0.004.
        hold_out: Calibrate on every other picture only, and measure on the rest, where there are
            :data:`HELD_OUT_FROM` or more. Default True.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the share is outside (0, 1) or cannot be reached, the pictures show nothing,
            or the model has no block that can be pruned inside.
    """
    check_flops(share)
    if not math.isfinite(layer_cost) or not 0 <= layer_cost < 0.1:
        raise InvalidArgumentError(
            f"{argument('layer_cost', layer_cost)} is outside [0, 0.1): give the share of the "
            "dense model's time that a prune layer takes, as 0.4%"
        )
    progress("running the dense model on the pictures")
    calibrator = Calibrator(vit, images)
    numbers = list(range(len(images)))
    apart = hold_out and len(numbers) >= HELD_OUT_FROM
    known, others = (numbers[::2], numbers[1::2]) if apart else (numbers, [])
    search = _Search(calibrator, known, share, layer_cost, progress)
    starts = list(search.starts(features, layers))
    if not starts:
        wanted = "" if features is None else f" by their {features}"
        raise UnsupportedModelError(
            f"the model has no blocks that can be pruned inside{wanted}, between attention and "
            f"MLP: prune before blocks, by one {argument('threshold')}"
        )
    best = search.best_of(starts)
    best = search.best_of([best, *search.others(best, every_block=layers is None)])
    progress("calibrating the curve")
    curve = _curve(calibrator, best, known, share)
    config = PruneConfig(
        threshold=share,
        layers=best.layers,
        place="inside",
        features=best.features,
        curve=curve,
    )
    tolerances = curve.at(share)
    return Calibrated(
        config,
        calibrator.run(best, known, tolerances=tolerances),
        calibrator.run(best, others, tolerances=tolerances) if others else None,
        len(search.seen),
    )


class _Search:
    """Compares candidates on pictures, at equal cost."""

    def __init__(
        self,
        calibrator: Calibrator,
        images: list[int],
        share: float,
        layer_cost: float,
        progress: Progress,
    ) -> None:
        self.calibrator, self.images, self.share = calibrator, images, share
        self.layer_cost, self.progress = layer_cost, progress
        self.seen: dict[Candidate, float] = {}

    def starts(
        self, features: Features | None, layers: Sequence[int] | None
    ) -> Iterator[Candidate]:
        """Give a candidate for everything that may be compared, all its blocks alike."""
        choices = cast("tuple[Features, ...]", FEATURES) if features is None else (features,)
        for each in choices:
            usable = self.calibrator.usable_blocks(each)
            wanted = usable if layers is None else list(layers)
            if not wanted or not set(wanted) <= set(usable):
                continue
            depth = range(self.calibrator.depth)
            yield Candidate(each, tuple(float(block in wanted) for block in depth))

    def others(self, like: Candidate, every_block: bool) -> Iterator[Candidate]:
        """Give candidates that compare the same: other shapes, and fewer of the blocks."""
        layers = like.layers
        fewer = [layers, layers[1:], layers[1::2], layers[::2]] if every_block else [layers]
        for chosen in (each for each in fewer if each):
            for weigh in SHAPES.values():
                weights = [0.0] * len(like.weights)
                for number, block in enumerate(chosen):
                    weights[block] = weigh(number / max(1, len(chosen) - 1))
                yield Candidate(like.features, tuple(weights))

    def best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the one that loses least; an earlier one, unless a later gains more than noise."""
        best = candidates[0]
        for each in candidates[1:]:
            if self.loss_of(each) < self.loss_of(best) - LEAST_GAIN:
                best = each
        return best

    def loss_of(self, candidate: Candidate) -> float:
        """Return the logarithm of the mean loss at the wanted cost, prune layers counted."""
        if candidate not in self.seen:
            self.progress(f"comparing ways of pruning: {len(self.seen) + 1}")
            unused = self.calibrator.depth - len(candidate.layers)
            share = min(self.share + self.layer_cost * unused, 0.99)
            try:
                left = self.calibrator.left_at(candidate, share)
            except InvalidArgumentError:
                if not self.seen:  # the first one: all blocks
                    raise
                self.seen[candidate] = math.inf
                return math.inf
            found = self.calibrator.run(candidate, self.images, left)
            over = math.log(float(found.flops.mean()) / share)
            self.seen[candidate] = math.log(found.losses.mean() + 1e-12) + STEEPNESS * over
        return self.seen[candidate]


def _curve(
    calibrator: Calibrator, candidate: Candidate, images: list[int], share: float
) -> CalibratedCurve:
    """Return the tolerances at every share that can be reached, that of the user among them."""
    shares, rows = [], []
    for wanted in sorted({*SHARES, share}):
        aim, row = wanted, None
        for _ in range(AIMS):
            try:
                left = calibrator.left_at(candidate, aim)
            except InvalidArgumentError:
                break
            found = calibrator.run(candidate, images, left)
            row = found.tolerances
            # images differ, and attention is of the square of their tokens
            short = wanted - float(found.flops.mean())
            if abs(short) < CLOSE:
                break
            aim = min(max(aim + short, 0.01), 0.999)
        if row is not None:
            shares.append(wanted)
            rows.append(row)
    if share not in shares:
        calibrator.left_at(candidate, share)  # says what can be reached
    return CalibratedCurve(tuple(shares), tuple(rows))
