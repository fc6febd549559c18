"""``tune --flops``: thresholds for every layer, calibrated on pictures without labels."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.files import staged_file, write_json
from simprune_deploy.common.progress import Progress
from simprune_deploy.evaluate.datasets import DataSet, Skipped
from simprune_deploy.predict.source import ModelSource, source_of_model
from simprune_deploy.pruning.calibration import Calibrated, Pass, calibrate
from simprune_deploy.pruning.config import Features, format_numbers
from simprune_deploy.pruning.model import PrunedViT
from simprune_deploy.pruning.tuned_file import FORMAT
from simprune_deploy.tuning.results import Measurement
from simprune_deploy.tuning.sweep import describe_source
from simprune_deploy.tuning.token_counts import SHARES, Capacity, capacity_for, size_hints

PICTURES = 96
"""The most that are calibrated and measured on, half and half."""


@dataclasses.dataclass(frozen=True)
class CalibratedModel:
    """What ``tune --flops`` found, as ``export --config`` takes it.

    Attributes:
        share: Of the blocks' FLOPs that was wanted.
        calibrated: The configuration, and what it loses.
        timed: How fast it is beside the dense model; None if nothing was timed.
        capacities: Token counts for static engines, by the share of pictures that exceed them.
        hints: For each prune layer, TensorRT's size hints.
        model, data, environment: As in a sweep.
    """

    share: float
    calibrated: Calibrated
    timed: Measurement | None
    capacities: tuple[Capacity, ...]
    hints: list[dict[str, int]]
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.share:.0%} of the FLOPs: {self.calibrated}"

    @property
    def pruning(self) -> dict[str, Any]:
        """What ``export`` needs, by the names of its options."""
        config = self.calibrated.config
        return {
            "threshold": config.threshold,
            "layers": list(config.layers),
            "selection": config.selection,
            "reduction": config.reduction,
            "place": config.place,
            "features": config.features,
            "proportional_attention": config.proportional_attention,
            "tokens": list(config.capacities) or "dynamic",
            "multiple_of": config.multiple_of,
            "curve": config.curve and config.curve.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "format": FORMAT,
            "kind": "calibrated configuration",
            "pruning": self.pruning,
            "found": self.calibrated.to_dict(),
            "timed": self.timed and self.timed.to_dict(),
            "calibration": {
                "tokens": [each.to_dict() for each in self.capacities],
                "size_hints": self.hints,
            },
            "model": self.model,
            "data": self.data,
            "environment": self.environment,
        }

    @property
    def _served(self) -> str:
        batch = self.calibrated.batch
        return f" in batches of {batch}, padded" if batch > 1 else ""

    def save(self, path: Path) -> None:
        """Write it as JSON; it appears whole or not at all."""
        with staged_file(path) as staging:
            write_json(staging, self.to_dict())

    def shown(self) -> dict[str, Any]:
        """Return what a person wants to know of it."""
        config, found = self.calibrated.config, self.calibrated.measured
        of = "held out" if self.calibrated.held_out else "those it was calibrated on: too few"
        facts: dict[str, Any] = {
            "wish": f"{self.share:.0%} of the blocks' FLOPs{self._served}",
            "compares": config.features,
            "prunes inside blocks": format_numbers(config.layers),
            "compared": f"{self.calibrated.evaluated} ways of pruning",
            "measured on": f"{len(found.losses)} pictures ({of})",
            "FLOPs": (
                f"{found.padded(1):.1%} of the blocks', padded in batches of 8 "
                f"{found.padded(8):.1%}, of 32 {found.padded(32):.1%}"
            ),
            "cosine to the dense output": (
                f"{1 - found.losses.mean():.4f}, at worst {1 - found.losses.max():.4f}"
            ),
            "patches left": " -> ".join(f"{each:.0f}" for each in found.kept.mean(0))
            + (", of every picture" if config.capacities else ""),
        }
        if self.calibrated.comparison:
            facts["by"] = self.calibrated.comparison
        if self.timed is not None and self.timed.speedup is not None:
            facts["speed-up"] = (
                f"{self.timed.speedup:.2f} ({self.timed.milliseconds:.2f} ms, dense "
                f"{self.timed.dense_milliseconds:.2f} ms)"
            )
        return facts


def calibrated_source(
    source: ModelSource,
    data: DataSet,
    share: float,
    *,
    features: Features | None,
    layers: tuple[int, ...] | None,
    batch: int,
    tokens: Literal["dynamic", "fixed"] | None,
    layer_cost: float | None,
    progress: Progress,
) -> tuple[ModelSource, Calibrated]:
    """Return a checkpoint's model with thresholds calibrated on pictures, and what they lose.

    Args:
        source: The checkpoint.
        data: The pictures.
        share: Of the blocks' FLOPs.
        features, layers, batch, tokens: As in :func:`calibrate`.
        layer_cost: The same; None: as is usual.
        progress: Called with a word on each step.

    Raises:
        SimpruneError: the model is an exported graph, or the pictures or the share do not do.
    """
    import torch

    if source.model is None:
        raise InvalidArgumentError(
            f"the graph of {source.name} fixes its layers, and {argument('flops')} chooses them: "
            "tune its checkpoint"
        )
    pixels = torch.from_numpy(_pictures(data))
    found = calibrate(
        source.model.vit,
        pixels,
        share,
        features=features,
        layers=layers,
        batch=batch,
        tokens=tokens,
        layer_cost=layer_cost,
        progress=progress,
    )
    return source_of_model(source.name, PrunedViT(source.model.vit, found.config)), found


def _pictures(data: DataSet) -> np.ndarray:
    """Return float32[n, C, H, W], normalized: at most PICTURES of the data, spread evenly."""
    count = min(len(data), PICTURES)
    wanted = np.unique(np.linspace(0, len(data) - 1, count).round().astype(int))
    skipped: list[Skipped] = []
    pixels = [
        batch.pixels
        for index in wanted
        for batch in data.batches(int(index), int(index) + 1, 1, skipped)
    ]
    data.check_skipped(skipped)
    found: np.ndarray = data.preprocessing.normalize(np.concatenate(pixels))
    return found


def counts_of(
    found: Pass, prefix: int, patches: int
) -> tuple[list[Capacity], list[dict[str, int]]]:
    """Return token counts for static engines and size hints, from what pictures kept."""
    kept = [Counter(column.tolist()) for column in found.kept.T]
    return [capacity_for(kept, share) for share in SHARES], size_hints(kept, prefix, patches)


def result_of(
    source: ModelSource,
    calibrated: Calibrated,
    timed: Measurement | None,
    data: DataSet,
    environment: dict[str, Any],
) -> CalibratedModel:
    """Put together what was found."""
    metadata = source.metadata
    capacities, hints = counts_of(
        calibrated.calibration, metadata.num_prefix_tokens, metadata.num_patches
    )
    return CalibratedModel(
        calibrated.config.threshold,
        calibrated,
        timed,
        tuple(capacities),
        hints,
        describe_source(source),
        data.to_dict(),
        environment,
    )
