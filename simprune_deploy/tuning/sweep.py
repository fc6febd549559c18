"""Accuracy, tokens, time and memory of a model at many settings, measured on one data set.

Pictures are read once for all settings that share a graph, shard by shard; every finished shard is
stored. Where the shards run (this process, a Ray cluster) changes nothing in the result.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simprune_deploy.common.errors import argument, spelled
from simprune_deploy.common.progress import NO_BAR, ProgressBar
from simprune_deploy.common.requests import check_whole
from simprune_deploy.common.versions import __version__
from simprune_deploy.evaluate.datasets import DataSet
from simprune_deploy.evaluate.memory import MemoryRun, probe
from simprune_deploy.evaluate.timing import RUNS_A_BLOCK
from simprune_deploy.predict.answers import check_cut, cut_of, one_sided
from simprune_deploy.predict.source import ModelSource
from simprune_deploy.tuning.measurements import measurement_of, tells_classes
from simprune_deploy.tuning.results import BASELINES, OURS, Measurement, Setting, SweepResult
from simprune_deploy.tuning.store import Store, open_store
from simprune_deploy.tuning.sweep_runtimes import SweepRuntime
from simprune_deploy.tuning.tallies import (
    COSINE_STEPS,
    DENSE_SETTING,
    Models,
    Shard,
    ShardResult,
    Tally,
    evaluate_shard,
    shards_of,
    total,
)
from simprune_deploy.tuning.timing import IMAGES, MEMORY_IMAGES, time_settings, timing_images

SHARD_IMAGES = 64
BATCH = 32


class Runner(Protocol):
    """Where shards run.

    Attributes:
        environment: What a report says of it.
    """

    environment: dict[str, Any]

    def run(
        self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
    ) -> Iterator[ShardResult]:
        """Yield the shards' results as they come, in any order."""


class LocalRunner:
    """Runs shards one after another in this process."""

    environment: dict[str, Any] = {}  # noqa: RUF012

    def run(
        self, models: Models, data: DataSet, batch: int, shards: Sequence[Shard]
    ) -> Iterator[ShardResult]:
        for shard in shards:
            yield evaluate_shard(models, data, batch, shard)


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """How to measure.

    Args:
        batch: Pictures a run, for everything but the timing. Default 32.
        timing: Runs that each latency is of; 0 leaves latency and memory out. Default 200.
        cut: Of a model with one output: above it is class 1. Default None: 0.

    Raises:
        SimpruneError: a value is out of its range.
    """

    batch: int = BATCH
    timing: int = IMAGES
    cut: float | None = None

    def __post_init__(self) -> None:
        check_cut(self.cut)
        check_whole("batch", self.batch, 1)
        check_whole("timing", self.timing, 0)


def batch_for(source: ModelSource, wanted: int) -> int:
    """Return the batch to run: the wanted one, within what an exported graph takes."""
    if source.graph is None:
        return wanted
    low, high = source.metadata.batch
    return max(low, min(wanted, high))


