"""What a model says of itself: how its pictures are prepared, its classes, and what was assumed."""

from __future__ import annotations

from typing import Any

from simprune_deploy.checkpoints.formats import Contents
from simprune_deploy.checkpoints.options import CheckpointOptions, is_color
from simprune_deploy.common.errors import CheckpointError, InvalidArgumentError, argument
from simprune_deploy.common.images import fit_to_channels
from simprune_deploy.common.transforms import CROP_MODES, INTERPOLATIONS, PREPROCESSING


def record(
    vit: Any, contents: Contents, options: CheckpointOptions, assumed: dict[str, str]
) -> None:
    """Make pretrained_cfg and _model_args describe this model, not timm's default of the name."""
    size = [int(side) for side in vit.patch_embed.img_size]
    vit._model_args = {
        **vit._model_args,
        "num_classes": vit.num_classes,
        "in_chans": vit.in_chans,
        "global_pool": vit.global_pool,
        "img_size": size,
    }
    cfg, notes = vit.pretrained_cfg, contents.notes
    if cfg.get("num_classes") != vit.num_classes:
        # timm's names are for the classes of its own weights
        for key in ("label_names", "label_descriptions"):
            cfg.pop(key, None)
    cfg["num_classes"] = vit.num_classes
    cfg["input_size"] = (vit.in_chans, *size)
    for key in ("url", "file", "hf_hub_id", "source", "test_input_size", "min_input_size"):
        cfg.pop(key, None)
    file_says = {
        key: value for key, value in contents.preprocessing.items() if key not in options.given
    }
    said = {**_usable(file_says, vit.num_classes, notes), **options.preprocessing}
    cfg.update(said)
    for key in ("mean", "std"):
        if len(options.preprocessing.get(key, ())) not in (0, 1, vit.in_chans):
            raise InvalidArgumentError(
                f"{argument(key)} has {len(cfg[key])} numbers, and the model {vit.in_chans} "
                "channels: give one each, or one for all"
            )
    left = _assumed(vit, contents, options, assumed)
    for key in ("mean", "std"):
        cfg[key], averaged = _per_channel(key, cfg.get(key), vit.in_chans)
        if averaged:
            left[key] = averaged
    cfg["assumed"] = left


def _assumed(
    vit: Any, contents: Contents, options: CheckpointOptions, pooling: dict[str, str]
) -> dict[str, str]:
    """Return what nobody said, and where its value is from."""
    origin = f"timm's default for {vit.pretrained_cfg.get('architecture') or 'the architecture'}"
    before = contents.preprocessing.get("assumed")
    if isinstance(before, dict):  # of a model that was loaded, pruned and saved
        left = {str(key): str(value) for key, value in before.items()}
    else:
        left = dict.fromkeys(PREPROCESSING, origin) | pooling
        left = {key: value for key, value in left.items() if key not in contents.says}
    return {key: value for key, value in left.items() if key not in options.given}


def _usable(values: dict[str, Any], num_classes: int, notes: list[str]) -> dict[str, Any]:
    """Keep the entries that hold at inference, and fit the model."""
    kept = {key: value for key, value in values.items() if value is not None}
    choices = {"interpolation": INTERPOLATIONS, "crop_mode": CROP_MODES}
    for key, known in choices.items():
        if key in kept and kept[key] not in known:
            notes.append(f"{key} {kept.pop(key)!r} left out: it is for training only")
    names = kept.get("label_names")
    if names is not None and (not isinstance(names, (list, tuple)) or len(names) != num_classes):
        kept.pop("label_names")
        kept.pop("label_descriptions", None)
        notes.append(f"label names left out: they are not for {num_classes} classes")
    crop = kept.get("crop_pct")
    if crop is not None and (not isinstance(crop, (int, float)) or not 0.1 <= crop <= 10):
        raise CheckpointError(
            f"the checkpoint states crop_pct={crop!r:.60}, which is no share: give "
            f"{argument('crop_pct')}"
        )
    return kept


def _per_channel(key: str, value: Any, channels: int) -> tuple[tuple[float, ...], str]:
    """Return a number a channel, and where they are from if the value has another number."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(isinstance(number, (int, float)) for number in numbers) or not numbers:
        raise CheckpointError(f"the checkpoint states {key}={value!r:.60}, which is no color")
    if not is_color(key, numbers):
        raise CheckpointError(
            f"the checkpoint states {key}={value!r:.60}, which is not of pixels in 0 to 1: give "
            f"{argument(key)}"
        )
    try:
        fitted = fit_to_channels(key, numbers, channels)
    except InvalidArgumentError as error:
        raise CheckpointError(f"the checkpoint states {key}={value!r:.60}: {error}") from None
    averaged = len(numbers) != channels and len(set(numbers)) > 1
    return fitted, f"the mean of those of {len(numbers)} channels" if averaged else ""
