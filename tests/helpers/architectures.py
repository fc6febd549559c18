"""Small models of every kind of ViT that can be pruned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import timm
import torch

from simprune_deploy.common.images import ImageSet, Preprocessing, sample_images
from simprune_deploy.pruning.model import PrunedViT, prune

NUM_CLASSES = 7


THRESHOLD = 0.8


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A timm model in small; `what` is what no other has, `attribute` where the model shows it.

    One prune layer is enough to tell that an architecture can be pruned; a chain of two takes
    twice as long to export, so one has it.
    """

    what: str
    name: str
    args: tuple[tuple[str, Any], ...] = ()
    chain: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, 1) if self.chain else (1,)


def with_args(**args: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(args.items())


PATCH_14 = with_args(img_size=112)


ARCHITECTURES = [
    Architecture("class token", "vit_tiny_patch16_224", chain=True),
    Architecture("no class token", "vit_base_patch16_gap_224"),
    Architecture("distillation token", "deit_tiny_distilled_patch16_224"),
    Architecture("registers and LayerScale", "vit_small_patch14_reg4_dinov2", PATCH_14),
    Architecture("packed SwiGLU", "vit_giant_patch14_dinov2", PATCH_14),
    Architecture("norm before the blocks", "vit_base_patch16_clip_224"),
    Architecture("quick GELU", "vit_base_patch16_clip_quickgelu_224"),
    Architecture("attention pool", "vit_base_patch16_siglip_224"),
    Architecture("attention pool of the prefix too", "test_vit3"),
    Architecture("norm behind the mean", "vit_medium_patch16_reg4_gap_256"),
    Architecture("norm behind attention and MLP", "vit_base_patch16_rpn_224"),
    Architecture("parallel branches", "vit_small_patch16_18x2_224"),
    Architecture("norm of queries and keys", "vit_base_patch16_xp_224"),
    Architecture("differential attention", "vit_dlittle_patch16_reg1_gap_256"),
    Architecture("norm of the embedding", "aimv2_large_patch14_224", PATCH_14),
    Architecture("norm inside attention and MLP", "beit3_base_patch16_224"),
    Architecture(
        "mean and maximum", "vit_tiny_patch16_224", with_args(global_pool="avgmax", fc_norm=True)
    ),
]


def build(architecture: Architecture, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"img_size": 128, "depth": 2, "embed_dim": 48, "num_heads": 4}
    args = {**sizes, "num_classes": NUM_CLASSES, **dict(architecture.args)}
    return timm.create_model(architecture.name, **args).eval()


def build_pruned(architecture: Architecture, seed: int = 0) -> PrunedViT:
    return prune(build(architecture, seed), threshold=THRESHOLD, layers=architecture.layers)


def photographs(model: Any, count: int = 8) -> ImageSet:
    return load_photographs(Preprocessing.of_model(model), count)


@functools.cache
def load_photographs(preprocessing: Preprocessing, count: int) -> ImageSet:
    return sample_images(preprocessing, count)
