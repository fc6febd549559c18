"""The methods ours is compared with, as published: timm models whose patches get fewer inside.

Each is written from its paper; public code was read where the paper leaves something open, and none
of it is here. A model takes one image at a time, as a device does and as the timed files do: what a
method decides for a batch it decides for a batch of one. All of them reduce inside a block, between
attention and MLP, and all but ATM compare its keys averaged over the heads.

* :class:`ToMe`: "Token Merging: Your ViT But Faster", Bolya et al., ICLR 2023, arXiv 2210.09461,
  section 3 and appendix D; code: facebookresearch/ToMe.
* :class:`PiToMe`: "Accelerating Transformers with Spectrum-Preserving Token Merging", Tran et al.,
  NeurIPS 2024, arXiv 2405.16148, section 3.2; code: hchautran/PiToMe.
* :class:`ATC`: "Agglomerative Token Clustering", Haurum et al., ECCV 2024, arXiv 2409.11923,
  section 3; code: JoakimHaurum/ATC. It cannot be exported: a file has no clustering in it.
* :class:`ATM`: "Lossless Token Merging Even Without Fine-Tuning in Vision Transformers", Lee and
  Choi, ECAI 2025, arXiv 2505.15160. The paper itself could not be had here, only its abstract and a
  review that gives its formulas; what neither says is chosen to suit it, as the class says.
* :class:`Saint`: "Similarity-Aware Token Pruning: Your VLM but Faster", Jeddi et al., arXiv
  2503.11549; the authors' code was read for the rate, which the image decides.
* :class:`RandomDrop`: patches dropped at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional

from simprune_deploy.common.errors import InvalidArgumentError, UnsupportedModelError
from simprune_deploy.pruning.attention import Sizes, attention_half, has_keys, mlp_half
from simprune_deploy.pruning.config import PruneConfig
from simprune_deploy.pruning.model import PrunedViT

Reduced = tuple[torch.Tensor, torch.Tensor | None]
"""Tokens [1, K, D], and their sizes float32[1, K, 1]: None while every token stands for itself."""


class Rival(nn.Module):
    """A model that reduces its patches inside its blocks; this one reduces nothing.

    Args:
        vit: A timm model with plain blocks and a class token or none. It is used, not copied.

    Raises:
        UnsupportedModelError: it has other prefix tokens, or another attention.
    """

    counts_depend_on_image = False
    exports = True

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.whole = PrunedViT(vit, PruneConfig(layers=(0,)))  # for its pooling by sizes
        self.vit = cast(VisionTransformer, vit)
        self.prefix = int(self.vit.num_prefix_tokens)
        if self.prefix > 1 or not all(map(has_keys, self.vit.blocks)):
            raise UnsupportedModelError(
                f"the model has {self.prefix} prefix tokens or attention without plain keys: the "
                "rivals are written for one class token or none, in timm's plain blocks"
            )

    def settings(self) -> dict[str, Any]:
        """Return what makes the same model again of the same `vit`, as JSON types."""
        return {}

    @property
    def depth(self) -> int:
        return len(self.vit.blocks)

    def forward(self, images: torch.Tensor, counts: list[int] | None = None) -> torch.Tensor:
        """Return the output [1, num_classes], or features [1, D].

        Args:
            images: float32[1, C, H, W], normalized.
            counts: A list that receives the tokens that every block hands on.
        """
        vit = self.vit
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        size: torch.Tensor | None = None
        for index, block in enumerate(vit.blocks):
            sizes = None if size is None else Sizes(size.log().transpose(1, 2)[:, None])
            tokens, keys = attention_half(block, tokens, sizes)
            assert keys is not None  # the blocks were checked
            tokens, size = self.reduce(index, tokens, size, keys.mean(1)[0])
            tokens = mlp_half(block, tokens)
            if counts is not None:
                counts.append(tokens.shape[1])
        log_size = torch.zeros(tokens.shape[:2]) if size is None else size[..., 0].log()
        return self.whole.forward_head(vit.norm(tokens), log_size)

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        """Reduce the tokens of one block.

        Args:
            index: The block, from 0.
            tokens: float32[1, N, D].
            size: float32[1, N, 1], or None.
            metric: float32[N, d], the keys' mean over the heads.
        """
        return tokens, size


class ToMe(Rival):
    """Bipartite soft matching: r pairs are merged in every block.

    Tokens take turns between two sets, the class token in the first, from which it never goes. Of
    the first set each token has its most similar one (cosine) in the second; the r most similar
    pairs are merged, weighted by size. What stays of the first set, then the second, is the new
    order. Attention gets the logarithm of the sizes.

    The sums are ScatterND with addition, and the two ends of the ranking two TopK: in ONNX Runtime
    that was the fastest of scatter, ScatterND and a one-hot product, with one or two TopK (257 and
    1370 tokens, one thread); the partner is looked for only for the r that go.

    Args:
        vit: As of :class:`Rival`.
        removed: r of every block; at most half of what there is goes, as in the authors' code.
    """

    def __init__(self, vit: nn.Module, removed: Sequence[int]) -> None:
        super().__init__(vit)
        self.removed = _for_blocks(removed, self.depth, "removed")

    def settings(self) -> dict[str, Any]:
        return {"removed": self.removed}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        removed = min(self.removed[index], (tokens.shape[1] - self.prefix) // 2)
        if removed <= 0:
            return tokens, size
        unit = _unit(metric)
        similarity = unit[2 * self.prefix :: 2] @ unit[1::2].T
        goes, stays, target = _most_similar_pairs(similarity, removed, ranked=not self.prefix)
        if self.prefix:  # the authors sort then, so that the class token stays at the head
            stays = stays.sort().values
        size = torch.ones_like(tokens[..., :1]) if size is None else size
        sets = [(each[:, 2 * self.prefix :: 2], each[:, 1::2]) for each in (tokens, size)]
        head = (tokens[:, : self.prefix], size[:, : self.prefix])
        return _merged(head, sets, goes, stays, target)


def tome_schedule(removed: float, depth: int, decreasing: bool = False) -> list[int]:
    """Return r of every block: the same, or falling from 2r to 0 (appendix D, "decreasing")."""
    if not decreasing:
        return [round(removed)] * depth
    return [round(2 * removed * (1 - index / (depth - 1))) for index in range(depth)]


class PiToMe(Rival):
    """Of the patches, those in the largest clusters are merged, at the same rate in every block.

    A patch's energy is the mean over all patches of f(cosine - margin), f(x) = x above 0 and
    exp(x) - 1 below (alpha = 1), with the margin 0.9 - 0.9 l / L of block l of L (section 3.2). Of
    k patches to lose, the 2k of highest energy take turns, in the order of their energies, between
    two sets, and each of the first is merged into its most similar one in the second.

    Args:
        vit: As of :class:`Rival`.
        ratio: Of the patches that a block keeps, in [0.5, 1].
        matching_blocks: So many blocks at the start rank pairs among all patches, which take turns
            in the order of their energies. 0 is the paper's algorithm; the authors' code for ViTs
            does half of the blocks so.
    """

    def __init__(self, vit: nn.Module, ratio: float, matching_blocks: int = 0) -> None:
        super().__init__(vit)
        if not 0.5 <= ratio <= 1:
            raise InvalidArgumentError(f"ratio {ratio} is outside [0.5, 1]: a block keeps half")
        self.ratio, self.matching_blocks = ratio, matching_blocks

    def settings(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "matching_blocks": self.matching_blocks}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        prefix, patches = self.prefix, tokens.shape[1] - self.prefix
        removed = min(math.floor(patches - patches * self.ratio), patches // 2)
        if removed <= 0:
            return tokens, size
        unit = _unit(metric[prefix:])
        margin = 0.9 - 0.9 * index / self.depth
        energy = functional.elu(unit @ unit.T - margin).mean(1)
        order = energy.argsort(descending=True)
        matched = index < self.matching_blocks
        merged = order if matched else order[: 2 * removed]
        first, second = merged[::2], merged[1::2]
        similarity = unit.index_select(0, first) @ unit.index_select(0, second).T
        size = torch.ones_like(tokens[..., :1]) if size is None else size
        both = (tokens, size)
        sets = [
            (each.index_select(1, first + prefix), each.index_select(1, second + prefix))
            for each in both
        ]
        if matched:
            ahead = (tokens[:, :prefix], size[:, :prefix])
            return _merged(ahead, sets, *_most_similar_pairs(similarity, removed))
        kept = order[2 * removed :] + prefix
        head = [torch.cat([e[:, :prefix], e.index_select(1, kept)], 1) for e in both]
        goes = torch.arange(removed)
        return _merged(head, sets, goes, goes[:0], similarity.argmax(1))


class ATC(Rival):
    """Agglomerative clustering of the patches, by the cosine distance of their keys.

    The two closest clusters become one until so many are left; a cluster becomes the average of
    its members by their sizes. Attention gets the logarithm of the sizes. It depends on no order.

    Args:
        vit: As of :class:`Rival`.
        kept: Patches that every block hands on, at most.
        linkage: The distance of two clusters: "average", "complete" or "single" over their pairs.
    """

    exports = False

    def __init__(self, vit: nn.Module, kept: Sequence[int], linkage: str = "average") -> None:
        super().__init__(vit)
        if linkage not in LINKAGES:
            raise InvalidArgumentError(
                f"linkage {linkage!r} is unknown: use one of {', '.join(LINKAGES)}"
            )
        self.kept, self.linkage = _for_blocks(kept, self.depth, "kept"), linkage

    def settings(self) -> dict[str, Any]:
        return {"kept": self.kept, "linkage": self.linkage}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        prefix, kept = self.prefix, self.kept[index]
        if tokens.shape[1] - prefix <= kept:
            return tokens, size
        unit = _unit(metric[prefix:])
        labels = clusters((1 - unit @ unit.T).double().numpy(), kept, self.linkage)
        size = torch.ones_like(tokens[..., :1]) if size is None else size
        slots = torch.cat([torch.arange(prefix), torch.from_numpy(labels) + prefix])
        total = size.new_zeros(1, prefix + kept, 1).index_add(1, slots, size)
        sums = tokens.new_zeros(1, prefix + kept, tokens.shape[2])
        return sums.index_add(1, slots, tokens * size) / total, total


LINKAGES = ("average", "complete", "single")


def atc_stages(rate: float, patches: int, depth: int) -> list[int]:
    """Return what every block keeps where three reduce: those at the quarters of the depth.

    The paper's setting for trained models: blocks 3, 6 and 9 of 12, each keeps `rate` of its
    patches.
    """
    stages = [depth * quarter // 4 for quarter in (1, 2, 3)]
    return [
        max(1, int(patches * rate ** sum(stage <= index for stage in stages)))
        for index in range(depth)
    ]


def clusters(distance: np.ndarray, count: int, linkage: str) -> np.ndarray:
    """Cluster points bottom up, by the recurrence of Lance and Williams.

    Args:
        distance: float64[M, M], symmetric. It is changed.
        count: Of the clusters, 1 to M.
        linkage: "average", "complete" or "single".

    Returns:
        int64[M], the cluster of every point, numbered by their first points.
    """
    points = len(distance)
    np.fill_diagonal(distance, np.inf)
    members, owner = np.ones(points), np.arange(points)
    nearest, near = distance.argmin(1), distance.min(1)
    for _ in range(points - count):
        one = int(near.argmin())
        one, two = sorted((one, int(nearest[one])))
        if linkage == "average":
            weights = members[[one, two]] / members[[one, two]].sum()
            joined = weights @ distance[[one, two]]
        else:
            joined = (np.maximum if linkage == "complete" else np.minimum)(*distance[[one, two]])
        joined[[one, two]] = np.inf
        members[one] += members[two]
        owner[owner == two] = one
        distance[one], distance[:, one] = joined, joined
        distance[two], distance[:, two] = np.inf, np.inf
        near[two] = np.inf
        # rows whose nearest one is gone or changed look again; others may have a nearer one now
        again = np.flatnonzero(np.isin(nearest, (one, two)) & np.isfinite(near))
        for row in {*again.tolist(), one}:
            nearest[row] = distance[row].argmin()
            near[row] = distance[row, nearest[row]]
        closer = distance[:, one] < near
        nearest[closer], near[closer] = one, distance[closer, one]
    return np.unique(owner, return_inverse=True)[1].reshape(-1)


TIES = 4096
"""More than there are patches, and its square is float32's largest exact whole number."""


