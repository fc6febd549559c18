"""What a sweep measured, as data: read by the reports, the search and the checks in CI.

Light: standard library only.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from simprune_deploy.common.errors import ArtifactError
from simprune_deploy.common.files import staged_file, write_json
from simprune_deploy.evaluate.classes import ClassResult

FORMAT = 1
DENSE = "dense"
OURS = "ours"
BASELINES = ("random", "redundancy", "saint", "tome")
"""Other methods, at the token counts of ours; see baselines.py."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to prune.

    Attributes:
        method: "ours" (the operator), "dense" (nothing is pruned), or one of BASELINES.
        threshold: The cosine threshold; None for methods without one.
        layers: The blocks before or inside which it prunes; empty for "dense".
        selection: "pairs" or "redundancy"; of "ours" only.
        reduction: "merge" or "drop"; of "ours" only.
        tokens: Patches left after each prune layer, where they are fixed. Default: the image's.
        place: "before" or "inside" those blocks.
        features: What is compared: "tokens", "keys", "mean-keys" or "tokens+keys".
    """

    method: str
    threshold: float | None = None
    layers: tuple[int, ...] = ()
    selection: str = "pairs"
    reduction: str = "merge"
    tokens: tuple[int, ...] | None = None
    place: str = "before"
    features: str = "tokens"

    @property
    def name(self) -> str:
        """A short name for tables and legends, unlike that of any other setting of a sweep."""
        if self.method == DENSE:
            return DENSE
        parts = [] if self.method == OURS else [self.method]
        if self.threshold is not None:
            parts.append(f"{self.threshold:g}")
        if self.tokens is not None:
            parts.append(f"{'/'.join(map(str, self.tokens))} tokens")
        parts.append(f"{self.place} {','.join(map(str, self.layers))}")
        return " ".join([*parts, *self.form])

    @property
    def form(self) -> list[str]:
        """How the operator is used where that is not its usual form, in words."""
        if self.method != OURS:
            return []
        unusual = (self.selection, self.reduction) != ("pairs", "merge")
        parts = [f"{self.selection}+{self.reduction}"] if unusual else []
        return [*parts, *([] if self.features == "tokens" else [f"by {self.features}"])]

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as JSON types."""
        values = dataclasses.asdict(self)
        values["layers"] = list(self.layers)
        values["tokens"] = None if self.tokens is None else list(self.tokens)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setting:
        """Build a setting from :meth:`to_dict`'s result."""
        tokens = values["tokens"]
        return cls(
            **{
                **values,
                "layers": tuple(values["layers"]),
                "tokens": None if tokens is None else tuple(tokens),
            }
        )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one setting; None where it could not be, or was not asked for.

    Attributes:
        setting: The setting.
        images: How many.
        top1, top5: Accuracy in [0, 1]; None without labels.
        agreement: Share of images with the dense model's class; None for feature models, and where
            a single output is on one side of the cut for all images.
        cosine: Mean cosine of the output (logits or features) to the dense model's; None of a
            single output, which has no direction.
        worst_cosine: The smallest.
        moved: Of a single output, the mean distance to the dense model's in standard deviations of
            the dense model's over these images; None of models with more.
        worst_moved: The largest.
        tokens_processed: Mean share of the dense model's tokens over all blocks, in (0, 1].
        kept: Mean patches kept after each prune layer.
        gflops: Mean GFLOPs of the blocks for one image.
        flops_share: Share of the dense model's.
        padded_flops_share: The same by batch (1, 8 and 32), as batches run: each layer has as many
            slots as its fixed count says, or as the image of the batch that keeps the most needs.
            The mean over batches drawn from these images; empty if no image was counted.
        milliseconds: Median time of one image, batch `timing_batch`.
        dense_milliseconds: The dense model's, measured side by side with it.
        peak_memory: Bytes.
        right_only_here, right_only_dense: Images that only this setting, or only the dense model,
            classifies rightly: what a paired test of the accuracies needs. None without labels.
        classes: Per class; empty without labels.
        speedup_low, speedup_high: 95 % confidence interval of the speed-up; None if not timed, or
            with too few runs.
    """

    setting: Setting
    images: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    tokens_processed: float = 1.0
    kept: tuple[float, ...] = ()
    gflops: float | None = None
    flops_share: float | None = None
    milliseconds: float | None = None
    dense_milliseconds: float | None = None
    peak_memory: int | None = None
    right_only_here: int | None = None
    right_only_dense: int | None = None
    classes: tuple[ClassResult, ...] = ()
    speedup_low: float | None = None
    speedup_high: float | None = None
    moved: float | None = None
    worst_moved: float | None = None
    padded_flops_share: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the dense model; None if not timed."""
        if not self.milliseconds or not self.dense_milliseconds:
            return None
        return self.dense_milliseconds / self.milliseconds

    def __str__(self) -> str:
        parts = [f"{self.tokens_processed:.0%} of the tokens"]
        if self.top1 is not None:
            parts.append(f"top-1 {self.top1:.2%}")
        if self.agreement is not None:
            parts.append(f"as dense {self.agreement:.2%}")
        if self.moved is not None:
            parts.append(f"moved {self.moved:.3f}")
        if self.milliseconds is not None:
            parts.append(f"{self.milliseconds:.2f} ms")
        if self.speedup is not None:
            parts.append(f"{self.speedup:.2f}x")
        return f"{self.setting.name}: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as JSON types."""
        values = dataclasses.asdict(self)
        padded = {str(batch): share for batch, share in self.padded_flops_share.items()}
        apart = {"setting": self.setting.to_dict(), "padded_flops_share": padded}
        return {**values, **apart, "speedup": self.speedup}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        """Build a cell from :meth:`to_dict`'s result."""
        rest = {name: value for name, value in values.items() if name != "speedup"}
        # sweeps that were stored before there was such a thing have none
        padded = rest.get("padded_flops_share", {})
        return cls(
            **{
                **rest,
                "setting": Setting.from_dict(values["setting"]),
                "kept": tuple(values["kept"]),
                "classes": tuple(ClassResult(**each) for each in values["classes"]),
                "padded_flops_share": {int(batch): share for batch, share in padded.items()},
            }
        )


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """A whole sweep; the dense model's cell comes first.

    Attributes:
        model: Architecture, source, SHA-256 of the weights, input size, number of classes.
        data: Source, number of images, whether they have labels; "skipped": [file, reason] of each
            file that was not used.
        environment: What ran on what: backend, versions, cores, batch and repetitions of timings;
            "command": what makes the sweep again; "not_measured": sentences, what was left out
            and why. Reports show the other keys as they are.
        cells: In the order in which the settings were asked for.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    cells: tuple[Measurement, ...]

    @property
    def dense(self) -> Measurement:
        return next(cell for cell in self.cells if cell.setting.method == DENSE)

    def __str__(self) -> str:
        return "\n".join(map(str, self.cells))

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as JSON types."""
        return {
            "format": FORMAT,
            "model": self.model,
            "data": self.data,
            "environment": self.environment,
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def save(self, path: Path) -> None:
        """Write the sweep as JSON; it appears whole or not at all."""
        with staged_file(path) as staging:
            write_json(staging, self.to_dict())


def load_sweep(path: Path) -> SweepResult:
    """Read what :meth:`SweepResult.save` wrote.

    Raises:
        SimpruneError: it is missing, damaged, or of a newer format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
        if found == FORMAT:
            return SweepResult(
                values["model"],
                values["data"],
                values["environment"],
                tuple(Measurement.from_dict(each) for each in values["cells"]),
            )
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist: `simprune-deploy sweep` writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} holds no sweep of ours ({error!r}): sweep again") from error
    raise ArtifactError(f"{path} has format {found}, and this version reads {FORMAT}: update")
