"""Find how tolerant each prune layer should be, from pictures without labels.

What is compared is how many patches are wished to go, where, and by which features, at equal cost
(:mod:`simprune_deploy.pruning.calibrator` runs it). That tolerances fall with an image's own
patches (:mod:`simprune_deploy.pruning.calibrated_curve`) is worth as much as all of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from simprune_deploy.common.errors import (
    InvalidArgumentError,
    UnsupportedModelError,
    argument,
)
from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import check_whole
from simprune_deploy.pruning.calibrated_curve import (
    FLOOR,
    CalibratedCurve,
    Tolerances,
    check_flops,
    check_layer_cost,
)
from simprune_deploy.pruning.calibrator import Calibrator, Candidate, OnAverage, Pass
from simprune_deploy.pruning.config import Features, PruneConfig, format_numbers
from simprune_deploy.pruning.cost import BATCHES

CHOICES: tuple[Features, ...] = ("tokens+keys", "mean-keys")
"""What may be compared, unless the user says so; the second is taken if it surely loses less. Of 74
photographs either half lost less by tokens alone, or by all heads' keys, at some share, and then
the other half lost more."""

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the FLOPs: where a curve has its knots, as far as they can be reached."""

RESAMPLES = 2000
HELD_OUT_FROM = 16
"""From so many pictures on half of them are held out, to be measured on."""

STEEPNESS = 6.0
"""By how much the logarithm of the loss grows with that of the FLOPs saved: what compares
candidates whose FLOPs come out a little apart."""

