"""The two real tracks of docs/method.md, and how settings are measured and compared on them.

* ``fashion``: the Fashion-MNIST classifier of ``examples/fashion_mnist`` on its labeled images.
* ``photographs``: the DINOv2-layout ViT-S/14 that ``examples/real_weights.py`` makes, at 224
  pixels, on its 20 ImageNet photographs and the 8 that come with the package. It has no
  classifier: what is measured is the cosine of the final class token to the unpruned model's.

:func:`load_halves` is for what calibrates: all 74 photographs, at any size, every other one of
which calibrates, and the others measure. Fashion-MNIST's images are halved the same way.

Everything runs in PyTorch on one CPU thread, with fixed seeds.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from rich.progress import track as progress

import simprune_deploy as sd
from simprune_deploy.common.errors import CheckFailedError, SimpruneError
from simprune_deploy.common.files import staged_file
from simprune_deploy.common.images import PictureLoader, Preprocessing, sample_images
from simprune_deploy.pruning import cost
from simprune_deploy.pruning.model import PrunedViT

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "docs" / "method"
TRACKS = ("fashion", "photographs")
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Track:
    """A model, its images, and what the unpruned model says of them.

    Attributes:
        name: "fashion" or "photographs".
        vit: The unpruned timm model.
        images: float32[n, C, H, W], normalized.
        labels: int64[n], or None.
        dense: The unpruned model's outputs, [n, D].
        batch: Images that run together.
    """

    name: str
    vit: timm.models.VisionTransformer
    images: torch.Tensor
    labels: torch.Tensor | None
    dense: torch.Tensor
    batch: int

    def every(self, step: int, start: int = 0) -> Track:
        """The track with every so manieth image, from number `start` on."""
        labels = None if self.labels is None else self.labels[start::step]
        fewer = {
            "images": self.images[start::step],
            "labels": labels,
            "dense": self.dense[start::step],
        }
        return dataclasses.replace(self, **fewer)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One setting, image by image.

    Attributes:
        tokens: float64[n], the share of the unpruned model's tokens that the blocks processed.
        cosine: float64[n], of the output to the unpruned model's.
        right: bool[n], whether the class is the label; None without labels.
        same: bool[n], whether the class is the unpruned model's; None without a classifier.
    """

    tokens: np.ndarray
    cosine: np.ndarray
    right: np.ndarray | None
    same: np.ndarray | None


def load_track(name: str, images: int, weights: Path) -> Track:
    """Load a track's model and its first `images` images, and run the unpruned model."""
    if name == "fashion":
        return _fashion(images)
    vit = _photographs_model(weights, 224)
    preprocessing = Preprocessing.of_model(vit)
    imagenet = load_pictures(sorted((weights / "photographs").glob("imagenet_*")), preprocessing)
    pixels = np.concatenate([imagenet, sample_images(preprocessing).pixels])[:images]
    return _track(name, vit, pixels, None, 1)


def load_halves(
    name: str, weights: Path, pixels: int = 224, images: int = 1000
) -> tuple[Track, Track]:
    """Load a track in two halves: what is found is found on the first, and told of the second.

    Args:
        name: "fashion" (its first images) or "photographs" (all 74).
        weights: Folder of the photographs' model and of the photographs.
        pixels: Side of a photograph, as the model sees it. Default 224.
        images: How many of Fashion-MNIST. Default 1000.

    Raises:
        SimpruneError: a photograph or the model is missing.
    """
    if name == "fashion":
        whole = _fashion(images)
        return whole.every(2), whole.every(2, start=1)
    vit = _photographs_model(weights, pixels)
    preprocessing = Preprocessing.of_model(vit)
    halves = [load_pictures(half, preprocessing) for half in halves_of(photographs(weights))]
    first, second = (_track(name, vit, half, None, 1) for half in halves)
    return first, second


def photographs(weights: Path) -> list[Path]:
    """Return the 66 photographs of examples/real_weights.py and the package's 8.

    Raises:
        SimpruneError: one is missing.
    """
    folder = weights / "photographs"
    with (EXAMPLES / "photographs.csv").open(encoding="utf-8", newline="") as file:
        listed = [folder / row["name"] for row in csv.DictReader(file)]
    missing = [path.name for path in listed if not path.is_file()]
    if missing:
        raise SimpruneError(
            f"{len(missing)} of {len(listed)} photographs are missing in {folder}, {missing[0]} "
            f"first: run `python examples/real_weights.py {weights} --force`"
        )
    return listed + sorted((ROOT / "simprune_deploy" / "sample_images").glob("*.jpg"))


