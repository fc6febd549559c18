"""``models`` and ``targets`` as functions: what can be pruned, and where it can run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from simprune_deploy.common.errors import InvalidArgumentError
from simprune_deploy.common.progress import Progress, silent

if TYPE_CHECKING:
    from simprune_deploy.engine.targets import Targets
    from simprune_deploy.pruning.families import PrunableModel


@dataclasses.dataclass(frozen=True)
class ModelList:
    """timm's architectures.

    Attributes:
        prunable: Those that can be pruned, with their token counts.
        refused: (name, reason) of those that cannot.
    """

    prunable: tuple[PrunableModel, ...]
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        refused = [f"{name} cannot be pruned: {reason}" for name, reason in self.refused]
        return "\n".join([*(each.name for each in self.prunable), *refused])

    def to_dict(self) -> dict[str, Any]:
        """Return the list as JSON types."""
        return {
            "prunable": [dataclasses.asdict(row) for row in self.prunable],
            "refused": dict(self.refused),
        }


def models(pattern: str = "*", *, progress: Progress = silent) -> ModelList:
    """Return the timm architectures that can be pruned.

    Args:
        pattern: timm's names, such as "vit_small*". Default: all.
        progress: Called with a word on each step.

    Raises:
        InvalidArgumentError: no name matches.
    """
    from simprune_deploy.pruning.families import describe_models, list_names

    prunable, refused = list_names(pattern)
    if not prunable and not refused:
        raise InvalidArgumentError(f"no timm architecture matches {pattern!r}: try 'vit_*'")
    progress("building the architectures without weights")
    return ModelList(tuple(describe_models(prunable)), tuple(refused))


def targets() -> Targets:
    """Return the edge GPUs: what each carries, and where its engine can be built."""
    from simprune_deploy.engine.targets import load_targets

    return load_targets()
