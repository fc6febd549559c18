"""A ViT with one output whose decisions pruning turns, pictures for it, and its answers by timm."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import simprune_deploy as sd

LAYERS = [1, 2]
REDUCTION = "drop"
"""Merging loses so little that hardly a decision turns."""
LOW = 0.2
"""A threshold at which some decisions of the model turn."""


@functools.cache
def pictures(count: int = 240) -> np.ndarray:
    """Return uint8[count, 32, 32, 3]: smooth clouds with a little noise, so that patches merge."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(count, 3, 4, 4)))
    clouds = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").numpy()
    noise = rng.normal(size=clouds.shape)
    levels = np.clip(60 * clouds + 128 + 6 * noise, 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


@functools.cache
def as_timm_takes_them() -> torch.Tensor:
    """Return the pictures through timm's own transform: float32[n, 3, 32, 32], normalized."""
    wanted = resolve_data_config({"input_size": (3, 32, 32)}, model=_untrained())
    transform = create_transform(**wanted)
    return torch.stack([transform(Image.fromarray(each)) for each in pictures()])


def _untrained() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=1, **sizes).eval()


@functools.cache
def one_output_vit() -> Any:
    """Return the model: its outputs lie around 0 with a deviation of 1, half of them above."""
    vit = _untrained()
    with torch.inference_mode():
        found = vit(as_timm_takes_them())
    with torch.no_grad():
        vit.head.weight /= found.std()
        vit.head.bias.copy_((vit.head.bias - found.quantile(0.5)) / found.std())
    return vit


def pruned(threshold: float = LOW) -> Any:
    """Return the model, pruned."""
    return sd.prune(one_output_vit(), threshold=threshold, layers=LAYERS, reduction=REDUCTION)


@functools.cache
def plain(threshold: float | None = None) -> np.ndarray:
    """Return float32[n]: what PyTorch answers to every picture alone; dense without a threshold."""
    model = one_output_vit()
    if threshold is not None:
        model = pruned(threshold).eval()
    with torch.inference_mode():
        rows = [model(each[None]) for each in as_timm_takes_them()]
    return torch.cat(rows)[:, 0].numpy()


@functools.cache
def labels() -> np.ndarray:
    """Return int64[n] of 0 and 1: the dense model is right on all but every twentieth."""
    found = (plain() > 0).astype(np.int64)
    found[::20] ^= 1
    return found


def write_data(folder: Path, **arrays: Any) -> Path:
    """Write the pictures and their labels, or what is given in their place."""
    path = folder / "data.npz"
    np.savez(path, **{"images": pictures(), "labels": labels(), **arrays})
    return path


def write_checkpoint(folder: Path, threshold: float = LOW) -> Path:
    """Write the model, pruned, as a checkpoint."""
    path = folder / "one.safetensors"
    sd.save(pruned(threshold), path)
    return path
