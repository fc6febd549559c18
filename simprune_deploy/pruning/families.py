"""Which timm models can be pruned, and for the others the reason why not (yet)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from simprune_deploy.common.errors import InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

PRUNABLE_MODULES = ("vision_transformer", "deit", "vision_transformer_hybrid")
"""The timm modules whose entry points build a VisionTransformer."""

REASONS = {
    "beit": "its relative position bias is a table over patch pairs, which pruning would break",
    "eva": "its rotary position embedding would have to follow the kept patches",
    "naflexvit": "it packs images of different sizes into one sequence",
    "swin": "its attention is windowed and needs the full grid of patches",
    "vision_transformer_relpos": "its relative position bias is a table over patch pairs",
    "vision_transformer_sam": "its attention is windowed with a relative position bias",
}
_WINDOWED = "its attention is windowed and needs the full grid of patches"
_CONVOLUTIONAL = "it is convolutional or hierarchical and needs the full grid of patches"


def check_prunable(model: nn.Module) -> None:
    """Pass if `model` is a timm ``VisionTransformer`` whose forward we know.

    Raises:
        InvalidArgumentError: it is no model at all.
        UnsupportedModelError: it is not; the message names the model and the reason.
    """
    from timm.models import VisionTransformer, VisionTransformerDistilled
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"{model!r:.100} is no model: give a timm ViT, such as simprune_deploy.load returns"
        )
    name = architecture_name(model)
    if not isinstance(model, VisionTransformer):
        raise UnsupportedModelError(f"{name} cannot be pruned: {why_not(model)}")
    known = (VisionTransformer, VisionTransformerDistilled)
    for method in ("forward", "forward_features", "forward_head", "pool"):
        if getattr(type(model), method) not in [getattr(base, method) for base in known]:
            raise UnsupportedModelError(
                f"{name} cannot be pruned: its class {type(model).__name__} has a "
                f"{method} of its own, which pruning would bypass"
            )
    if model.global_pool == "prr":
        raise UnsupportedModelError(
            f"{name} cannot be pruned: its pooling (prr) takes no attention mask"
        )
    if model.global_pool == "":
        raise UnsupportedModelError(
            f"{name} cannot be pruned: without pooling its output is a token for every patch; "
            "build it with global_pool='token' or 'avg'"
        )
    if model.dynamic_img_size:
        raise UnsupportedModelError(
            f"{name} cannot be exported with dynamic_img_size: build it with img_size=N"
        )


def architecture_name(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the class's name."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def why_not(model: nn.Module) -> str:
    """Return the reason why a model outside the ViT family cannot be pruned."""
    return reason_for_module(type(model).__module__.rsplit(".", 1)[-1], type(model).__name__)


def reason_for_module(module: str, class_name: str = "") -> str:
    """Return the reason for a timm module's name, such as "eva"."""
    for prefix, reason in REASONS.items():
        if module.startswith(prefix):
            return reason
    if "swin" in module or module in ("maxxvit", "hiera", "twins", "nest", "mvitv2"):
        return _WINDOWED
    what = f" ({class_name})" if class_name else ""
    return f"it is not a timm VisionTransformer{what}; {_CONVOLUTIONAL}"


@dataclasses.dataclass(frozen=True)
class PrunableModel:
    """One timm architecture and what pruning sees of it.

    Attributes:
        name: timm's name.
        image_size: Default height and width, in pixels.
        num_prefix_tokens: Class, distillation and register tokens.
        num_patches: Patches at the default image size.
        depth: Blocks.
        embed_dim: Width of a token.
        pooling: "token", "avg", "map" (attention pool), ...
    """

    name: str
    image_size: tuple[int, int]
    num_prefix_tokens: int
    num_patches: int
    depth: int
    embed_dim: int
    pooling: str


def list_names(pattern: str = "*") -> tuple[list[str], list[tuple[str, str]]]:
    """Return timm's names that match `pattern`: the prunable ones, and (name, reason) of others."""
    import timm
    from timm.models import is_model_in_modules

    prunable, refused = [], []
    for name in timm.list_models(pattern):
        if is_model_in_modules(name, PRUNABLE_MODULES):
            prunable.append(name)
        else:
            module = timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
            refused.append((name, reason_for_module(module)))
    return prunable, refused


def describe_models(names: list[str]) -> Iterator[PrunableModel]:
    """Yield the facts of prunable architectures, one by one, without making their weights.

    A model is built on the meta device with empty blocks, which are all that takes time.
    """
    import timm
    import torch
    from torch import nn

    class _NoBlock(nn.Module):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__()

    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, block_fn=_NoBlock, weight_init="skip")
        yield PrunableModel(
            name=name,
            image_size=tuple(model.patch_embed.img_size),
            num_prefix_tokens=model.num_prefix_tokens,
            num_patches=model.patch_embed.num_patches,
            depth=len(model.blocks),
            embed_dim=model.embed_dim,
            pooling=model.global_pool,
        )
