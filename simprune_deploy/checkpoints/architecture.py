"""Which architecture weights fit: built on the meta device, so that nothing is spent on a no."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from timm.models import VisionTransformer, is_model
from torch import nn

from simprune_deploy.checkpoints.formats import one_line, plain
from simprune_deploy.common.errors import (
    CheckpointError,
    SimpruneError,
    UnsupportedModelError,
    argument,
)
from simprune_deploy.pruning.families import (
    PrunableModel,
    check_prunable,
    describe_models,
    list_names,
)

MAX_PATCHES = 16384
"""Patches of an image beyond which a model is refused: attention is quadratic in them."""

# arguments of a file that are huge only by mistake or by malice
_LIMITS = {
    "depth": 256,
    "embed_dim": 16384,
    "num_heads": 1024,
    "mlp_ratio": 64,
    "patch_size": 1024,
    "reg_tokens": 1024,
    "in_chans": 1024,
    "num_classes": 1_000_000,
    "img_size": 1 << 20,
}
# create_model's own arguments, which would load other weights or build another thing
_NOT_OURS = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
    *("checkpoint_path", "cache_dir", "features_only", "out_indices", "feature_cls"),
    *("use_naflex", "pruned", "weight_init", "fix_init", "device", "dtype", "block_fn"),
    *("scriptable", "exportable", "no_jit", "dynamic_img_size", "dynamic_img_pad"),
)
_MOST_CANDIDATES = 12
_MOST_NAMED = 4

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """An architecture beside the weights meant for it.

    Attributes:
        model: It, on the meta device, with the sizes that the weights ask for.
        mismatches: What does not fit, in words, the most telling first; empty if it fits.
        notes: What was read off the weights' shapes.
        assumed: What neither the file nor the user says, by timm's name of the argument, and where
            the value is from.
        open_question: What the file cannot say and timm's default contradicts; None: nothing.
    """

    model: VisionTransformer
    mismatches: list[str]
    notes: list[str] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)
    open_question: str | None = None


def known_architecture(name: str) -> str | None:
    """Return timm's name in `name` ("hf-hub:timm/" before it, a tag behind), or None."""
    bare = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    return bare if is_model(bare.split(".")[0]) else None


def fit(state: State, arch: str, args: Mapping[str, Any], size: tuple[int, int] | None) -> Fit:
    """Build `arch` for these weights, their shapes having the last word on its arguments.

    Args:
        state: The weights.
        arch: timm's name.
        args: What the file states for ``timm.create_model``.
        size: The wished image size, a hint where the positions are no square grid.

    Raises:
        UnsupportedModelError: the architecture cannot be pruned.
        CheckpointError: its arguments are damaged or out of bounds.
    """
    check_family(arch)
    clean = _clean(args)
    model = _build(arch, clean)
    changes, notes = _read_shapes(model, state, size)
    pooling, question = _pooling(model, state, clean)
    changes |= pooling
    if changes:
        model = _build(arch, {**clean, **changes})
    check_prunable(model)
    _check_patches(model)
    mismatches = _mismatches(model, state)
    if len(mismatches) == 1 and mismatches[0].startswith("pos_embed is"):
        raise CheckpointError(
            f"{mismatches[0]}, and everything else fits {arch}: the patches are no square grid, "
            f"give the height and width the model was trained at with {argument('img_size')}"
        )
    assumed = {}
    if "global_pool" not in clean and "attn_pool.latent" not in state:
        assumed["global_pool"] = f"{model.global_pool!r}, timm's default for {arch},"
    return Fit(model, mismatches, notes, assumed, question)


