"""How a checkpoint is to be loaded, as what a user says of it. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from simprune_deploy.common.errors import InvalidArgumentError, argument, spelled
from simprune_deploy.common.transforms import (
    CROP_MODES,
    INTERPOLATIONS,
    PREPROCESSING,
    CropMode,
    Interpolation,
)

Pooling = Literal["token", "avg", "avgmax", "max", "map"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """How a checkpoint is to be loaded. What is left out is as the file says.

    What neither says is timm's default for the architecture, and marked as assumed.

    Args:
        arch: timm architecture, for checkpoints that do not say theirs.
        img_size: Pixels, or (height, width); positions are resampled.
        pretrained: The source is a timm name or ``hf-hub:`` id to download. Default False.
        trust_pickle: Load a pickled module, which runs code from the file. Default False.
        global_pool: How the tokens become one: "token", "avg", "avgmax", "max" or "map".
        model_kwargs: What else the model was built with, arguments of ``timm.create_model``:
            {"num_heads": 6}.
        mean, std: Of the pictures that it was trained on, in [0, 1], one number a channel.
        interpolation: How pictures are scaled: "bicubic", "bilinear", ...
        crop_pct: The share of the scaled picture's side that the crop keeps.
        crop_mode: "center", "squash" or "border".

    Raises:
        InvalidArgumentError: a value is out of its range.
    """

    arch: str | None = None
    img_size: int | tuple[int, int] | None = None
    pretrained: bool = False
    trust_pickle: bool = False
    global_pool: Pooling | None = None
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    interpolation: Interpolation | None = None
    crop_pct: float | None = None
    crop_mode: CropMode | None = None

    def __post_init__(self) -> None:
        choices: dict[str, Sequence[str]] = {
            "global_pool": POOLINGS,
            "interpolation": INTERPOLATIONS,
            "crop_mode": CROP_MODES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise InvalidArgumentError(
                    f"{argument(name)} {value!r} is unknown: use one of {', '.join(allowed)}",
                    what=name,
                    value=value,
                    allowed=allowed,
                )
        _check_keywords(self.model_kwargs)
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _colors(name, getattr(self, name)))
        crop = self.crop_pct
        if crop is not None and not (isinstance(crop, numbers.Real) and 0.1 <= crop <= 10):
            raise InvalidArgumentError(
                f"{argument('crop_pct')} {crop!r} must be a share, 0.1 to 10: 1 keeps all",
                what="crop_pct",
                value=crop,
                allowed=(0.1, 10),
            )

    @property
    def given(self) -> list[str]:
        """The names of the options that were given."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What was said of the pictures."""
        return {name: getattr(self, name) for name in PREPROCESSING if name in self.given}


def is_color(name: str, values: Sequence[float]) -> bool:
    """Whether numbers can be the mean or the deviation of pixels in [0, 1]."""
    low_enough = all(math.isfinite(each) and each <= 1 for each in values)
    return low_enough and (min(values) > 0 if name == "std" else min(values) >= 0)


def _check_keywords(keywords: Any) -> None:
    """Refuse what is no set of keywords, or says what is said otherwise."""
    if not isinstance(keywords, Mapping) or not all(isinstance(key, str) for key in keywords):
        raise InvalidArgumentError(
            f"{argument('model_kwargs')} {keywords!r} must be names and values: "
            f"{argument('model_kwargs', {'num_heads': 6}, 'num_heads=6')}"
        )
    otherwise = {
        **dict.fromkeys(("num_classes", "in_chans"), "the weights say it, leave it out"),
        **{name: f"give {argument(name)}" for name in ("img_size", "global_pool")},
        "pretrained": f"give {argument('pretrained', True)}",
        **dict.fromkeys(
            ("pretrained_cfg", "pretrained_cfg_overlay"),
            f"give {', '.join(map(argument, PREPROCESSING))}",
        ),
    }
    for name, way_out in otherwise.items():
        if name in keywords:
            raise InvalidArgumentError(f"{argument('model_kwargs')} {name}: {way_out}")


def _colors(name: str, values: Any) -> tuple[float, ...]:
    numbers_given = values if isinstance(values, (list, tuple)) else (values,)
    fits = all(isinstance(each, numbers.Real) and math.isfinite(each) for each in numbers_given)
    if not numbers_given or not fits or not is_color(name, numbers_given):
        above = "above 0, and at most 1" if name == "std" else "from 0 to 1"
        example = (0.229, 0.224, 0.225) if name == "std" else (0.485, 0.456, 0.406)
        raise InvalidArgumentError(
            f"{argument(name)} {values!r} must be numbers {above}, one a channel (levels of 255 "
            f"divided by 255): {argument(name, example, ','.join(map(str, example)))}",
            what=name,
            value=values,
        )
    return tuple(float(each) for each in numbers_given)


def for_checkpoints(options: CheckpointOptions, given: str = "a model") -> InvalidArgumentError:
    """Return the error of options beside what is no checkpoint."""
    names = ", ".join(argument(name) for name in options.given)
    return InvalidArgumentError(
        f"{names}: for checkpoints, and {given} is given: leave out, or give the checkpoint"
    )


def assumptions(preprocessing: Mapping[str, Any]) -> list[str]:
    """Return in sentences what neither a checkpoint nor its user said.

    Args:
        preprocessing: As a model's metadata has it; "assumed" in it names what was assumed, and
            where the values are from.
    """
    assumed = preprocessing.get("assumed") or {}
    found = []
    if pictures := [key for key in PREPROCESSING if key in assumed]:
        origins = dict.fromkeys(assumed[key] for key in pictures)
        values = "; ".join(
            ", ".join(
                f"{key} {_shown(preprocessing.get(key))}"
                for key in pictures
                if assumed[key] == origin
            )
            + f" ({origin})"
            for origin in origins
        )
        options = ", ".join(argument(key) for key in pictures)
        found.append(
            f"the checkpoint does not say how its pictures were prepared, so this is assumed: "
            f"{values}; if it was trained otherwise, give {options}"
        )
    if "global_pool" in assumed:
        found.append(
            "the checkpoint does not say how its tokens are pooled: "
            f"{assumed['global_pool']} assumed; if it was trained otherwise, give "
            f"{argument('global_pool')}"
        )
    return [spelled(each) for each in found]


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
