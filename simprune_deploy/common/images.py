"""Pictures in, float32 arrays out, through timm's own transforms.

Importing this module needs numpy only; torch, timm and Pillow are imported where they are used.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.common.errors import (
    ArtifactError,
    DataError,
    InvalidArgumentError,
    RequirementError,
    argument,
)
from simprune_deploy.common.transforms import CROP_MODES, INTERPOLATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What timm takes where a model does not say."""

PILLOW_FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "PPM", "ICO", "QOI",
)  # fmt: skip
"""What a file may hold, whatever its name says: what Pillow decodes itself and knows by its first
bytes. Not PostScript, for which Pillow runs a program."""

FILE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""What a picture file is converted to for an input of so many channels: timm's `input_img_mode`."""

SAMPLE_SOURCE = "photographs that come with simprune-deploy"
CHANNELS_REPEATED = "their red, green and blue repeated: good for comparing runtimes only"
GIVE_A_FOLDER = f"give a folder of pictures with {argument('images')}"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input of the model.

    Args:
        channels: Of the input. 1 takes grey pictures, 3 RGB, 2 grey and 4 RGB with an alpha
            channel, as files have them; more come from arrays only.
        height: Of the input, in pixels.
        width: Of the input, in pixels.
        mean: Subtracted from pixels in [0, 1], one per channel.
        std: Divided by after that, one per channel.
        interpolation: timm's name for how pictures are scaled. Default "bicubic".
        crop_pct: The share of the scaled picture's side that the crop keeps. Default 0.875.
        crop_mode: "center" (the default), "squash" or "border".

    Raises:
        SimpruneError: a value is out of its range.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("channels", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(
                    f"input {name} {value} must be a whole number, 1 or more"
                )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise InvalidArgumentError(
                    f"{name} has {len(values)} values for {self.channels} channels: give one each"
                )
            if not all(math.isfinite(value) for value in values):
                raise InvalidArgumentError(f"{name} {values} must be finite numbers")
        if min(self.std) <= 0:
            raise InvalidArgumentError(f"std {self.std} must be above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise InvalidArgumentError(
                f"interpolation {self.interpolation!r} is unknown: "
                f"use one of {', '.join(INTERPOLATIONS)}"
            )
        if not 0.1 <= self.crop_pct <= 10:
            raise InvalidArgumentError(
                f"crop_pct {self.crop_pct} is outside [0.1, 10]: 1 keeps all"
            )
        if self.crop_mode not in CROP_MODES:
            raise InvalidArgumentError(
                f"crop_mode {self.crop_mode!r} is unknown: use one of {', '.join(CROP_MODES)}"
            )

    @classmethod
    def of_model(cls, model: Any) -> Preprocessing:
        """Return what a timm model (or a pruned one) wants, from its `pretrained_cfg`."""
        from timm.data import resolve_model_data_config

        vit = getattr(model, "vit", model)
        config = resolve_model_data_config(vit)
        channels = int(getattr(vit, "in_chans", None) or config["input_size"][0])
        size = getattr(getattr(vit, "patch_embed", None), "img_size", None)
        height, width = (int(side) for side in size or config["input_size"][1:])
        known = config["interpolation"] in INTERPOLATIONS
        return cls(
            channels=channels,
            height=height,
            width=width,
            mean=fit_to_channels("mean", config["mean"], channels),
            std=fit_to_channels("std", config["std"], channels),
            # "random", which some training recipes leave behind, would make results differ
            interpolation=config["interpolation"] if known else "bicubic",
            crop_pct=float(config["crop_pct"]),
            crop_mode=config["crop_mode"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        values = dataclasses.asdict(self)
        return {**values, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Build it from :meth:`to_dict`'s result; unknown keys are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ArtifactError(
                f"the preprocessing has unknown keys {', '.join(sorted(unknown))}: "
                "it was written by a newer version, update simprune-deploy"
            )
        try:
            mean = tuple(float(value) for value in values["mean"])
            std = tuple(float(value) for value in values["std"])
            return cls(**{**values, "mean": mean, "std": std})
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the preprocessing is damaged: {error!r}") from error

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32[..., C, H, W] in [0, 1] as the model wants it: (pixels - mean) / std."""
        mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels.astype(np.float32, copy=False) - mean) / std


def fit_to_channels(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel.

    Args:
        name: "mean" or "std", for the message.
        values: One value per channel, as they are; one value, for all channels; or three, of RGB,
            for an input of another count: their average, for every channel.
        channels: Of the input.

    Raises:
        SimpruneError: there are another number of values.
    """
    numbers = tuple(float(value) for value in values)
    if len(numbers) == channels:
        return numbers
    if len(numbers) not in (1, 3):
        raise InvalidArgumentError(
            f"{name} has {len(numbers)} values, and the model takes {channels} channels: give one "
            "value for each channel"
        )
    return (numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers),) * channels


def as_uint8_nhwc(pixels: np.ndarray) -> np.ndarray:
    """Return float32[..., C, H, W] in [0, 1] as a camera gives it, uint8[..., H, W, C].

    For pixels that were 8 bits wide before they were divided by 255 it is what they were.
    """
    levels = np.rint(pixels * np.float32(255)).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Pictures ready for a model.

    Attributes:
        pixels: float32[n, C, H, W], normalized, or in [0, 1] if that was asked for; or
            uint8[n, H, W, C].
        names: One per picture: its path inside the folder.
        skipped: (path, reason) of each file that could not be used.
        source: Where they come from, in words.
    """

    pixels: np.ndarray
    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    source: str


def sample_images(preprocessing: Preprocessing, count: int = 8, normalize: bool = True) -> ImageSet:
    """Load photographs that come with the package (``sample_images/LICENSES.md`` names them).

    For a model of 2 channels, or of more than 3, red, green and blue are repeated in turn, and
    `source` says so: such numbers are good for comparing runtimes, and mean nothing to the model.

    Args:
        preprocessing: What the model wants.
        count: How many, from 1 to 8. Default 8.
        normalize: Subtract mean and divide by std; otherwise pixels stay in [0, 1]. Default True.

    Raises:
        SimpruneError: there are fewer than `count`.
    """
    folder = Path(__file__).parents[1] / "sample_images"
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        raise RequirementError(
            f"{folder} is missing: reinstall simprune-deploy, or {GIVE_A_FOLDER}"
        )
    if not 1 <= count <= len(paths):
        raise InvalidArgumentError(
            f"{count} images: {len(paths)} photographs come with simprune-deploy, "
            f"take 1 to {len(paths)} of them or {GIVE_A_FOLDER}"
        )
    channels = preprocessing.channels
    repeated = channels not in (1, 3)
    to_pixels = PictureLoader(_of_rgb(preprocessing) if repeated else preprocessing)
    pixels = np.stack([to_pixels(path) for path in paths[:count]])
    if repeated:
        pixels = pixels[:, np.arange(channels) % 3]
    return ImageSet(
        pixels=preprocessing.normalize(pixels) if normalize else pixels,
        names=tuple(path.name for path in paths[:count]),
        skipped=(),
        source=f"{count} {SAMPLE_SOURCE}{f', {CHANNELS_REPEATED}' if repeated else ''}",
    )


def _of_rgb(preprocessing: Preprocessing) -> Preprocessing:
    """Return the same for RGB pictures."""
    # the mean is the color of the border in crop mode "border", and nothing else here
    mean = tuple(itertools.islice(itertools.cycle(preprocessing.mean), 3))
    return dataclasses.replace(preprocessing, channels=3, mean=mean, std=(1.0, 1.0, 1.0))


def load_as_taken(
    images: str | os.PathLike[str] | None,
    preprocessing: Preprocessing,
    *,
    graph_normalizes: bool,
    uint8: bool,
    limit: int = 64,
) -> ImageSet:
    """Load pictures as a graph takes them.

    Args:
        images: Folder of pictures. None: the photographs that come along.
        preprocessing: What the model wants.
        graph_normalizes: Whether mean and std are in the graph.
        uint8: Whether it takes uint8[B, H, W, C].
        limit: The most pictures of a folder. Default 64.

    Raises:
        SimpruneError: as :func:`load_folder`.
    """
    normalize = not graph_normalizes
    if images is None:
        found = sample_images(preprocessing, normalize=normalize)
    else:
        found = load_folder(images, preprocessing, limit, normalize)
    return dataclasses.replace(found, pixels=as_uint8_nhwc(found.pixels)) if uint8 else found


def load_folder(
    folder: str | os.PathLike[str],
    preprocessing: Preprocessing,
    limit: int = 64,
    normalize: bool = True,
) -> ImageSet:
    """Load the pictures of a folder and its subfolders, in the order of their paths.

    If there are more than `limit`, the ones taken are spread evenly over that order, so that a
    folder with a subfolder per class gives pictures of all of them.

    Args:
        folder: Where to look. Hidden files are left out.
        preprocessing: What the model wants.
        limit: The most pictures to load. Default 64.
        normalize: Subtract mean and divide by std; otherwise pixels stay in [0, 1]. Default True.

    Raises:
        SimpruneError: there is no such folder, or no picture in it that can be read.
    """
    root = Path(folder)
    if limit < 1:
        raise InvalidArgumentError(f"a limit of {limit} images must be 1 or more")
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}: {GIVE_A_FOLDER}")
    found, skipped = find_pictures(root)
    if not found:
        why = f" ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise DataError(f"{root} holds no pictures{why}: {GIVE_A_FOLDER}")

    to_pixels = PictureLoader(preprocessing)
    loaded: dict[int, np.ndarray] = {}
    for position in _spread(len(found), limit):
        if len(loaded) == limit:
            break
        try:
            loaded[position] = to_pixels(found[position])
        except UnusableImageError as error:
            skipped.append((printable(found[position], root), str(error)))
    if not loaded:
        name, why = next(pair for pair in skipped if pair[0] == printable(found[0], root))
        raise DataError(
            f"none of the {len(found)} pictures in {root} can be used ({name}: {why}): "
            f"{GIVE_A_FOLDER}"
        )
    taken = sorted(loaded)
    pixels = np.stack([loaded[position] for position in taken])
    part = f"{len(taken)} of {len(found):,} pictures in " if len(taken) < len(found) else ""
    return ImageSet(
        pixels=preprocessing.normalize(pixels) if normalize else pixels,
        names=tuple(printable(found[position], root) for position in taken),
        skipped=tuple(sorted(skipped)),
        source=f"{part}folder {printable(root)}",
    )


class UnusableImageError(Exception):
    """A file that cannot become an input; the message is the reason, in a few words."""


def find_pictures(root: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the picture files below `root` by name, and the folders that could not be listed."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: list[Path] = []
    refused: list[tuple[str, str]] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        refused.append((printable(Path(error.filename), root), error.strerror or str(error)))

    # data sets link to their class folders, and a link may lead in a circle
    for place, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(place, name)
            for name in files
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found), refused


def _spread(total: int, wanted: int) -> Iterator[int]:
    """Yield `wanted` positions spread evenly over `total`, then the others, in case some fail."""
    first = dict.fromkeys(i * total // wanted for i in range(wanted)) if wanted < total else {}
    yield from first
    yield from (position for position in range(total) if position not in first)


def printable(path: Path, root: Path | None = None) -> str:
    """Return a path as text that any report can hold (a file name need not be valid UTF-8)."""
    if root is not None and path.is_relative_to(root):
        path = path.relative_to(root)
    return path.as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


class PictureLoader:
    """Turns a picture into float32[C, H, W] in [0, 1], through timm's evaluation transforms.

    A file is converted as timm's own loading does, by Pillow: to grey for 1 channel, to RGB for 3,
    where an alpha channel is dropped, and to grey or RGB with alpha for 2 and 4. No channel is made
    up: a file without alpha has no 2 or 4 channels.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.mode = FILE_MODES.get(preprocessing.channels)
        # of a band each: in an array a channel is a channel, and none of them is alpha, by which
        # Pillow would weigh the others when it scales
        self._by_band = [self._transform((value,)) for value in preprocessing.mean]
        self._of_picture = self._transform(preprocessing.mean) if self.mode else None

    def _transform(self, mean: tuple[float, ...]) -> Callable[[Image.Image], Any]:
        """Return timm's transform of pictures with so many bands as `mean` has."""
        from timm.data import create_transform

        wanted = self.preprocessing
        transform: Callable[[Image.Image], Any] = create_transform(
            input_size=(len(mean), wanted.height, wanted.width),
            is_training=False,
            interpolation=wanted.interpolation,
            mean=mean,
            crop_pct=wanted.crop_pct,
            crop_mode=wanted.crop_mode,
            normalize=False,
        )
        return transform

    def __call__(self, source: Path | bytes) -> np.ndarray:
        """Load a file, or the contents of one.

        Raises:
            UnusableImageError: it cannot be read, has not the model's channels, holds more than
                8 bits do, or is too large or too thin to be scaled.
        """
        return self._to_pixels(self._open(source))

    def of_levels(self, levels: np.ndarray) -> np.ndarray:
        """Take uint8[H, W] (grey) or uint8[H, W, C] in place of a file.

        With the model's C channels they are fed as they are; grey ones become RGB and RGB ones grey
        as files do.

        Raises:
            UnusableImageError: it has other channels, or is too thin to be scaled.
        """
        from PIL import Image

        levels = levels[..., None] if levels.ndim == 2 else levels
        height, width, count = levels.shape
        channels = self.preprocessing.channels
        self._check_size(width, height)
        if not fits_channels(count, channels):
            raise UnusableImageError(f"{count} channels, and the model takes {channels}")
        if count == channels:
            bands = [np.ascontiguousarray(levels[..., band]) for band in range(count)]
            pairs = zip(self._by_band, bands, strict=True)
            found = [transform(Image.fromarray(band)).numpy() for transform, band in pairs]
            return _unit(np.concatenate(found))
        picture = Image.fromarray(np.ascontiguousarray(levels[..., 0] if count == 1 else levels))
        return self._to_pixels(picture.convert(self.mode))

    def _to_pixels(self, picture: Image.Image) -> np.ndarray:
        assert self._of_picture is not None
        return _unit(self._of_picture(picture).numpy())

    def _open(self, source: Path | bytes) -> Image.Image:
        """Decode a picture and convert it; like timm, without turning it by its EXIF tag."""
        from PIL import Image, UnidentifiedImageError

        if self.mode is None:
            raise UnusableImageError(
                f"a picture file has no {self.preprocessing.channels} channels, which the model "
                "takes: an .npz file can"
            )
        try:
            if isinstance(source, Path):
                if not source.is_file():
                    raise UnusableImageError("not a file")
                empty = not source.stat().st_size
            else:
                empty = not source
            if empty:
                raise UnusableImageError("empty file")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of many pixels: Pillow has an error for too many
                file = io.BytesIO(source) if isinstance(source, bytes) else source
                with Image.open(file, formats=_formats()) as picture:
                    self._check_size(*picture.size)
                    return _converted(picture, self.mode)
        except UnusableImageError:
            raise
        except UnidentifiedImageError:
            raise UnusableImageError("not a picture") from None
        except Image.DecompressionBombError:
            raise UnusableImageError("more pixels than Pillow decodes safely") from None
        # Pillow's decoders raise whatever a damaged file makes them stumble over
        except Exception as error:
            text = str(error) or type(error).__name__
            raise UnusableImageError(" ".join(text.split())) from error

    def _check_size(self, width: int, height: int) -> None:
        """Refuse what timm would scale to a huge picture: its short side becomes the input's."""
        from PIL import Image

        if not width or not height:
            raise UnusableImageError("no pixels")
        wanted = self.preprocessing
        sides = wanted.height / wanted.crop_pct, wanted.width / wanted.crop_pct
        factor = max(sides[0] / height, sides[1] / width)
        most = Image.MAX_IMAGE_PIXELS or math.inf
        if wanted.crop_mode == "center" and width * height * factor**2 > most:
            raise UnusableImageError(f"{width} x {height} is too thin to be scaled")


def fits_channels(count: int, channels: int) -> bool:
    """Whether pictures of `count` channels become inputs of `channels`: as they are, or grey ones
    as RGB and RGB ones as grey."""
    return count == channels or {count, channels} == {1, 3}


def _unit(levels: np.ndarray) -> np.ndarray:
    """Return uint8 levels as float32 in [0, 1]."""
    return levels.astype(np.float32) / np.float32(255)


def _formats() -> list[str]:
    """Return the formats that the installed Pillow knows; it stumbles over others' names."""
    from PIL import Image

    Image.init()
    return [name for name in PILLOW_FORMATS if name in Image.OPEN]


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    """Convert a picture by Pillow, and refuse it where that would make up or lose what it holds."""
    has_alpha = {"A", "a"} & set(picture.getbands()) or "transparency" in picture.info
    if mode in ("LA", "RGBA") and not has_alpha:
        raise UnusableImageError(
            f"{picture.mode} without an alpha channel, and the model takes {len(mode)} channels "
            f"({mode})"
        )
    if picture.mode.startswith(("I", "F")):
        levels = np.asarray(picture)
        if not np.array_equal(levels, np.asarray(picture.convert("L"))):
            raise UnusableImageError(
                f"grey levels from {levels.min():g} to {levels.max():g} ({picture.mode}), which 8 "
                "bits do not hold (Pillow, and timm through it, cuts them off at 255): save it in "
                "8 bits, scaled as in training"
            )
    return picture.convert(mode)