def check_size(size: tuple[int, int], model: VisionTransformer) -> None:
    """Refuse an image size with no patches or too many of them.

    Raises:
        CheckpointError: it is out of bounds.
    """
    stride = _stride(model)
    unseen = [side % step for side, step in zip(size, stride, strict=True)]
    if any(unseen) and min(side // step for side, step in zip(size, stride, strict=True)) >= 1:
        near = sorted({side // stride[0] * stride[0] for side in size})
        raise CheckpointError(
            f"{argument('img_size')} {size[0]}x{size[1]} is no multiple of the patches of "
            f"{stride[0]}x{stride[1]} pixels, and the last {max(unseen)} rows or columns would not "
            f"be seen: give {' or '.join(map(str, [*near, near[-1] + stride[0]]))}"
        )
    patches = (size[0] // stride[0]) * (size[1] // stride[1])
    if not 1 <= patches <= MAX_PATCHES:
        raise CheckpointError(
            f"{argument('img_size')} {size[0]}x{size[1]} gives {patches} patches of "
            f"{stride[0]}x{stride[1]}: "
            f"give a size with 1 to {MAX_PATCHES}"
        )


def check_family(arch: str) -> None:
    """Refuse an architecture that is no ViT by its name, before anything is built.

    Raises:
        UnsupportedModelError: it cannot be pruned; the message says why.
    """
    _, refused = list_names(arch.split(".")[0])
    for name, reason in refused:
        raise UnsupportedModelError(f"{name} cannot be pruned: {reason}")


def _clean(args: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is for training or not the model's, and check the numbers against the limits."""
    clean: dict[str, Any] = {}
    for key, given in args.items():
        value = plain(given)
        # in float32 on a CPU, at inference: no rate of dropping anything applies
        if value is None or key in _NOT_OURS or "drop" in key:
            continue
        if key in _LIMITS:
            _check_number(key, value)
        clean[key] = value
    return clean


def _check_number(key: str, value: Any) -> None:
    pair = key in ("img_size", "patch_size") and isinstance(value, (list, tuple))
    numbers = list(value) if pair else [value]
    fits = all(
        isinstance(number, (int, float)) and 0 <= number <= _LIMITS[key] for number in numbers
    )
    if not fits or (pair and len(numbers) != 2):
        raise CheckpointError(
            f"the checkpoint states {key}={value!r:.60}, which is not between 0 and "
            f"{_LIMITS[key]}: it is damaged, or give its weights alone with {argument('arch')}"
        )


def _build(arch: str, args: Mapping[str, Any]) -> VisionTransformer:
    try:
        with torch.device("meta"):
            model = timm.create_model(arch, pretrained=False, weight_init="skip", **args)
    except Exception as error:  # arguments reach every layer, and any of them may choke
        stated = ", ".join(f"{key}={value!r:.40}" for key, value in args.items()) or "none"
        raise CheckpointError(
            f"{arch} cannot be built with the checkpoint's arguments ({stated}): {one_line(error)}"
        ) from error
    if not isinstance(model, VisionTransformer):
        check_prunable(model)
    vit = cast(VisionTransformer, model)
    recorded = cast("dict[str, Any]", vit._model_args)
    recorded.pop("weight_init", None)
    return vit


# What the shapes say


def _read_shapes(
    model: VisionTransformer, state: State, size: tuple[int, int] | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that the weights' shapes ask for where the built model differs."""
    changes: dict[str, Any] = {}
    notes: list[str] = []
    head = state.get("head.weight")
    classes = 0 if head is None or head.ndim != 2 else head.shape[0]
    changes["num_classes"] = classes
    notes.append(f"{classes} classes, from head.weight" if classes else "no classifier head")
    cfg = cast("dict[str, Any]", model.pretrained_cfg)
    first = state.get(f"{cfg.get('first_conv') or 'patch_embed.proj'}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != model.in_chans:
        changes["in_chans"] = first.shape[1]
        notes.append(f"{first.shape[1]} input channels, from the first convolution")
    if model.dynamic_img_size:
        changes["dynamic_img_size"] = False
        notes.append("built for one image size (dynamic_img_size=False)")
    if found := _image_size(model, state, size):
        changes["img_size"] = found
        notes.append(f"image size {found[0]}x{found[1]}, from pos_embed")
    return changes, notes


def _pooling(
    model: VisionTransformer, state: State, args: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Return the arguments of the pooling that the names of the weights ask for.

    They say whether the last norm comes before the pooling (norm) or after it (fc_norm), and
    whether the pooling has weights of its own; not which of the others it is.

    Returns:
        The arguments, and the question that only the user can answer, if there is one.
    """
    after, before = "fc_norm.weight" in state, "norm.weight" in state
    changes: dict[str, Any] = {}
    if "global_pool" in args:
        wants_after = not isinstance(model.fc_norm, nn.Identity)
        if "fc_norm" not in args and after != before and after != wants_after:
            changes["fc_norm"] = after
        return changes, None
    if "attn_pool.latent" in state:
        return ({} if model.attn_pool is not None else {"global_pool": "map"}), None
    if after == before or after == isinstance(model.norm, nn.Identity):
        return changes, None  # as timm's default has it, which is then assumed
    if after:
        changes["global_pool"], others = "avg", "avg, avgmax or max"
    else:
        changes |= {"global_pool": "token" if model.has_class_token else "avg", "fc_norm": False}
        others = "token, or avg, avgmax or max without a norm after it"
    return changes, (
        f"its weights have {'fc_norm' if after else 'norm'}, so its pooling is not timm's default "
        f"for the architecture, {model.global_pool!r}, and the file does not say what it is "
        f"({others}): choose with {argument('global_pool')}"
    )


def _image_size(
    model: VisionTransformer, state: State, size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the image size for which pos_embed was made.

    None if the model has it already, or if the positions are no square grid.
    """
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or model.pos_embed is None:
        return None
    if positions.shape[1] == model.pos_embed.shape[1]:
        return None
    patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    stride = _stride(model)
    if size is not None and (size[0] // stride[0]) * (size[1] // stride[1]) == patches:
        return size
    side = math.isqrt(max(0, patches))
    if patches < 1 or side * side != patches:
        return None
    if patches > MAX_PATCHES:
        raise CheckpointError(
            f"pos_embed has {patches} patch positions, more than {MAX_PATCHES}: "
            "give a model of a smaller image size"
        )
    return side * stride[0], side * stride[1]


def _stride(model: VisionTransformer) -> tuple[int, int]:
    """Pixels from patch to patch: the patch size, and in a hybrid its backbone's stride too."""
    height, width = model.patch_embed.feat_ratio(as_scalar=False)
    return int(height), int(width)


def _check_patches(model: VisionTransformer) -> None:
    patches = model.patch_embed.num_patches
    if not 1 <= patches <= MAX_PATCHES:
        height, width = model.patch_embed.img_size
        raise CheckpointError(
            f"the checkpoint's image size {height}x{width} gives {patches} patches: "
            f"1 to {MAX_PATCHES} are possible"
        )


def _mismatches(model: VisionTransformer, state: State) -> list[str]:
    wanted = model.state_dict()
    shapes = [
        f"{name} is {_shape(state[name])} in the file and {_shape(tensor)} in the model"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    missing = [
        f"{name} {_shape(tensor)} is not in the file"
        for name, tensor in wanted.items()
        if name not in state
    ]
    unknown = [
        f"{name} {_shape(tensor)} is not in the model"
        for name, tensor in state.items()
        if name not in wanted
    ]
    return shapes + missing + unknown


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a number"


def kwargs_hint(state: State, arch: str) -> str:
    """Return the arguments that the weights speak of and the architecture has otherwise, or ""."""
    if "patch_embed.proj.weight" not in state:
        return ""  # no weights of timm's at all
    model = _build(arch, {})
    found = []
    register = state.get("reg_token")
    if register is not None and register.ndim == 3 and register.shape[1] != model.num_reg_tokens:
        found.append(f"reg_tokens={register.shape[1]}")
    patch = state.get("patch_embed.proj.weight")
    own = model.state_dict().get("patch_embed.proj.weight")
    if patch is not None and own is not None and patch.shape[2:] != own.shape[2:]:
        found.append(f"patch_size={patch.shape[-1]}")
    if "cls_token" not in state and model.has_class_token:
        found.append("class_token=False")
    if "blocks.0.ls1.gamma" in state and "blocks.0.ls1.gamma" not in model.state_dict():
        found.append("init_values=1e-5")
    if "blocks.0.attn.qkv.bias" not in state and "blocks.0.attn.qkv.weight" in state:
        found.append("qkv_bias=False")
    if "blocks.0.attn.q_norm.weight" in state and not hasattr(model.blocks[0].attn, "q_norm"):
        found.append("qk_norm=True")
    return " ".join(found)


# Which others would fit


def suggest(state: State, args: Mapping[str, Any], but_not: str = "") -> list[str]:
    """Return a few names of architectures whose shapes these weights fit.

    A pre-selection by width, depth and patch keeps it to a handful of exact comparisons.
    """
    first = state.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4:
        return []
    numbers = [key.split(".")[1] for key in state if key.startswith("blocks.")]
    depth = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    patch = first.shape[2], first.shape[3]
    likely = [
        found
        for found in _all_models()
        if found.name != but_not
        and found.embed_dim == first.shape[0]
        and found.depth == depth
        and (
            # a hybrid's patches are of its backbone's features, not of pixels
            patch == (1, 1) or _grid(found.image_size, patch) == found.num_patches
        )
    ]
    positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    likely.sort(key=lambda found: (abs(found.num_patches - positions), len(found.name)))
    fitting: list[str] = []
    for found in likely[:_MOST_CANDIDATES]:
        # a size that is no square grid, or arguments of the file that this one does not take
        with contextlib.suppress(SimpruneError):
            if not fit(state, found.name, args, None).mismatches:
                fitting.append(found.name)
        if len(fitting) == _MOST_NAMED:
            break
    return fitting


@functools.cache
def _all_models() -> tuple[PrunableModel, ...]:
    return tuple(describe_models(list_names()[0]))


def _grid(size: tuple[int, int], patch: tuple[int, int]) -> int:
    return (size[0] // patch[0]) * (size[1] // patch[1])
