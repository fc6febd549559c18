"""Run pictures through a model in many ways of pruning, to be compared: what calibration rests on.

The loss is what pruning does to the dense model's output. The pictures run through the model layer
by layer, each with its own tokens: at a prune layer all of them are there, so the tolerance that
lets as many patches go as are wished *on average* is a quantile, and needs no search.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from simprune_deploy.common.errors import InvalidArgumentError, argument
from simprune_deploy.pruning.attention import (
    Sizes,
    attention_half,
    features_of,
    has_keys,
    has_two_halves,
    mlp_half,
    run_block,
    sizes_of,
)
from simprune_deploy.pruning.calibrated_curve import IDENTITY, Tolerances
from simprune_deploy.pruning.config import Features, PruneConfig
from simprune_deploy.pruning.cost import (
    block_flops,
    flops_share,
    padded_flops_share,
    pairing_flops,
    spread_over_blocks,
)
from simprune_deploy.pruning.model import PrunedViT
from simprune_deploy.pruning.operator import similarity_prune, unit_features

LAYER_COST = 0.004
"""What a prune layer costs of a dense forward's time beside its products: 0.5 ms of the 130 of a
ViT-S/14 at 257 tokens in ONNX Runtime on one CPU thread, of 1.05 in all (2026-11-28)."""

LEAST_IMAGES = 4
"""Fewer show nothing of what images have in common."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """How a model could be pruned: what is compared inside which blocks, and where patches go.

    Attributes:
        features: What is compared.
        weights: One a block: how much of the patches goes there, relative to the others; 0 is no
            prune layer.
    """

    features: Features
    weights: tuple[float, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks inside which patches go."""
        return tuple(block for block, weight in enumerate(self.weights) if weight)


