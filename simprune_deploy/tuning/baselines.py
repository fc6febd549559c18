"""Other ways to lose tokens, at the prune points of a pruned model and at given token counts.

What our operator is compared with, written from the papers:

* "random": patches are dropped at random (seeded).
* "redundancy": the patches most like the mean of the others are dropped, as the paper this project
  follows lists it: "Efficient Patch Pruning for Vision Transformers via Patch Similarity",
  preprints.org 202504.0596.
* "saint": "Similarity-Aware Token Pruning: Your VLM but Faster", arXiv 2503.11549. The patches are
  split into two sets, alternately. A patch of the first set with ``n`` neighbours in the second,
  of mean similarity ``m`` (a neighbour is at least ``theta`` alike), has the score
  ``n exp(gamma (m - theta))``; without neighbours, its mean similarity to that set. The highest
  scores are dropped. The authors' settings: theta 0.75, gamma 10.
* "tome": "Token Merging: Your ViT But Faster", arXiv 2210.09461. Of two such sets every patch
  of the first is paired with the most similar of the second; the r most similar pairs are merged,
  weighted by size, and attention is proportional to size.

What is not the papers': how many patches stay is given, for every image and layer, so that all
methods run on the same token counts (SAINT chooses its own; ToMe takes one r for all images). The
two bipartite schemes can lose half of the patches at once; where more must go they run again on
what is left. Patches are lost where ours are, before a block or inside it, between its attention
and its MLP, as the papers have it. The tokens themselves are compared; the papers compare keys
averaged over heads, which the features "keys" do (of the block, or of the one that follows). Slots
stay in the order of the image. Dropped patches leave nothing behind, so sizes stay 1.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block

from simprune_deploy.common.errors import InvalidArgumentError, UnsupportedModelError
from simprune_deploy.onnx.metadata import ModelMetadata
from simprune_deploy.predict.predictor import BatchAnswer, Predictor
from simprune_deploy.predict.records import Array
from simprune_deploy.predict.torch_predictor import TorchPredictor, trace_arrays
from simprune_deploy.pruning.config import PAD_LOG_SIZE
from simprune_deploy.pruning.families import architecture_name
from simprune_deploy.pruning.model import PrunedViT, PruneTrace
from simprune_deploy.pruning.operator import (
    full_precision,
    reduce_tokens,
    redundancy,
    similarities,
    unit_features,
)
from simprune_deploy.tuning.results import BASELINES

SAINT_THETA = 0.75
SAINT_GAMMA = 10.0

FEATURES = ("tokens", "keys")


@dataclasses.dataclass(frozen=True)
class BaselineRun:
    """What a baseline made of a batch of B images.

    Attributes:
        outputs: As the model's, [B, num_classes] or [B, D].
        kept: int64[B, L], the patches that stayed of every image after every prune layer: what
            was asked for.
        traces: One for each prune layer. A dropped patch is assigned to -1, as padding is.
    """

    outputs: torch.Tensor
    kept: torch.Tensor
    traces: list[PruneTrace]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way to lose tokens; see this module's text.

    Args:
        name: "random", "redundancy", "saint" or "tome".
        seed: Of "random". Draws depend on it, the image's pixels and the layer: never on the batch.
        features: What "saint" and "tome" compare: "tokens" (as our operator does; the default) or
            "keys" (as the papers do). docs/method.md has both: "tokens" is the stronger here.

    Raises:
        SimpruneError: the name is unknown.
    """

    name: str
    seed: int = 0
    features: str = "tokens"

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise InvalidArgumentError(
                f"baseline {self.name!r} is unknown: use one of {', '.join(BASELINES)}"
            )
        if self.features not in FEATURES:
            raise InvalidArgumentError(
                f"features {self.features!r} are unknown: use one of {', '.join(FEATURES)}"
            )

    def run(
        self, model: PrunedViT, images: torch.Tensor, kept: torch.Tensor | Sequence[int]
    ) -> BaselineRun:
        """Run images through `model` with this rule in our operator's place.

        Args:
            model: Gives the weights and the prune layers; nothing else of its configuration counts.
            images: float[B, C, H, W], normalized as the model wants it.
            kept: Patches to keep: int64[B, L] for every image and prune layer, as
                :func:`kept_counts` reads it from a run of ours, or L numbers for all images.

        Raises:
            SimpruneError: the counts cannot be met.
            UnsupportedModelError: the blocks have no keys to compare.
        """
        counts = torch.as_tensor(kept, device=images.device)
        if counts.ndim == 1:
            counts = counts.expand(len(images), -1)
        _check_counts(counts, model, len(images))
        reduced = _ReducedViT(model, self, counts, images)
        traces: list[PruneTrace] = []
        outputs = reduced(images, traces=traces)
        return BaselineRun(outputs, counts, traces)


