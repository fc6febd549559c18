"""What tuning found, as a file that ``export --config`` takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.common.files import staged_file, write_json
from simprune_deploy.evaluate.statistics import PAIRED_METHOD
from simprune_deploy.pruning.tuned_file import FORMAT
from simprune_deploy.tuning.results import Measurement
from simprune_deploy.tuning.search import Found, drop_of
from simprune_deploy.tuning.sweep import Sweep, describe_source
from simprune_deploy.tuning.token_counts import SHARES, Capacity, capacity_for, size_hints


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A setting that was found, and why.

    Attributes:
        found: By the search.
        pruning: What ``export`` needs, by the names of its options.
        static: The setting with fixed token counts, measured; None if none were asked for.
        capacities: Token counts by the share of images that exceed them.
        hints: For each prune layer, TensorRT's size hints.
        model, data, environment: As in a sweep.
    """

    found: Found
    pruning: dict[str, Any]
    static: Measurement | None
    capacities: tuple[Capacity, ...]
    hints: list[dict[str, int]]
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.found.wish}: {self.found.cell}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return {
            "format": FORMAT,
            "kind": "tuned configuration",
            "pruning": self.pruning,
            **self.found.to_dict(),
            "static": self.static and self.static.to_dict(),
            "calibration": {
                "tokens": [each.to_dict() for each in self.capacities],
                "size_hints": self.hints,
            },
            "model": self.model,
            "data": self.data,
            "environment": self.environment,
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; it appears whole or not at all."""
        with staged_file(path) as staging:
            write_json(staging, self.to_dict())

    def shown(self) -> dict[str, Any]:
        """Return what a person wants to know of it."""
        facts: dict[str, Any] = {
            "wish": self.found.wish,
            "threshold": f"{self.pruning['threshold']:g}",
            f"prunes {self.pruning['place']} blocks": self.pruning["layers"],
            **self._of_cell(self.found.cell),
            "confidence from": PAIRED_METHOD if self.found.drop else "no labels",
            "evaluated": f"{len(self.found.cells)} settings on {self.found.cell.images:,} images",
            "patches that static engines need": "; ".join(
                f"{'/'.join(map(str, each.tokens))} ({each.share:.0%} of the images keep more)"
                for each in self.capacities
            ),
        }
        if self.static is not None:
            fixed = self._of_cell(self.static)
            facts["tokens fixed at"] = self.pruning["tokens"]
            facts |= {f"{name}, fixed": value for name, value in fixed.items()}
        return facts

    def _of_cell(self, cell: Measurement) -> dict[str, str]:
        facts = {}
        confidence = self.found.wish.confidence
        if cell.top1 is not None:
            drop = drop_of(cell, confidence)
            facts["accuracy"] = (
                f"{cell.top1:.2%}, a drop of {drop.estimate:.2%} ({drop.low:.2%} to "
                f"{drop.high:.2%} with {confidence:.0%} confidence)"
            )
        if cell.agreement is not None:
            facts["same as dense"] = f"{cell.agreement:.2%}"
        if cell.moved is not None:
            facts["output moved by"] = (
                f"{cell.moved:.3f} standard deviations on average, {cell.worst_moved:.3f} at most"
            )
        facts["tokens processed"] = f"{cell.tokens_processed:.0%}"
        if cell.speedup is not None:
            facts["speed-up"] = (
                f"{cell.speedup:.2f} ({cell.milliseconds:.2f} ms, dense "
                f"{cell.dense_milliseconds:.2f} ms)"
            )
        return facts


def tuned(sweep: Sweep, found: Found, overflow: float | None, command: str) -> Tuned:
    """Add to what a search found the token counts for static engines.

    Args:
        sweep: That the search measured with.
        found: By the search.
        overflow: Fix token counts that at most this share of the images exceeds at a layer, and
            measure the setting with them. Default (None): counts stay dynamic.
        command: What makes it again.
    """
    setting, facts = found.cell.setting, sweep.source.metadata
    kept = sweep.tally(setting).kept
    capacities = [capacity_for(kept, share) for share in SHARES]
    static = None
    tokens: list[int] | str = "dynamic"
    if overflow is not None:
        if sweep.source.graph is not None:
            raise InvalidArgumentError(
                f"{argument('overflow')} fixes token counts, and the graph of {sweep.source.name} "
                f"is made: "
                "tune its checkpoint"
            )
        fixed = capacity_for(kept, overflow)
        tokens = list(fixed.tokens)
        _, static = sweep.measure([dataclasses.replace(setting, tokens=fixed.tokens)])
        if overflow not in SHARES:
            capacities.append(fixed)
    pruning = {
        "threshold": setting.threshold,
        "layers": list(setting.layers),
        "selection": setting.selection,
        "reduction": setting.reduction,
        "place": setting.place,
        "features": setting.features,
        "proportional_attention": facts.pruning.proportional_attention,
        "tokens": tokens,
        "multiple_of": 1 if static is not None else facts.pruning.multiple_of,
    }
    return Tuned(
        found=found,
        pruning=pruning,
        static=static,
        capacities=tuple(capacities),
        hints=size_hints(kept, facts.num_prefix_tokens, facts.num_patches),
        model=describe_source(sweep.source),
        data=sweep.described_data(),
        environment={**sweep.environment(), "command": command},
    )