def halves_of(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Halve files by the order of their bytes' SHA-256, so that sources mix: even ones, odd ones.

    The first half calibrates, the second measures. It depends on the files alone, not on their
    names or their order.
    """
    ordered = sorted(paths, key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    return ordered[::2], ordered[1::2]


def load_pictures(paths: Sequence[Path], preprocessing: Preprocessing) -> np.ndarray:
    """Return float32[n, C, H, W], normalized."""
    load = PictureLoader(preprocessing)
    return preprocessing.normalize(np.stack([load(path) for path in paths]))


def _fashion(images: int) -> Track:
    vit = sd.load(EXAMPLES / "fashion_mnist" / "vit").eval()
    with np.load(EXAMPLES / "fashion_mnist" / "test_slice.npz") as data:
        levels = data["images"][:images, None].astype(np.float32)
        labels = torch.from_numpy(data["labels"][:images].astype(np.int64))
    pixels = Preprocessing.of_model(vit).normalize(levels / 255)
    return _track("fashion", vit, pixels, labels, 50)


def _photographs_model(weights: Path, pixels: int) -> timm.models.VisionTransformer:
    folder = weights / "vit_small_dinov2_focus"
    if not folder.is_dir():
        raise SimpruneError(
            f"{folder} is missing: run `python examples/real_weights.py {weights}` first"
        )
    return sd.load(folder, img_size=pixels).eval()


def _track(
    name: str,
    vit: timm.models.VisionTransformer,
    pixels: np.ndarray,
    labels: torch.Tensor | None,
    batch: int,
) -> Track:
    torch.set_num_threads(1)
    tensor = torch.from_numpy(pixels)
    with torch.inference_mode():
        dense = torch.cat([vit(chunk) for chunk in tensor.split(batch)])
    return Track(name, vit, tensor, labels, dense, batch)


def quarters(vit: timm.models.VisionTransformer) -> list[int]:
    """Return the blocks before which docs/method.md's tables prune: "auto" when they were made."""
    depth = len(vit.blocks)
    return sorted({min(max(1, depth * quarter // 4), depth - 1) for quarter in (1, 2, 3)})


def tokens_share(model: PrunedViT, kept: torch.Tensor) -> np.ndarray:
    """Return float64[n], the share of tokens processed, from int64[n, L] patches kept."""
    layers, depth = model.config.layers, len(model.vit.blocks)
    prefix, total = model.num_prefix_tokens, model.num_tokens
    rows = [[prefix + k for k in row] for row in kept.tolist()]
    place = model.config.place
    return np.array(
        [
            cost.tokens_share(total, cost.spread_over_blocks(total, layers, row, depth, place))
            for row in rows
        ]
    )


def summarize(track: Track, outputs: torch.Tensor, tokens: np.ndarray) -> Measured:
    """Compare outputs [n, D] with the unpruned model's and the labels."""
    cosine = torch.cosine_similarity(outputs.double(), track.dense.double(), dim=1).numpy()
    if track.labels is None:
        return Measured(tokens, cosine, None, None)
    classes = outputs.argmax(1)
    right, same = classes == track.labels, classes == track.dense.argmax(1)
    return Measured(tokens, cosine, right.numpy(), same.numpy())


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], images: int) -> np.ndarray:
    """Return the bounds [2, ...] of 95 % of a statistic over resampled images (percentiles).

    Both settings of a difference see the same resampled images: the comparison is paired.
    """
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(images, size=images)) for _ in range(RESAMPLES)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    return np.quantile(np.stack(found), tails, axis=0)


def write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows of equal keys; the file appears whole or not at all."""
    with (
        staged_file(path) as staging,
        staging.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run(main: Callable[[], None]) -> int:
    """Run a script's main; a user's mistake is one line and an exit code."""
    try:
        main()
    except SimpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckFailedError) else 2
    return 0


def steps(items: Sequence[object], what: str) -> Iterable:
    """Go through items with a progress bar on stderr where it is a terminal."""
    return progress(items, description=what, disable=not sys.stderr.isatty(), transient=True)