class BaselinePredictor(TorchPredictor):
    """A baseline at the token counts that our operator keeps of each image.

    Args:
        model: Pruned as ours is, whose counts are taken.
        metadata: As in :class:`TorchPredictor`.
        baseline: The rule in our operator's place.
    """

    def __init__(self, model: PrunedViT, metadata: ModelMetadata, baseline: Baseline) -> None:
        super().__init__(model, metadata)
        self.baseline = baseline

    def _run_batch(
        self, images: Array, limits: Array | None, counts: bool, decisions: bool
    ) -> BatchAnswer:
        at = b"" if limits is None else limits.tobytes()
        key = (id(self.model.vit), str(self.model.config), zlib.crc32(images.tobytes() + at))
        if key not in _COUNTS:
            _COUNTS[key] = super()._run_batch(images, limits, True, False).kept
            if len(_COUNTS) > MOST_COUNTS:
                _COUNTS.popitem(last=False)
        with torch.inference_mode():
            kept = torch.from_numpy(_COUNTS[key])
            run = self.baseline.run(self.model, torch.from_numpy(images), kept)
        traces = {trace.layer: trace_arrays(trace) for trace in run.traces} if decisions else None
        return BatchAnswer(run.outputs.numpy(), run.kept.numpy(), traces)


_COUNTS: collections.OrderedDict[tuple[int, str, int], Any] = collections.OrderedDict()
"""What ours kept of the batches of last: several baselines take the counts of one run."""

MOST_COUNTS = 16


@dataclasses.dataclass(frozen=True)
class BaselineSpec:
    """A baseline, as it travels to the process that runs it."""

    model: Any
    metadata: ModelMetadata
    baseline: Baseline
    identity: str

    @property
    def key(self) -> str:
        return f"{self.identity} {self.model.config} {self.baseline}"

    def open(self) -> Predictor:
        return BaselinePredictor(self.model, self.metadata, self.baseline)


def kept_counts(traces: Sequence[PruneTrace], num_prefix_tokens: int) -> torch.Tensor:
    """Return int64[B, L], the patches that every image kept at every prune layer."""
    counts = [trace.assignment.amax(1) + 1 - num_prefix_tokens for trace in traces]
    return torch.stack(counts, 1)


def _check_counts(counts: torch.Tensor, model: PrunedViT, batch: int) -> None:
    shape = (batch, len(model.config.layers))
    if tuple(counts.shape) != shape or counts.is_floating_point():
        raise InvalidArgumentError(
            f"kept counts of shape {list(counts.shape)} ({counts.dtype}): give whole numbers "
            f"[{shape[0]}, {shape[1]}], one for every image and prune layer"
        )
    before = torch.full_like(counts[:, :1], model.num_patches)
    steps = torch.cat([before, counts], 1)
    wrong = (counts < 1) | (steps.diff(dim=1) > 0)
    if wrong.any():
        image, layer = (int(i) for i in wrong.nonzero()[0])
        place, block = model.config.place, model.config.layers[layer]
        raise InvalidArgumentError(
            f"image {image} cannot keep {int(counts[image, layer])} patches {place} block {block}: "
            f"between 1 and {int(steps[image, layer])} reach it"
        )


