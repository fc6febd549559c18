"""Latency beside the dense model's, and the memory that a run takes.

Times are medians of short blocks, taken in turn with the dense model's, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.tune.results import Setting
from simprune_deploy.tune.tallies import DENSE_SETTING, Executor

if TYPE_CHECKING:
    from simprune_deploy.evaluate.datasets import DataSet

IMAGES = 200
BLOCK = 10
"""Runs in a block; the median is of blocks."""

MEMORY_IMAGES = 8
MEMORY_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one setting takes.

    Attributes:
        milliseconds, dense_milliseconds: Median of one image; both models in turn.
        images: Number of runs behind each.
        peak_memory: Bytes that the process grew by at most in a run: activations, no weights.
            None where the system does not say.
    """

    milliseconds: float
    dense_milliseconds: float
    images: int
    peak_memory: int | None

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
    executor: Executor,
    settings: Sequence[Setting],
    images: np.ndarray,
    batch: int = 1,
    advance: Callable[[int], None] = lambda runs: None,
) -> dict[Setting, tuple[float, float]]:
    """Return the median milliseconds an image takes at each setting, and densely.

    Args:
        executor: Runs them.
        settings: Not the dense one; it is timed beside them.
        images: float32[n, C, H, W]; a block takes :data:`BLOCK` batches of them.
        batch: Images a run.
        advance: Called with the number of runs after each block.
    """
    chunks = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    blocks = [chunks[i : i + BLOCK] for i in range(0, len(chunks), BLOCK)]
    order = [DENSE_SETTING, *settings]
    seconds: dict[Setting, list[float]] = {each: [] for each in order}
    for setting in order:
        for chunk in blocks[0][:3]:  # the first runs find caches cold
            _run(executor, setting, chunk)
    for number, block in enumerate(blocks):
        turn = number % len(order)  # nobody always comes after the same neighbour
        for setting in order[turn:] + order[:turn]:
            start = time.perf_counter()
            for chunk in block:
                _run(executor, setting, chunk)
            seconds[setting].append((time.perf_counter() - start) / (len(block) * batch))
            advance(len(block))
    medians = {each: statistics.median(found) * 1e3 for each, found in seconds.items()}
    return {each: (medians[each], medians[DENSE_SETTING]) for each in settings}


def _run(executor: Executor, setting: Setting, pixels: np.ndarray) -> object:
    return executor.dense(pixels) if setting == DENSE_SETTING else executor.pruned(setting, pixels)


def peak_memories(
    executor: Executor, settings: Sequence[Setting], images: np.ndarray
) -> dict[Setting, int | None]:
    """Return the bytes by which the process grows at most while it runs a batch, for each setting.

    Weights are loaded before and do not count.
    """
    found: dict[Setting, int | None] = {}
    for setting in settings:
        run = functools.partial(_run, executor, setting, images)
        run()
        grown = [_growth(run) for _ in range(MEMORY_RUNS)]
        known = [each for each in grown if each is not None]
        found[setting] = int(statistics.median(known)) if len(known) == len(grown) else None
    return found


def _growth(run: Callable[[], object]) -> int | None:
    """Return how many bytes of memory the process took at most, beyond those it had (Linux)."""
    status = Path("/proc/self/status")
    try:
        # what was freed and not yet given back would hide the growth
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
        before = _kilobytes(status, "VmRSS")
        run()
        return max(0, _kilobytes(status, "VmHWM") - before) * 1024
    except (OSError, KeyError):
        return None


def _kilobytes(status: Path, name: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)