class Sweep:
    """One model on one data set; settings are measured as they are asked for, each of them once.

    Args:
        source: The model.
        data: The pictures.
        runtime: What runs it.
        store: Where finished work is kept.
        options: How to measure.
        runner: Where shards run. Default: this process.
        bar: Shows how far it is. Default: nothing is shown.

    Raises:
        SimpruneError: a cut is asked for, and the model has other than one output.
    """

    def __init__(
        self,
        source: ModelSource,
        data: DataSet,
        runtime: SweepRuntime,
        store: Store,
        options: SweepOptions,
        runner: Runner | None = None,
        bar: ProgressBar = NO_BAR,
    ) -> None:
        self.source, self.data, self.runtime, self.store = source, data, runtime, store
        self.options, self.runner, self.bar = options, runner or LocalRunner(), bar
        self.cut = cut_of(source.metadata.num_classes, options.cut)
        self.shards = shards_of(len(data), shard_size(options.batch))

    def measure(self, settings: Sequence[Setting], timed: bool = True) -> list[Measurement]:
        """Return the cells of the dense model and of the settings, in this order.

        Args:
            settings: What to measure; what is stored already is taken from there.
            timed: Measure latency and memory too, unless the options leave them out.

        Raises:
            SimpruneError: too many pictures cannot be read, or the model's outputs are no numbers.
        """
        groups = self.runtime.groups(settings)
        work = [(group, self._missing([DENSE_SETTING, *group])) for group in groups]
        waiting = sum(s.stop - s.start for _, shards in work for s in shards for _ in s.settings)
        self.bar.begin("images", waiting)
        for group, shards in work:
            if shards:
                self._run(group, shards)
        self._check_skipped()
        if self.options.timing and timed:
            self._time(groups)
        return [self._cell(each) for each in [DENSE_SETTING, *settings]]

    def _missing(self, settings: Sequence[Setting]) -> list[Shard]:
        shards = []
        for number, start, stop in self.shards:
            left = tuple(each for each in settings if not self.store.has(each, number))
            if left:
                shards.append(Shard(number, start, stop, left, cut=self.cut))
        return shards

    def _run(self, group: Sequence[Setting], shards: Sequence[Shard]) -> None:
        # an earlier group may have run the dense model meanwhile
        todo = []
        for shard in shards:
            left = tuple(s for s in shard.settings if not self.store.has(s, shard.number))
            todo.append(
                dataclasses.replace(shard, settings=left, dense=self.store.dense(shard.number))
            )
            self.bar.advance((len(shard.settings) - len(left)) * (shard.stop - shard.start))
        models = self.runtime.models(group)
        for result in self.runner.run(models, self.data, self.options.batch, todo):
            self.store.add(result)
            self._check_skipped()
            _, start, stop = self.shards[result.number]
            self.bar.advance(len(result.tallies) * (stop - start))

    def _check_skipped(self) -> list[tuple[str, str]]:
        skipped = [each for _, found in sorted(self.store.skipped.items()) for each in found]
        if skipped:
            self.data.check_skipped(skipped)
        return skipped

    def time(self, settings: Sequence[Setting]) -> list[Measurement]:
        """Return cells that hold nothing but latency and memory: no picture is counted."""
        self._time(self.runtime.groups(settings))
        found = [(each, self.store.timings[each]) for each in settings]
        return [
            Measurement(
                setting,
                images=0,
                milliseconds=each.milliseconds,
                dense_milliseconds=each.dense_milliseconds,
                speedup_low=each.speedup_low,
                speedup_high=each.speedup_high,
                peak_memory=each.peak_memory,
            )
            for setting, each in found
        ]

    def _time(self, groups: Sequence[Sequence[Setting]]) -> None:
        known = self.store.timings
        waiting = [[s for s in group if s.method == OURS and s not in known] for group in groups]
        waiting = [group for group in waiting if group]
        if not waiting:
            return
        batch, at_once = _timing_batch(self.source), memory_batch(self.options.batch)
        images = timing_images(self.data, self.options.timing * batch, max(batch, at_once))
        runs = len(images) // batch
        self.bar.begin("timing", sum((len(group) + 1) * runs for group in waiting))
        for group in waiting:
            self._time_group(group, images, batch, at_once)

    def _time_group(
        self, group: Sequence[Setting], images: np.ndarray, batch: int, at_once: int
    ) -> None:
        order = [DENSE_SETTING, *group]
        memory: tuple[int | None, ...] = (None,) * len(order)
        if self.runtime.no_memory is None:
            models = self.runtime.alone(group, keep_memory=False)
            chosen = images[:at_once]
            memory = probe(
                [MemoryRun(models.spec(each), chosen, each.threshold, True) for each in order]
            ).runs
        models = self.runtime.alone(group, keep_memory=True)
        times = time_settings(models, order, images, batch, self.bar.advance)
        for setting, peak in zip(order, memory, strict=True):
            self.store.add_timing(setting, dataclasses.replace(times[setting], peak_memory=peak))

    def tally(self, setting: Setting) -> Tally:
        """Return the counts of a setting that was measured."""
        return total(self.store.tallies[setting, number] for number, _, _ in self.shards)

    def _cell(self, setting: Setting) -> Measurement:
        timed = self.store.timings.get(setting)
        found, dense = self.tally(setting), self.tally(DENSE_SETTING)
        return measurement_of(self.source, self.data, setting, found, dense, timed)

    def no_classes(self) -> str | None:
        """Say why nothing can be told from the classes of what was measured; None if it can."""
        dense = self.tally(DENSE_SETTING)
        if self.cut is None or tells_classes(self.source, self.data, dense):
            return None
        found = one_sided(dense.above, dense.images, self.cut)
        mean = dense.values / COSINE_STEPS / dense.images
        return f"{found} (the dense model's: mean {mean:.4g}, deviation {dense.deviation:.4g})"

    def environment(self) -> dict[str, Any]:
        """Return what ran on what."""
        return {
            **self.runtime.environment,
            **self.runner.environment,
            "simprune-deploy": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "batch": self.options.batch,
            **({} if self.cut is None else {"cut": self.cut}),
            "timing": self._timing_text(),
        }

    def _timing_text(self) -> str:
        timings = self.store.timings
        if not timings:
            return "none"
        runs = sorted({each.images for each in timings.values()})
        if self.runtime.no_memory is None:
            memory = (
                f"peak memory is what a batch of {memory_batch(self.options.batch)} adds to the "
                "process, without weights"
            )
        else:
            memory = f"peak memory is not measured: {self.runtime.no_memory}"
        return (
            f"batch {_timing_batch(self.source)}, {' or '.join(f'{n:,}' for n in runs)} runs "
            f"each, median of blocks of {RUNS_A_BLOCK}, in turn with the dense model; {memory}"
        )

    def described_data(self) -> dict[str, Any]:
        """Return what the data is, and which pictures could not be read."""
        described = self.data.to_dict()
        if self.cut is not None:
            how = f"one output: above {self.cut:g} is one class, at or below it the other"
            described["notes"].append(how)
        return {**described, "skipped": [list(each) for each in self._check_skipped()]}

    def result(self, settings: Sequence[Setting], command: str) -> SweepResult:
        """Measure the settings and return everything, as it is stored and reported.

        Args:
            settings: Beside the dense model.
            command: What makes the sweep again.
        """
        cells = self.measure(settings)
        not_measured = []
        if (why := self.no_classes()) is not None:
            not_measured.append(spelled(f"classes: {why}"))
        if not self.options.timing:
            not_measured.append(spelled(f"latency and peak memory: {argument('timing', 0)}"))
        elif any(setting.method in BASELINES for setting in settings):
            not_measured.append(
                "the baselines' latency: they are written to compare accuracy at the same token "
                "counts, not for speed"
            )
        return SweepResult(
            model=describe_source(self.source),
            data=self.described_data(),
            environment={
                **self.environment(),
                "command": command,
                "not_measured": not_measured,
            },
            cells=tuple(cells),
        )


