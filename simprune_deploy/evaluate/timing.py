"""Times models side by side, in turn, so that a slow spell of the machine or its clocks hits all.

The one timer of sweeps, of tuning and of ``bench``. What is timed is given as functions, and so is
the clock: nothing here knows what runs a model.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simprune_deploy.common.progress import Progress, silent
from simprune_deploy.common.requests import check_whole

Runner = Callable[[int], "float | None"]
"""Runs input number i to its end. Returns how many milliseconds of it were the GPU's, if known."""

BLOCKS = 25
RUNS_A_BLOCK = 10
RESAMPLES = 10_000
LEVEL = 95
FEWEST_BLOCKS = 8
"""With fewer there is no saying how sure a ratio is."""

MOST = 1_000_000


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to time.

    Attributes:
        iterations: Timed runs of every model, at least; rounded up to whole rounds over the
            inputs, so that each input counts the same.
        warm_up: Runs of every model before that.
        inputs: How many different inputs there are.
    """

    iterations: int
    warm_up: int
    inputs: int

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("warm_up", 0)):
            check_whole(name, getattr(self, name), least, MOST)

    @property
    def rounds(self) -> int:
        """Rounds over the inputs."""
        return math.ceil(self.iterations / self.inputs)

    @property
    def rounds_a_block(self) -> int:
        """Rounds that a model runs before it is another's turn."""
        return math.ceil(self.rounds / BLOCKS)

    @property
    def blocks(self) -> list[range]:
        """The numbers of the runs of each turn; input i is run number i, modulo the inputs."""
        runs = self.rounds_a_block * self.inputs
        return [range(runs) for _ in range(math.ceil(self.rounds / self.rounds_a_block))]


@dataclasses.dataclass(frozen=True)
class EachOnce:
    """A plan that runs every input once, in turns of :data:`RUNS_A_BLOCK`.

    Attributes:
        inputs: How many different inputs there are.
        warm_up: Runs of every model before that. Default 3.
    """

    inputs: int
    warm_up: int = 3

    @property
    def blocks(self) -> list[range]:
        """The numbers of the inputs of each turn."""
        starts = range(0, self.inputs, RUNS_A_BLOCK)
        return [range(at, min(at + RUNS_A_BLOCK, self.inputs)) for at in starts]


@dataclasses.dataclass(frozen=True)
class Times:
    """What one model took, in milliseconds, block by block.

    Attributes:
        whole: From the input in the processor's memory to the output there.
        gpu: The GPU's part of it, without copies; empty where nobody knows.
    """

    whole: list[list[float]]
    gpu: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long runs took, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    runs: int


@dataclasses.dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another.

    Attributes:
        ratio: The median over the blocks of what both took in the same block.
        low, high: Its confidence interval, by resampling the blocks; None with too few of them.
        blocks: How many there were.
    """

    ratio: float
    low: float | None
    high: float | None
    blocks: int


def measure(
    runners: Mapping[str, Runner],
    plan: Plan | EachOnce,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
    advance: Callable[[int], None] = lambda runs: None,
) -> dict[str, Times]:
    """Time every runner on the same inputs.

    The models take turns, in blocks, and another one begins each block (A B, B A, ...). A turn
    begins with one run that is not timed: it brings the model's weights and code back to where
    the others have pushed them out.

    Args:
        runners: What to time, by name.
        plan: How much.
        clock: Returns seconds.
        progress: Called with a word on what runs.
        advance: Called with the number of timed runs after each turn.
    """
    for name, run in runners.items():
        progress(f"warming up: {name}")
        for index in range(plan.warm_up):
            run(index % plan.inputs)
    times = {name: Times([], []) for name in runners}
    blocks, names = plan.blocks, list(runners)
    for number, block in enumerate(blocks):
        progress(f"timing: block {number + 1} of {len(blocks)}")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            run = runners[name]
            run(block[0] % plan.inputs)
            whole, gpu = [], []
            for index in block:
                start = clock()
                own = run(index % plan.inputs)
                whole.append((clock() - start) * 1e3)
                if own is not None:
                    gpu.append(own)
            times[name].whole.append(whole)
            if gpu:
                times[name].gpu.append(gpu)
            advance(len(block))
    return times


def latency(blocks: Sequence[Sequence[float]]) -> Latency:
    """Summarize all runs of all blocks."""
    values = np.concatenate([np.asarray(block, np.float64) for block in blocks])
    p50, p90, p99 = (float(each) for each in np.percentile(values, (50, 90, 99)))
    return Latency(float(values.mean()), p50, p90, p99, len(values))


def speedup(
    slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]], seed: int = 0
) -> Speedup:
    """Compare two models block by block, so that what slowed a block down for both cancels.

    Args:
        slow: Milliseconds of the one, by block.
        fast: Of the other, in the same blocks.
        seed: Of the resampling. Default 0.
    """
    ratios = np.array([np.sum(a) / np.sum(b) for a, b in zip(slow, fast, strict=True)])
    ratio = float(np.median(ratios))
    if len(ratios) < FEWEST_BLOCKS:
        return Speedup(ratio, None, None, len(ratios))
    chosen = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(np.median(ratios[chosen], axis=1), (tail, 100 - tail))
    return Speedup(ratio, float(low), float(high), len(ratios))


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one prune layer's own work takes, as a share of the dense model's time.

    Attributes:
        share: On average over the layers. Below 0 where noise hides it.
        low, high: What follows from the bounds of the speed-up; None where it has none.
    """

    share: float
    low: float | None
    high: float | None


def layer_cost(found: Speedup, allowed: float, layers: int) -> LayerCost | None:
    """Return what a prune layer costs: what a speed-up lacks to the one allowed, a layer's part.

    Args:
        found: Over the dense model.
        allowed: The speed-up that the token counts allow, without the layers' own work.
        layers: How many prune layers there are. None of them: nothing is known of one.
    """
    if not layers:
        return None

    def share(ratio: float) -> float:
        return (1 / ratio - 1 / allowed) / layers

    return LayerCost(
        share(found.ratio),
        # the slower the model, the dearer its layers
        None if found.high is None else share(found.high),
        None if found.low is None else share(found.low),
    )


def as_json(value: Any) -> Any:
    """Return a dataclass's values as JSON types, with as many digits as times are worth."""
    return {
        name: round(each, 5) if isinstance(each, float) else each
        for name, each in dataclasses.asdict(value).items()
    }
