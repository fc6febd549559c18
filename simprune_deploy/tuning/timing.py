"""Latency of settings beside the dense model's."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.evaluate.timing import EachOnce, Runner, Times, measure, speedup
from simprune_deploy.tuning.results import Setting
from simprune_deploy.tuning.tallies import DENSE_SETTING, Models

if TYPE_CHECKING:
    from simprune_deploy.evaluate.datasets import DataSet

IMAGES = 200
MEMORY_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one setting takes, and how much memory.

    Attributes:
        milliseconds, dense_milliseconds: Of one image, median over the blocks; both models in
            turn.
        images: Number of runs behind each.
        peak_memory: Bytes that the process grew by at most in a run: activations, no weights.
            None where the system does not say.
        speedup_low, speedup_high: 95 % confidence interval of how many times as fast as the dense
            model it is, by resampling the blocks; None with too few of them.
    """

    milliseconds: float
    dense_milliseconds: float
    images: int
    peak_memory: int | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        return dataclasses.asdict(self)


def timing_images(data: DataSet, count: int, least: int) -> np.ndarray:
    """Return float32[n, C, H, W]: pictures spread evenly over the data, repeated if too few.

    Args:
        data: Where they come from.
        count: How many, if there are so many.
        least: How many there must be.
    """
    total = len(data)
    wanted = min(max(count, least), total)
    spread = dataclasses.replace(
        data,
        positions=data.positions[np.arange(wanted) * total // wanted],
        labels=None,
    )
    images = np.concatenate([batch.pixels for batch in spread.batches(0, wanted, wanted)])
    return images if len(images) >= least else np.resize(images, (least, *images.shape[1:]))


def time_settings(
    models: Models,
    settings: Sequence[Setting],
    images: np.ndarray,
    batch: int = 1,
    advance: Callable[[int], None] = lambda runs: None,
) -> dict[Setting, Timing]:
    """Time settings and the dense model in turn.

    Args:
        models: Of all of them.
        settings: With the dense one.
        images: float32[n, C, H, W] in [0, 1]; they are made ready beforehand.
        batch: Images a run.
        advance: Called with the number of runs after each turn.
    """
    models.close_others()
    chunks = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    by_name = {setting.name: setting for setting in settings}
    runners = {name: _runner(models, setting, chunks) for name, setting in by_name.items()}
    times = measure(runners, EachOnce(len(chunks)), advance=advance)
    dense = times[DENSE_SETTING.name]
    found = {}
    for name, setting in by_name.items():
        ratio = speedup(dense.whole, times[name].whole)
        own, its_dense = (_milliseconds(each, batch) for each in (times[name], dense))
        timing = Timing(own, its_dense, len(chunks))
        if setting != DENSE_SETTING:
            timing = dataclasses.replace(timing, speedup_low=ratio.low, speedup_high=ratio.high)
        found[setting] = timing
    return found


def _milliseconds(times: Times, batch: int) -> float:
    return statistics.median(statistics.fmean(block) / batch for block in times.whole)


def _runner(models: Models, setting: Setting, chunks: Sequence[np.ndarray]) -> Runner:
    predictor = models.open(setting)
    prepared = [
        predictor.prepare(predictor.to_inputs(chunk), setting.threshold) for chunk in chunks
    ]
    return lambda index: predictor.run(prepared[index])