class ATM(Rival):
    """Pairs as ToMe's, merged where they are at least as similar as the block's threshold.

    The thresholds fall with the depth, so early blocks merge only what is most alike. Behind block
    `split` the two sets are the smaller and the larger half of the patches by size, so that no two
    large ones are merged. Of an image as many pairs go as reach the threshold: the paper counts
    for a whole batch, and this is a batch of one.

    Chosen here: the smaller ones go into the larger; ToMe's order and sizes in attention. What is
    compared, the thresholds and `split` are searched for on other pictures. By its keys, which the
    methods before it compare, a DINOv2 loses several times as much as by tokens: the keys of some
    blocks are all alike, and thresholds that only fall cannot suit that.

    Args:
        vit: As of :class:`Rival`.
        thresholds: Of every block, of :func:`atm_thresholds`; above 1 it merges nothing.
        split: Blocks that pair as ToMe does. Default: all of them.
        compared: "tokens" (the default), behind the attention, or "keys", their mean over heads.
    """

    counts_depend_on_image = True

    def __init__(
        self,
        vit: nn.Module,
        thresholds: Sequence[float],
        split: int | None = None,
        compared: str = "tokens",
    ) -> None:
        super().__init__(vit)
        if compared not in ("tokens", "keys"):
            raise InvalidArgumentError(f"compared {compared!r} is unknown: use tokens or keys")
        self.compared = compared
        self.thresholds = _for_blocks(thresholds, self.depth, "thresholds")
        self.split = self.depth if split is None else split

    def settings(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds, "split": self.split, "compared": self.compared}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        threshold = self.thresholds[index]
        if threshold > 1:
            return tokens, size
        prefix = self.prefix
        unit = _unit(tokens[0] if self.compared == "tokens" else metric)
        size = torch.ones_like(tokens[..., :1]) if size is None else size
        both = (tokens, size)
        if index < self.split:
            similarity = unit[2 * prefix :: 2] @ unit[1::2].T
            sets = [(each[:, 2 * prefix :: 2], each[:, 1::2]) for each in both]
        else:
            patches = size[0, prefix:, 0]
            places = torch.arange(patches.shape[0])
            # whole numbers below 2**24: exact, and without ties
            order = (patches * TIES + places).argsort() + prefix
            half = patches.shape[0] // 2
            small, large = order[:half], order[half:]
            similarity = unit.index_select(0, small) @ unit.index_select(0, large).T
            sets = [(each.index_select(1, small), each.index_select(1, large)) for each in both]
        best, target = similarity.max(1)
        reaches = best >= threshold
        goes, stays = reaches.nonzero()[:, 0], (~reaches).nonzero()[:, 0]
        head = (tokens[:, :prefix], size[:, :prefix])
        return _merged(head, sets, goes, stays, target.index_select(0, goes))