SURE = 0.9
"""Of the resampled sets of pictures, in so many one way of pruning must lose less than another that
was tried before to be taken in its place. A few pictures make most of a mean loss: what merely lost
less on 37 photographs lost more on 37 others."""

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
class Calibrated:
    """What calibration found.

    Attributes:
        config: The model's configuration with the curve, at the share that was asked for.
        calibration: The pictures that it was found with, pruned at that share.
        held_out: Others, that it was not; None if there were too few for both.
        evaluated: How many ways of pruning were compared.
        batch: The images of a batch whose FLOPs are that share.
        rejected: The mean loss of fixed counts, if thresholds were taken, or the other way round,
            on the same pictures; None if they were not compared.
    """

    config: PruneConfig
    calibration: Pass
    held_out: Pass | None
    evaluated: int
    batch: int = 1
    rejected: float | None = None

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
        counts = f", {format_numbers(config.capacities)} patches" if config.capacities else ""
        padded = f" in batches of {self.batch}, padded" if self.batch > 1 else ""
        return (
            f"{config.features} inside blocks {format_numbers(config.layers)}{counts}: on {which} "
            f"{found.padded(self.batch):.1%} of the blocks' FLOPs{padded}, a cosine of "
            f"{1 - found.losses.mean():.4f} to the dense model's output "
            f"({1 - high:.4f} to {1 - low:.4f}), of {1 - found.losses.max():.4f} at worst"
            f"{self.comparison and f'; {self.comparison}'}"
        )

    @property
    def comparison(self) -> str:
        """What thresholds and fixed counts lose, in words; empty if they were not compared."""
        if self.rejected is None:
            return ""
        taken, other = "thresholds", "fixed counts"
        if self.config.capacities:
            taken, other = other, taken
        return (
            f"{taken} lose {self.calibration.losses.mean():.4f} in such batches, {other} "
            f"{self.rejected:.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest says of it, as JSON types."""
        found = {"calibration": self.calibration, "held_out": self.held_out}
        return {
            "share": self.config.threshold,
            "evaluated": self.evaluated,
            "batch": self.batch,
            "rejected_loss": self.rejected,
            **{name: each and _described(each) for name, each in found.items()},
        }


def _described(found: Pass) -> dict[str, Any]:
    return {
        "images": len(found.losses),
        "loss": float(found.losses.mean()),
        "loss_95": list(interval_of_mean(found.losses)),
        "worst_loss": float(found.losses.max()),
        "flops": {str(size): found.padded(size) for size in BATCHES},
        "kept": [float(each) for each in found.kept.mean(0)],
    }


def interval_of_mean(values: np.ndarray) -> tuple[float, float]:
    """Return the bounds of 95 % of a mean over resampled values (bootstrap, percentiles)."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def calibrate(
    vit: torch.nn.Module,
    images: torch.Tensor,
    share: float,
    *,
    features: Features | None = None,
    layers: Sequence[int] | None = None,
    batch: int = 1,
    tokens: Literal["dynamic", "fixed"] | None = None,
    layer_cost: float | None = None,
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
        batch: Images that run together, all padded to the one with the most tokens; the share is of
            such batches. Default 1.
        tokens: "dynamic", by thresholds, or "fixed" counts. Default None: by thresholds for single
            images, for batches whichever loses less.
        layer_cost: What a prune layer costs, as a share of the dense model's time. Default None:
            0.004, and its products' share of the FLOPs.
        hold_out: Calibrate on every other picture only, and measure on the rest, where there are
            :data:`HELD_OUT_FROM` or more. Default True.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the share is outside (0, 1) or cannot be reached, the pictures show nothing,
            or the model has no block that can be pruned inside.
    """
    check_flops(share)
    if layer_cost is not None:
        check_layer_cost(layer_cost)
    check_whole("batch", batch, 1)
    progress("running the dense model on the pictures")
    calibrator = Calibrator(vit, images)
    every = list(range(len(images)))
    apart = hold_out and len(every) >= HELD_OUT_FROM
    known, others = (every[::2], every[1::2]) if apart else (every, [])
    search = _Search(calibrator, known, share, layer_cost, batch, progress)
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
    curve = _curve(calibrator, best, known, share, batch)
    point, counts = curve.at(share), curve.counts(share, calibrator.model.num_patches)
    ways: dict[str, Tolerances | tuple[int, ...]] = {"dynamic": point, "fixed": counts}
    wanted_ways = [tokens or "dynamic"] if tokens or batch == 1 else list(ways)
    found = {way: calibrator.run(best, known, ways[way]) for way in wanted_ways}
    taken, *rejected = sorted(found, key=lambda way: search.at_equal_cost(found[way], share).mean())
    config = PruneConfig(
        threshold=share,
        layers=best.layers,
        capacities=counts if taken == "fixed" else (),
        place="inside",
        features=best.features,
        curve=curve,
    )
    return Calibrated(
        config,
        found[taken],
        calibrator.run(best, others, ways[taken]) if others else None,
        len(search.seen),
        batch,
        *[float(found[way].losses.mean()) for way in rejected],
    )


class _Search:
    """Compares candidates on pictures, at equal cost."""

    def __init__(
        self,
        calibrator: Calibrator,
        images: list[int],
        share: float,
        layer_cost: float | None,
        batch: int,
        progress: Progress,
    ) -> None:
        self.calibrator, self.images, self.share = calibrator, images, share
        self.layer_cost, self.batch, self.progress = layer_cost, batch, progress
        self.seen: dict[Candidate, np.ndarray] = {}
        draw = np.random.default_rng(0)
        self.resampled = draw.integers(len(images), size=(RESAMPLES, len(images)))

    def starts(
        self, features: Features | None, layers: Sequence[int] | None
    ) -> Iterator[Candidate]:
        """Give a candidate for everything that may be compared, all its blocks alike."""
        choices = CHOICES if features is None else (features,)
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
        sets = [layers, layers[1:], layers[1::2], layers[1::3]] if every_block else [layers]
        for chosen in (each for each in sets if each):
            for weigh in SHAPES.values():
                weights = [0.0] * len(like.weights)
                for number, block in enumerate(chosen):
                    weights[block] = weigh(number / max(1, len(chosen) - 1))
                yield Candidate(like.features, tuple(weights))

    def best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """Return the one that loses least; an earlier one, unless a later is surely better."""
        best = candidates[0]
        for each in candidates[1:]:
            mine, other = (self.losses_of(one)[self.resampled].mean(1) for one in (each, best))
            if (mine < other).mean() >= SURE:
                best = each
        return best

    def losses_of(self, candidate: Candidate) -> np.ndarray:
        """Return what each picture loses at the wanted cost, prune layers counted."""
        if candidate not in self.seen:
            self.progress(f"comparing ways of pruning: {len(self.seen) + 1}")
            run = self.calibrator
            # the share is what the costliest prune layers, in all blocks, leave of the time
            costliest = Candidate(CHOICES[0], (1.0,) * run.depth)
            spared = run.cost_of_layers(costliest, self.layer_cost) - run.cost_of_layers(
                candidate, self.layer_cost
            )
            share = min(self.share + spared, 0.99)
            try:
                left = run.left_at(candidate, share)
            except InvalidArgumentError:
                if not self.seen:  # the first one: all blocks
                    raise
                self.seen[candidate] = np.full(len(self.images), np.inf)
                return self.seen[candidate]
            found = run.run(candidate, self.images, OnAverage(left, FLOOR * left[-1]))
            self.seen[candidate] = self.at_equal_cost(found, share)
        return self.seen[candidate]

    def at_equal_cost(self, found: Pass, share: float) -> np.ndarray:
        """Return the pictures' losses, as if exactly that share had been spent."""
        equal: np.ndarray = found.losses * (found.padded(self.batch) / share) ** STEEPNESS
        return equal


def _curve(
    calibrator: Calibrator, candidate: Candidate, images: list[int], share: float, batch: int
) -> CalibratedCurve:
    """Return the tolerances at every share that can be reached, that of the user among them."""
    shares, rows, rows_left = [], [], []
    for wanted in sorted({*SHARES, share}):
        try:
            left = calibrator.left_at(candidate, wanted)
        except InvalidArgumentError:
            if wanted == share:
                raise
            continue
        shares.append(wanted)
        rows_left.append(left)
        aim, floor = wanted, FLOOR * left[-1]
        for _ in range(AIMS):
            found = calibrator.run(candidate, images, OnAverage(left, floor))
            # images differ, attention is of the square of their tokens, and batches are padded
            short = wanted - found.padded(batch)
            if abs(short) < CLOSE:
                break
            aim = min(max(aim + short, 0.01), 0.999)
            try:
                left = calibrator.left_at(candidate, aim)
            except InvalidArgumentError:
                break
        assert found.tolerances is not None
        rows.append(found.tolerances.layers)
    return CalibratedCurve(tuple(shares), tuple(rows), tuple(rows_left))