class _ReducedViT(PrunedViT):
    """The model with a baseline in the operator's place, for one batch of images."""

    def __init__(
        self, model: PrunedViT, baseline: Baseline, counts: torch.Tensor, images: torch.Tensor
    ) -> None:
        by_keys = baseline.features == "keys" and baseline.name in ("saint", "tome")
        self.with_keys = by_keys and model.config.place == "inside"
        config = dataclasses.replace(
            model.config,
            proportional_attention=True,
            capacities=(),
            features="mean-keys" if self.with_keys else "tokens",
        )
        super().__init__(model.vit, config)
        self.baseline, self.counts = baseline, counts
        pixels = (image.detach().cpu().contiguous().numpy() for image in images)
        self.image_ids = [zlib.crc32(image) for image in pixels]

    def _prune(
        self,
        index: int,
        tokens: torch.Tensor,
        features: torch.Tensor,
        log_size: torch.Tensor,
        limits: Sequence[torch.Tensor],
        traces: list[PruneTrace] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.counts[:, self.config.layers.index(index)]
        prefix, width = self.num_prefix_tokens, tokens.shape[2]
        compared: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float
        carried = tokens
        if self.with_keys:  # they travel with their tokens, and are merged as these are
            carried = torch.cat([tokens, features], 2)
            compared = lambda patches: patches[:, :, width:].float()  # noqa: E731
        elif self.baseline.features == "keys":
            compared = self._keys(index)
        seeds = [(self.baseline.seed, image, index) for image in self.image_ids]
        rule = make_rule(self.baseline.name, prefix, compared, seeds)
        reduced = lose_tokens(carried, log_size, kept, prefix, rule)
        if traces is not None:
            traces.append(PruneTrace(index, features, log_size, *reduced[2:]))
        return reduced[0][:, :, :width], reduced[1]

    def _keys(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The keys that a block's attention makes of patches [B, M, D], averaged over heads."""
        block = self.vit.blocks[index]
        attention = getattr(block, "attn", None)
        if not isinstance(block, Block) or not isinstance(attention, Attention):
            raise UnsupportedModelError(
                f"the blocks of {architecture_name(self.vit)} ({type(block).__name__}) have no "
                "keys to compare: use the features 'tokens'"
            )

        def keys(patches: torch.Tensor) -> torch.Tensor:
            made = attention.qkv(block.norm1(patches))
            heads = made.unflatten(2, (3, attention.num_heads, attention.head_dim))
            return cast(torch.Tensor, attention.k_norm(heads[:, :, 1]).mean(2).float())

        return keys


Rule = Callable[[torch.Tensor, torch.Tensor], "tuple[torch.Tensor, torch.Tensor | None]"]
"""Patches T[B, M, D] and valid bool[B, M] -> scores float[B, M], of which the highest are lost
(-inf: not this time), and the patch int64[B, M] that each would be merged into (None: dropped)."""


def make_rule(
    name: str,
    prefix: int,
    features: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
    seeds: Sequence[tuple[int, ...]] = (),
) -> Rule:
    """Return the rule of a baseline.

    Args:
        name: "random", "redundancy", "saint" or "tome".
        prefix: Tokens before the patches.
        features: What "saint" and "tome" compare: T[B, M, D] -> float32[B, M, E]. Default: the
            patches themselves.
        seeds: Of "random", one for every image.
    """
    if name == "random":
        return lambda patches, valid: (random_scores(valid, seeds), None)
    if name == "redundancy":
        return lambda patches, valid: (redundancy(unit_features(patches.float()), valid), None)
    if name == "saint":
        return lambda patches, valid: (saint_scores(features(patches), valid), None)
    return lambda patches, valid: tome_pairs(features(patches), valid, prefix)


def lose_tokens(
    tokens: torch.Tensor, log_size: torch.Tensor, kept: torch.Tensor, prefix: int, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lose patches by a rule, in rounds, until every image has its count.

    Args:
        tokens: T[B, N, D], padded at the end.
        log_size: float32[B, N], PAD in padding slots.
        kept: int64[B], the patches that stay of each image.
        prefix: Class, distillation and register tokens, which always stay.
        rule: Which patches go first.

    Returns:
        As the operator: kept_tokens, kept_log_size, kept_index and assignment (-1 for what was
        dropped too), slots in the order of the image, then padding.
    """
    batch, num_tokens, _ = tokens.shape
    positions = torch.arange(num_tokens, device=tokens.device).expand(batch, -1)
    is_valid = log_size > PAD_LOG_SIZE / 2
    index, assignment = torch.where(is_valid, positions, 0), torch.where(is_valid, positions, -1)
    while True:
        valid = log_size[:, prefix:] > PAD_LOG_SIZE / 2
        excess = valid.sum(1) - kept
        if bool((excess <= 0).all()):
            filled = prefix + int(valid.sum(1).max())
            return tokens[:, :filled], log_size[:, :filled], index[:, :filled], assignment
        with full_precision(tokens.device):
            scores, targets = rule(tokens[:, prefix:], valid)
        scores = scores.masked_fill(~valid, -torch.inf)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        goes = (rank < excess[:, None]) & (scores > -torch.inf)
        if not goes.any():
            raise ValueError("no patch can go: padding must follow the patches, not lie among them")
        kept_index, slots = _slots(valid, goes, targets, prefix)
        reduction = "drop" if targets is None else "merge"
        tokens, log_size = reduce_tokens(tokens, log_size, kept_index, slots, reduction, prefix)
        index = torch.where(log_size > PAD_LOG_SIZE / 2, index.gather(1, kept_index), 0)
        went = slots.gather(1, assignment.clamp_min(0))
        assignment = torch.where(assignment < 0, -1, went)


def _slots(
    valid: torch.Tensor, goes: torch.Tensor, targets: torch.Tensor | None, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return kept_index int64[B, K] and assignment int64[B, N] of one round."""
    stays = valid & ~goes
    ahead = torch.arange(prefix, device=valid.device).expand(len(valid), -1)
    order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(stays.sum(1).max())]
    filled = stays.gather(1, order)
    kept_index = torch.cat([ahead, torch.where(filled, order + prefix, 0)], 1)
    slot = torch.where(stays, stays.cumsum(1) - 1 + prefix, -1)
    if targets is not None:
        slot = torch.where(goes, slot.gather(1, targets), slot)
    return kept_index, torch.cat([ahead, slot], 1)


def random_scores(valid: torch.Tensor, seeds: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return float64[B, M]: an image's scores depend on its seed, not on the padding behind it."""
    draws = [np.random.default_rng(seed).random(valid.shape[1]) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).to(valid.device)


def tome_pairs(
    features: torch.Tensor, valid: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe's pairs: the similarity of each patch to the most similar one of the other set.

    Args:
        features: float32[B, M, D] of the patches.
        valid: bool[B, M], false for padding.
        prefix: Tokens before the patches; they count for who is in which set.

    Returns:
        float32[B, M], -inf for the second set; int64[B, M], the partner (lowest index on a tie).
    """
    similarity = _between_sets(features, valid, prefix)
    partner = similarity.argmax(2)
    return similarity.gather(2, partner.unsqueeze(2)).squeeze(2), partner


def saint_scores(
    features: torch.Tensor,
    valid: torch.Tensor,
    theta: float = SAINT_THETA,
    gamma: float = SAINT_GAMMA,
) -> torch.Tensor:
    """SAINT's scores float32[B, M] of the first set's patches, -inf for the second's.

    As ToMe's pairs, but who is in which set is counted from the first patch.
    """
    similarity = _between_sets(features, valid)
    edges = similarity > -torch.inf
    near = similarity >= theta
    neighbours = near.sum(2)
    mean = similarity.masked_fill(~near, 0).sum(2) / neighbours.clamp_min(1)
    alone = similarity.masked_fill(~edges, 0).sum(2) / edges.sum(2).clamp_min(1)
    scores = torch.where(neighbours > 0, neighbours * (gamma * (mean - theta)).exp(), alone)
    return scores.masked_fill(~edges.any(2), -torch.inf)


def _between_sets(features: torch.Tensor, valid: torch.Tensor, ahead: int = 0) -> torch.Tensor:
    """Similarities float32[B, M, M] of the first set's patches to the second's, elsewhere -inf.

    The sets take turns over the sequence, `ahead` tokens before the patches included.
    """
    first = (torch.arange(valid.shape[1], device=valid.device) + ahead) % 2 == 0
    pairs = (first & valid)[:, :, None] & (~first & valid)[:, None, :]
    return similarities(features).masked_fill(~pairs, -torch.inf)
