"""Clocks for the GPU benchmark; the one for the CPU lets every code path be tried without a GPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: Time to spend on a measurement, about.
        least: Repeats at least.
        most: Repeats at most.
    """

    seconds: float = 0.15
    least: int = 7
    most: int = 200

    def repeats(self, estimate: float) -> int:
        """Return how often to repeat what takes `estimate` seconds."""
        return max(self.least, min(self.most, int(self.seconds / max(estimate, 1e-7))))


class CpuClock:
    """Wall time. There is no cache to flush and no graph to capture: both are the same as plain."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort

    def cold(self, run: Run) -> float:
        """Return the median seconds of one run."""
        return statistics.median(self._times(run))

    def in_graph(self, run: Run) -> float:
        """Return the median seconds of one run."""
        return self.cold(run)

    def _times(self, run: Run) -> list[float]:
        times = []
        start = time.perf_counter()
        run()
        for _ in range(self.effort.repeats(time.perf_counter() - start)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times


class CudaClock:
    """CUDA events on the current device."""

    GRAPH_SECONDS = 1e-3
    MOST_COPIES = 20
    """Runs in a captured graph, one after another, so that the graph's own start weighs little."""

    def __init__(self, effort: Effort, device: torch.device) -> None:
        self.effort = effort
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 64 << 20), dtype=torch.uint8, device=device)

    def cold(self, run: Run) -> float:
        """Return the median seconds of one run whose data is not in the L2 cache.

        Before each run a buffer larger than the cache is overwritten. The host enqueues the run
        while that goes on, so that launching costs nothing as long as it is quicker than that.
        """
        repeats = self.effort.repeats(self._estimate(run))
        pairs = [(_event(), _event()) for _ in range(repeats)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def in_graph(self, run: Run) -> float:
        """Return the seconds of one run among several in a CUDA graph: in the cache if they fit.

        Raises:
            RuntimeError: the run cannot be captured (it waits for the device, say).
        """
        estimate = self._estimate(run)
        copies = max(1, min(self.MOST_COPIES, int(self.GRAPH_SECONDS / estimate)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(copies):
                run()
        graph.replay()
        times = []
        for _ in range(self.effort.repeats(estimate * copies)):
            start, end = _event(), _event()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / copies)
        return statistics.median(times)

    def _estimate(self, run: Run) -> float:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


Clock = CpuClock | CudaClock
"""Either clock."""


def make_clock(device: torch.device, effort: Effort) -> Clock:
    """Return the clock of a device."""
    return CudaClock(effort, device) if device.type == "cuda" else CpuClock(effort)