def describe_source(source: ModelSource) -> dict[str, Any]:
    """Return what a report says of the model."""
    metadata = source.metadata
    return {
        "architecture": metadata.architecture or "(unnamed)",
        "source": source.name,
        "kind": source.kind,
        "sha256": source.sha256,
        "image_size": list(metadata.image_size),
        "num_classes": metadata.num_classes,
        "num_patches": metadata.num_patches,
        "num_prefix_tokens": metadata.num_prefix_tokens,
        "depth": metadata.depth,
        "parameters": metadata.parameters,
        "precision": metadata.precision,
        "proportional_attention": metadata.pruning.proportional_attention,
        "multiple_of": metadata.pruning.multiple_of,
        "calibrated_layers": list(metadata.pruning.layers) if metadata.pruning.curve else None,
    }


def setting_of(source: ModelSource) -> Setting:
    """Return the setting that an export was made with."""
    pruning = source.metadata.pruning
    return Setting(
        OURS,
        pruning.threshold,
        pruning.layers,
        pruning.selection,
        pruning.reduction,
        pruning.capacities or None,
        pruning.place,
        pruning.features,
    )


def _timing_batch(source: ModelSource) -> int:
    """Return the batch that is timed: one picture, unless an exported graph takes more only."""
    return source.metadata.batch[0] if source.graph is not None else 1


def memory_batch(batch: int) -> int:
    """Return the batch whose memory is measured, where a sweep runs batches of `batch`."""
    return min(batch, MEMORY_IMAGES)


def shard_size(batch: int) -> int:
    """Return how many pictures a shard holds: whole batches, whoever runs them."""
    return max(1, SHARD_IMAGES // batch) * batch


def identity_of(
    source: ModelSource, data: DataSet, runtime: SweepRuntime, options: SweepOptions
) -> dict[str, Any]:
    """Return what must be the same for cells to belong together."""
    pruning = source.metadata.pruning
    return {
        "model": source.sha256,
        "data": data.identity,
        "runtime": runtime.environment["runtime"],
        "set of engines": runtime.environment.get("set of engines"),
        "batch size": options.batch,
        "cut": cut_of(source.metadata.num_classes, options.cut),
        "proportional attention": pruning.proportional_attention,
        "multiple of": pruning.multiple_of,
        "curve": pruning.curve and pruning.curve.to_dict(),
        "version": __version__,
    }


def start_sweep(
    source: ModelSource,
    data: DataSet,
    runtime: SweepRuntime,
    folder: Path,
    options: SweepOptions,
    *,
    resume: bool = False,
    force: bool = False,
    runner: Runner | None = None,
    bar: ProgressBar = NO_BAR,
) -> Sweep:
    """Open the folder of a sweep, and return the sweep.

    Raises:
        SimpruneError: the folder cannot be used; see
            :func:`simprune_deploy.tuning.store.open_store`. Or a cut is asked for, and the model
            has other than one output.
    """
    identity = identity_of(source, data, runtime, options)
    store = open_store(folder, identity, resume, force)
    return Sweep(source, data, runtime, store, options, runner, bar)
