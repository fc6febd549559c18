"""Which original patches a token stands for, layer after layer. numpy only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from simprune_deploy.common.errors import ArtifactError, UnsupportedModelError
from simprune_deploy.predict.records import PruneRecord


@dataclasses.dataclass(frozen=True)
class Clusters:
    """What a prune layer leaves of one image, in the M patches of the original grid.

    Attributes:
        layer: The block it runs before or inside.
        member: int64[M], for every patch the patch that heads its cluster: the kept one.
        place: "before" or "inside".
    """

    layer: int
    member: np.ndarray
    place: str = "before"

    @property
    def where(self) -> str:
        """ "before block 3", or inside it."""
        return f"{self.place} block {self.layer}"

    @property
    def heads(self) -> np.ndarray:
        """int64[K], the kept patches, ascending."""
        return np.unique(self.member)

    @property
    def sizes(self) -> np.ndarray:
        """int64[K], the patches of each cluster, in the order of :attr:`heads`."""
        counts: np.ndarray = np.unique(self.member, return_counts=True)[1]
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the clusters as JSON types."""
        return {
            "layer": self.layer,
            "kept": len(self.heads),
            "heads": self.heads.tolist(),
            "sizes": self.sizes.tolist(),
            "member": self.member.tolist(),
        }


def compose(
    records: Mapping[int, PruneRecord], prefix: int, patches: int, place: str = "before"
) -> list[Clusters]:
    """Follow every original patch through the prune layers of one image.

    Args:
        records: What each prune layer decided, by its block. Each layer reads the tokens that the
            one before it kept.
        prefix: Number of prefix tokens, which are never pruned.
        patches: M, of the image.
        place: Whether the layers are "before" their blocks (the default) or "inside" them.

    Raises:
        SimpruneError: the records do not fit together.
    """
    slot = np.arange(patches) + prefix  # where each patch's token stands in the next layer's input
    origin = np.arange(patches + prefix) - prefix  # the patch that heads each of these tokens
    found = []
    for layer, record in sorted(records.items()):
        assignment, kept = np.asarray(record.assignment), np.asarray(record.kept_index)
        if len(assignment) < len(origin):
            raise ArtifactError(f"the layer {place} block {layer} did not read what came to it")
        slot = assignment[slot]
        slots = int(assignment.max()) + 1 if len(assignment) else 0
        if slot.min() < prefix or (kept[:slots] >= len(origin)).any():
            raise ArtifactError(f"the layer {place} block {layer} assigned a patch to nothing")
        origin = origin[kept[:slots]]
        found.append(Clusters(layer, origin[slot], place))
    return found


def check_sizes(records: Mapping[int, PruneRecord], clusters: list[Clusters], prefix: int) -> None:
    """Hold the clusters to what the model itself counts: the next layer's log-sizes.

    Raises:
        SimpruneError: they differ.
    """
    ordered = sorted(records.items())
    for (_, following), found in zip(ordered[1:], clusters, strict=False):
        heads = found.heads
        # slots hold the kept tokens in ascending order, which is that of their patches
        counted = np.exp(np.asarray(following.log_size, np.float64)[prefix : prefix + len(heads)])
        if np.abs(counted - found.sizes).max(initial=0.0) > 0.01 * found.sizes.max(initial=1):
            raise ArtifactError(f"the clusters {found.where} are not those of the model")


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the patches of an image of height x width pixels.

    Raises:
        SimpruneError: they form no grid.
    """
    rows = round(math.sqrt(patches * height / width))
    if rows < 1 or patches % rows:
        raise UnsupportedModelError(f"{patches} patches of {height} x {width} pixels form no grid")
    return rows, patches // rows
