"""timm's names of what is done to pictures before a model sees them. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
CropMode = Literal["center", "squash", "border"]

INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
CROP_MODES: tuple[CropMode, ...] = get_args(CropMode)
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