def atm_thresholds(alpha: float, beta: float, depth: int, least: float = 0.0) -> list[float]:
    """Return max(alpha - (exp(beta (l - 1)) - 1), least) for block l = 1 to depth.

    Args:
        alpha: Of the first block.
        beta: How fast it falls; 0: it does not.
        depth: How many blocks.
        least: It falls no lower. Default 0.
    """
    return [round(max(alpha - math.expm1(beta * each), least), 6) for each in range(depth)]


class Saint(Rival):
    """Of every other patch, those with the most and nearest neighbors among the rest are dropped.

    A neighbor is at least `theta` alike. A patch with n neighbors of mean similarity m has the
    score n exp(gamma (m - theta)), without any the mean similarity to all of the other set. As many
    go as have at least `neighbors`, the highest scores first, in the first half of the blocks.
    Nothing is merged, and there are no sizes.

    Args:
        vit: As of :class:`Rival`.
        theta: Similarity of a neighbor.
        neighbors: Default 5, the authors'.
        gamma: Default 10, the authors'.
    """

    counts_depend_on_image = True

    def __init__(
        self, vit: nn.Module, theta: float, neighbors: int = 5, gamma: float = 10.0
    ) -> None:
        super().__init__(vit)
        self.theta, self.neighbors, self.gamma = theta, neighbors, gamma

    def settings(self) -> dict[str, Any]:
        return {"theta": self.theta, "neighbors": self.neighbors, "gamma": self.gamma}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        if index >= self.depth // 2 or self.theta > 1:
            return tokens, size
        unit = _unit(metric[self.prefix :])
        similarity = unit[::2] @ unit[1::2].T
        near = similarity >= self.theta
        number = near.sum(1)
        mean = (similarity * near).sum(1) / number.clamp_min(1)
        score = number * (self.gamma * (mean - self.theta)).exp()
        score = torch.where(number > 0, score, similarity.mean(1))
        order = score.argsort(descending=True)
        removed = (number >= self.neighbors).sum()
        place = (torch.arange(order.shape[0]) >= removed).nonzero()[:, 0]
        stays = order.index_select(0, place)
        patches = tokens[:, self.prefix :]
        kept = [tokens[:, : self.prefix], patches[:, ::2].index_select(1, stays), patches[:, 1::2]]
        return torch.cat(kept, 1), None