@dataclasses.dataclass(frozen=True)
class OnAverage:
    """A wish: what share of all patches is left behind each prune layer, on average over images.

    Attributes:
        left: One share a layer.
        floor: The share of its patches at which an image's tolerance ends.
    """

    left: Sequence[float]
    floor: float


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of pictures through a pruned model.

    Attributes:
        losses: float64[n], ``1 - cosine`` of the output to the dense model's; of a single output
            the squared difference over the dense outputs' variance.
        flops: float64[n], the share of the dense blocks' FLOPs.
        kept: int64[n, layers], patches behind each prune layer.
        tolerances: With which they ran; None where the counts are fixed.
        padded: The share of the FLOPs that a batch of them takes, by the batch's size.
    """

    losses: np.ndarray
    flops: np.ndarray
    kept: np.ndarray
    tolerances: Tolerances | None
    padded: Callable[[int], float]


class Calibrator:
    """A model and pictures, ready to be run in many ways.

    Args:
        vit: A timm ``VisionTransformer``.
        images: float32[n, C, H, W], normalized.

    Raises:
        SimpruneError: there are too few pictures, or all are alike.
    """

    def __init__(self, vit: torch.nn.Module, images: torch.Tensor) -> None:
        # with a layer, so that its head pools by the sizes; what runs is decided in each run
        self.model = PrunedViT(vit, PruneConfig(layers=(0,))).eval()
        self.vit = self.model.vit
        if len(images) < LEAST_IMAGES:
            raise InvalidArgumentError(
                f"{len(images)} pictures are too few to calibrate on: give {LEAST_IMAGES} or more, "
                "better dozens"
            )
        with torch.inference_mode():
            chunks = [image[None] for image in images]
            self.tokens = [self.model.embed(chunk) for chunk in chunks]
            self.dense = torch.cat([self.vit(chunk) for chunk in chunks]).double()
        if bool((self.dense == self.dense[0]).all()):
            raise InvalidArgumentError(
                f"all {len(images)} pictures give the same output, which shows nothing of what "
                f"pruning loses: give others with {argument('images')}"
            )
        self.shape = self.model.block_shape

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    def usable_blocks(self, features: Features) -> list[int]:
        """Return the blocks inside which these features can be compared."""
        fits = has_two_halves if features == "tokens" else has_keys
        return [index for index, block in enumerate(self.vit.blocks) if fits(block)]

    def cost_of_layers(self, candidate: Candidate, layer_cost: float | None) -> float:
        """Return what the prune layers themselves cost, as a share of the dense model.

        Each `layer_cost`; or where nobody measured it (None) :data:`LAYER_COST`, and its products.
        """
        if layer_cost is None:
            width, total = self.widths[candidate.features], self.model.num_tokens
            products = pairing_flops(total, self.shape.embed_dim, width)
            layer_cost = LAYER_COST + products / (self.depth * block_flops(self.shape, total))
        return len(candidate.layers) * layer_cost

    @property
    def widths(self) -> dict[Features, int]:
        """How many numbers of a patch are compared, by what is compared."""
        width = self.shape.embed_dim
        heads = getattr(getattr(self.vit.blocks[0], "attn", None), "num_heads", 1)
        mean = width // heads
        return {"tokens": width, "keys": width, "mean-keys": mean, "tokens+keys": width + mean}

    def left_at(self, candidate: Candidate, share: float) -> tuple[float, ...]:
        """Return the share of the patches left behind each of the candidate's layers.

        So that the blocks' FLOPs are that share of the dense ones: each layer lets a part of the
        patches that reach it go, in proportion to its weight, and at most half.

        Raises:
            SimpruneError: even half in every layer is not enough.
        """
        weights = [candidate.weights[layer] for layer in candidate.layers]

        def left(scale: float) -> tuple[float, ...]:
            shares = np.cumprod([1 - min(0.5, scale * weight) for weight in weights])
            return tuple(map(float, shares))

        low, high = 0.0, 0.5 / min(weights)
        if (least := self.flops_of(candidate, left(high))) > share:
            raise InvalidArgumentError(
                f"{argument('flops', share)} cannot be reached: {len(weights)} prune layers fold "
                f"half of the patches each, and {least:.0%} of the FLOPs are left"
            )
        for _ in range(40):
            middle = (low + high) / 2
            if self.flops_of(candidate, left(middle)) > share:
                low = middle
            else:
                high = middle
        return left(high)

    def flops_of(self, candidate: Candidate, left: Sequence[float]) -> float:
        """Return the share of FLOPs where shares `left` of the patches pass the layers."""
        patches, prefix = self.model.num_patches, self.model.num_prefix_tokens
        kept = [prefix + each * patches for each in left]
        total = self.model.num_tokens
        spread = spread_over_blocks(total, candidate.layers, kept, self.depth, "inside")
        return flops_share(self.shape, total, spread)

    @torch.inference_mode()
    def run(
        self,
        candidate: Candidate,
        images: Sequence[int],
        by: OnAverage | Tolerances | Sequence[int],
    ) -> Pass:
        """Run pictures, each by itself.

        Args:
            candidate: What is compared where.
            images: Their numbers.
            by: What is left on average, tolerances, or fixed counts of patches for each layer.
        """
        model = self.model
        tokens = [self.tokens[image] for image in images]
        log_sizes = [each.new_zeros(each.shape[:2], dtype=torch.float32) for each in tokens]
        sizes: list[Sizes | None] = [None] * len(images)
        kept: list[list[int]] = []
        found: list[float] = []
        for index, block in enumerate(self.vit.blocks):
            if index not in candidate.layers:
                tokens = [run_block(block, *pair) for pair in zip(tokens, sizes, strict=True)]
                continue
            halves = [attention_half(block, *pair) for pair in zip(tokens, sizes, strict=True)]
            tokens = [each for each, _ in halves]
            features = [features_of(candidate.features, *half) for half in halves]
            rules = self._rules(by, len(kept), tokens, features, found)
            for i, (limit, capacity) in enumerate(rules):
                folded, log_sizes[i], *_ = similarity_prune(
                    tokens[i],
                    features[i],
                    log_sizes[i],
                    torch.tensor([limit]),
                    model.num_prefix_tokens,
                    capacity=capacity,
                )
                sizes[i] = sizes_of(log_sizes[i], folded)
                tokens[i] = mlp_half(block, folded)
            kept.append([each.shape[1] - model.num_prefix_tokens for each in tokens])
        outputs = [
            model.forward_head(self.vit.norm(each), log_size)
            for each, log_size in zip(tokens, log_sizes, strict=True)
        ]
        losses = self._losses(torch.cat(outputs).double(), images)
        return self._pass(candidate, losses, kept, by, found)

    def _rules(
        self,
        by: OnAverage | Tolerances | Sequence[int],
        position: int,
        tokens: Sequence[torch.Tensor],
        features: Sequence[torch.Tensor],
        found: list[float],
    ) -> list[tuple[float, int]]:
        """Return threshold and capacity of a layer for every image; note its tolerance."""
        prefix, patches = self.model.num_prefix_tokens, self.model.num_patches
        if isinstance(by, OnAverage):
            left = [(each.shape[1] - prefix) / patches for each in tokens]
            parts = [Tolerances(by.floor, ()).part(each) for each in left]
            going = sum(left) - by.left[position] * len(left)
            found.append(_quantile(features, parts, prefix, round(going * patches)))
            return [(1 - found[-1] * part, 0) for part in parts]
        if isinstance(by, Tolerances):
            left = [(each.shape[1] - prefix) / patches for each in tokens]
            return [(by.threshold(position, each), 0) for each in left]
        return [(0.0, by[position])] * len(tokens)

    def _pass(
        self,
        candidate: Candidate,
        losses: np.ndarray,
        kept: list[list[int]],
        by: OnAverage | Tolerances | Sequence[int],
        found: list[float],
    ) -> Pass:
        total, prefix, layers = self.model.num_tokens, self.model.num_prefix_tokens, len(kept)
        counts = np.array(kept, np.int64).reshape(layers, len(losses)).T
        spread = [
            spread_over_blocks(total, candidate.layers, row, self.depth, "inside")
            for row in (counts + prefix).tolist()
        ]

        def padded(batch: int) -> float:
            columns = [Counter(column) for column in (counts + prefix).T.tolist()]
            shape, places = self.shape, candidate.layers
            return padded_flops_share(shape, total, places, columns, self.depth, "inside", batch)

        if isinstance(by, OnAverage):
            by = Tolerances(by.floor, tuple(found))
        return Pass(
            losses,
            np.array([flops_share(self.shape, total, each) for each in spread]),
            counts,
            by if isinstance(by, Tolerances) else None,
            padded,
        )

    def _losses(self, outputs: torch.Tensor, images: Sequence[int]) -> np.ndarray:
        dense = self.dense[list(images)]
        if dense.shape[1] == 1:
            off = (outputs - dense).square()[:, 0] / self.dense.var().clamp_min(1e-30)
            return np.asarray(off.numpy())
        return np.asarray(1 - torch.cosine_similarity(outputs, dense, dim=1).numpy())


def _quantile(
    features: Sequence[torch.Tensor], parts: Sequence[float], prefix: int, going: int
) -> float:
    """Return the tolerance at which so many patches of all images together go.

    Args:
        features: Of each image, T[1, N, F].
        parts: What part of the tolerance each image has.
        prefix: Tokens ahead of the patches.
        going: How many.
    """
    needed = []
    for each, part in zip(features, parts, strict=True):
        unit = unit_features(each[:, prefix:].float())[0]
        if len(unit) < 2:
            continue
        best = (unit[0::2] @ unit[1::2].T).amax(1)
        needed.append((1 - best.double().numpy()) / part)
    ranked = np.sort(np.concatenate(needed)) if needed else np.zeros(0)
    going = min(going, len(ranked))
    if going < 1:
        return IDENTITY
    if going == len(ranked):
        return float(ranked[-1] + 1e-6)
    return float((ranked[going - 1] + ranked[going]) / 2)
