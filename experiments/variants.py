"""A variant of the operator that is not in the product: similarity lowered with distance.

The paper asks for patches that stay spread over the image. Here two patches' similarity becomes
``(1 - weight) * cosine + weight * exp(-distance^2 / (2 reach^2))``, distances on the patch grid:
patches far apart must be more alike to be merged. That is again a cosine, of features with the
place written into them, so the operator itself takes the decisions.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.model import PrunedViT
from simprune_deploy.pruning.operator import similarity_prune


def place_features(rows: int, columns: int, reach: float) -> torch.Tensor:
    """Return float32[M, M]: one unit vector for every patch of the grid.

    Two of them have the dot product ``exp(-distance^2 / (2 reach^2))``, `reach` in patches.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], 1).double()
    kernel = torch.exp(-torch.cdist(places, places).square() / (2 * reach**2))
    values, vectors = torch.linalg.eigh(kernel)
    return (vectors * values.clamp_min(0).sqrt()).float()


class SpreadViT(PrunedViT):
    """A pruned model with the variant's similarity, for one batch at a time.

    Args:
        vit: The model to prune.
        config: As of :class:`PrunedViT`; the threshold is that of the mixed similarity.
        weight: Of the place, in [0, 1); 0 is the operator itself.
        reach: In patches: at this distance the place's part has fallen to 0.61.
    """

    def __init__(self, vit: torch.nn.Module, config: PruneConfig, weight: float, reach: float):
        super().__init__(vit, config)
        self.weight = weight
        self.places = place_features(*self.vit.patch_embed.grid_size, reach)
        self.now: torch.Tensor | None = None

    def forward_features(self, *args: Any, **values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.now = None
        return super().forward_features(*args, **values)

    def _operator(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        threshold: torch.Tensor,
        **values: Any,
    ) -> tuple[torch.Tensor, ...]:
        prefix = values["num_prefix_tokens"]
        if self.now is None:  # the place of every patch: the first prune layer sees them all
            self.now = torch.arange(len(self.places)).expand(len(tokens), -1)
        content = torch.nn.functional.normalize(features.float(), dim=2)
        place = torch.zeros(*tokens.shape[:2], self.places.shape[1])
        place[:, prefix:] = self.places[self.now]
        mixed = [math.sqrt(1 - self.weight) * content, math.sqrt(self.weight) * place]
        compared = torch.cat(mixed, 2).to(tokens.dtype)
        found = similarity_prune(tokens, compared, log_size, threshold, **values)
        self.now = self.now.gather(1, (found[2][:, prefix:] - prefix).clamp_min(0))
        return found