class RandomDrop(Rival):
    """Patches are dropped at random, the same places of every image.

    Args:
        vit: As of :class:`Rival`.
        removed: Patches that every block drops; at most half of what there is, as in ToMe.
        seed: Default 0.
    """

    def __init__(self, vit: nn.Module, removed: Sequence[int], seed: int = 0) -> None:
        super().__init__(vit)
        rng = np.random.default_rng(seed)
        self.removed, self.seed = list(removed), seed
        self.kept: list[torch.Tensor] = []
        tokens = self.prefix + int(self.vit.patch_embed.num_patches)
        for number in _for_blocks(removed, self.depth, "removed"):
            patches = tokens - self.prefix
            stay = patches - min(number, patches // 2)
            chosen = np.sort(rng.permutation(patches)[:stay]) + self.prefix
            self.kept.append(torch.from_numpy(np.r_[: self.prefix, chosen]))
            tokens = self.prefix + stay

    def settings(self) -> dict[str, Any]:
        return {"removed": self.removed, "seed": self.seed}

    def reduce(
        self, index: int, tokens: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> Reduced:
        if len(self.kept[index]) == tokens.shape[1]:
            return tokens, size
        return tokens.index_select(1, self.kept[index]), size


def _for_blocks(numbers: Sequence[Any], depth: int, name: str) -> list[Any]:
    if len(numbers) != depth:
        raise InvalidArgumentError(
            f"{name} has {len(numbers)} numbers for {depth} blocks: give one each"
        )
    return list(numbers)


def _unit(metric: torch.Tensor) -> torch.Tensor:
    return metric / metric.norm(dim=-1, keepdim=True)


def _most_similar_pairs(
    similarity: torch.Tensor, removed: int, ranked: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return who goes int64[r], who stays int64[a - r], and the partners int64[r] of who goes.

    Args:
        similarity: float32[a, b] of a first set to a second.
        removed: r.
        ranked: Whether those that stay are in order, the most similar first. Default: in any.
    """
    best = similarity.amax(1)
    goes = best.topk(removed, sorted=False).indices
    stays = best.topk(best.shape[0] - removed, largest=False, sorted=ranked).indices
    stays = stays.flip(0) if ranked else stays
    return goes, stays, similarity.index_select(0, goes).argmax(1)


def _merged(
    head: Sequence[torch.Tensor],
    sets: Sequence[tuple[torch.Tensor, torch.Tensor]],
    goes: torch.Tensor,
    stays: torch.Tensor,
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average by size those of a first set that go into those of a second.

    Args:
        head: Tokens and sizes that come first and are left alone.
        sets: Of the tokens [1, n, D] and their sizes [1, n, 1], the first and the second set.
        goes, stays: Places in the first set.
        target: Places in the second set, of those that go.

    Returns:
        Tokens and sizes: the head, what stays of the first set, the second set.
    """
    (tokens, others), (size, other_size) = sets
    going = size.index_select(1, goes)
    total = other_size.index_add(1, target, going)
    sums = (others * other_size).index_add(1, target, tokens.index_select(1, goes) * going)
    return (
        torch.cat([head[0], tokens.index_select(1, stays), sums / total], 1),
        torch.cat([head[1], size.index_select(1, stays), total], 1),
    )
