"""The models that are timed, whatever runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from simprune_deploy.evaluate.timing import Runner

DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model that is timed.

    Attributes:
        name: "dense", "pruned", "pruned at 0.9".
        run: Runs batch i.
        memory: What it takes, by name, in bytes.
        threshold: None for the dense model.
    """

    name: str
    run: Runner
    memory: dict[str, int]
    threshold: float | None = None


@dataclasses.dataclass(frozen=True)
class Subjects:
    """All that is timed in one run, and what runs it.

    Attributes:
        models: The dense model first.
        environment: What runs them: versions and settings.
        trtexec: The lines that time the same with NVIDIA's own program.
    """

    models: list[Subject]
    environment: dict[str, Any]
    trtexec: tuple[str, ...] = ()


def name_of(threshold: float, thresholds: Sequence[float]) -> str:
    """Return what the pruned model is called at one of the thresholds that are timed."""
    return "pruned" if len(thresholds) == 1 else f"pruned at {threshold}"
