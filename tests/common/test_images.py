"""Pictures in, arrays out: the same as timm's loader gives, and no bad file stops a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from places import ROOT
from timm.data import create_transform, resolve_model_data_config

from simprune_deploy.common.errors import SimpruneError
from simprune_deploy.common.images import (
    ImageSet,
    PictureLoader,
    Preprocessing,
    UnusableImageError,
    fit_to_channels,
    load_folder,
    sample_images,
)

SMALL = Preprocessing(3, 32, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
GREY = Preprocessing(1, 28, 28, mean=(0.286,), std=(0.353,), crop_pct=1.0)
SAMPLES = ROOT / "simprune_deploy" / "sample_images"


def save_noise(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)
    return path


def tiny_vit(cfg: dict[str, Any] | None = None, **args: Any) -> Any:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", **{"embed_dim": 12, "depth": 2, "num_heads": 3, **args}
    )
    model.pretrained_cfg = {**model.pretrained_cfg, **(cfg or {})}
    return model


def test_import_needs_numpy_only() -> None:
    code = (
        "import sys, simprune_deploy.common.images;"
        "print(*{'torch', 'timm', 'PIL', 'torchvision'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({}, (3, 224, 224)),
        ({"img_size": 64}, (3, 64, 64)),
        ({"img_size": (32, 48)}, (3, 32, 48)),
        ({"img_size": 28, "patch_size": 4, "in_chans": 1}, (1, 28, 28)),
        ({"img_size": 32, "in_chans": 5}, (5, 32, 32)),
    ],
)
def test_of_model_follows_the_model(args: dict[str, Any], size: tuple[int, int, int]) -> None:
    found = Preprocessing.of_model(tiny_vit(**args))
    assert (found.channels, found.height, found.width) == size
    assert len(found.mean) == len(found.std) == size[0]
    pixels = sample_images(found, count=1).pixels
    assert pixels.shape == (1, *size)


def test_of_model_reads_a_pruned_model() -> None:
    from simprune_deploy.pruning.model import prune

    model = tiny_vit(img_size=64)
    assert Preprocessing.of_model(prune(model)) == Preprocessing.of_model(model)


def test_of_model_replaces_random_interpolation() -> None:
    model = tiny_vit({"interpolation": "random"}, img_size=32)
    assert Preprocessing.of_model(model).interpolation == "bicubic"


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_pixels_equal_timms_own(crop_mode: str) -> None:
    model = tiny_vit({"crop_mode": crop_mode}, img_size=64)
    config = resolve_model_data_config(model)
    transform = create_transform(**{**config, "input_size": (3, 64, 64)}, is_training=False)
    found = sample_images(Preprocessing.of_model(model), count=3)
    for pixels, name in zip(found.pixels, found.names, strict=True):
        with Image.open(SAMPLES / name) as picture:
            expected = transform(picture.convert("RGB")).numpy()
        np.testing.assert_array_equal(pixels, expected)


def test_json_round_trip() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mystery": 1}, "unknown keys mystery"),
        ({"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ({"mean": None}, "damaged"),
        ({"mean": [float("nan")] * 3}, "finite"),
        ({"std": [0, 1, 1]}, "above 0"),
        ({"height": 0}, "height 0"),
        ({"width": 2.5}, "width 2.5"),
        ({"interpolation": "magic"}, "magic"),
        ({"crop_pct": 0}, "crop_pct 0"),
        ({"crop_mode": "none"}, "crop_mode"),
    ],
)
def test_bad_preprocessing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SimpruneError, match=message) as caught:
        Preprocessing.from_dict({**SMALL.to_dict(), **change})
    assert "\n" not in str(caught.value)


def test_fit_to_channels() -> None:
    assert fit_to_channels("mean", (1, 2, 3), 3) == (1, 2, 3)
    assert fit_to_channels("mean", (1, 2, 3, 4), 4) == (1, 2, 3, 4)
    assert fit_to_channels("mean", (1, 2, 3), 1) == (2,)
    assert fit_to_channels("mean", (1, 2, 3), 4) == (2, 2, 2, 2)
    assert fit_to_channels("mean", (0.3,) * 3, 5) == (0.3,) * 5
    assert fit_to_channels("mean", (0.5,), 3) == (0.5, 0.5, 0.5)
    for values, channels in (((1, 2), 4), ((1, 2, 3, 4), 3), ((), 3)):
        with pytest.raises(SimpruneError, match=rf"std has {len(values)} values.*{channels} chan"):
            fit_to_channels("std", values, channels)


def test_samples_are_eight_small_photographs() -> None:
    found = sample_images(SMALL, normalize=False)
    assert found.pixels.shape == (8, 3, 32, 32)
    assert found.pixels.dtype == np.float32
    assert found.pixels.min() >= 0
    assert found.pixels.max() <= 1
    assert found.source == "8 photographs that come with simprune-deploy"
    assert found.skipped == ()
    licences = (SAMPLES / "LICENSES.md").read_text(encoding="utf-8")
    for name in found.names:
        assert f"| {name} |" in licences
        assert (SAMPLES / name).stat().st_size < 40_000


@pytest.mark.parametrize("count", [0, 9])
def test_too_many_samples_are_refused(count: int) -> None:
    with pytest.raises(SimpruneError, match="with images"):
        sample_images(SMALL, count=count)


@pytest.mark.parametrize("preprocessing", [SMALL, GREY])
def test_normalize_is_what_normalize_does(preprocessing: Preprocessing) -> None:
    raw = sample_images(preprocessing, count=2, normalize=False).pixels
    ready = sample_images(preprocessing, count=2).pixels
    np.testing.assert_array_equal(preprocessing.normalize(raw), ready)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_samples_for_other_channel_counts_say_that_rgb_is_repeated(channels: int) -> None:
    values = (0.5,) * channels
    found = sample_images(Preprocessing(channels, 32, 32, values, values), 2, normalize=False)
    rgb = sample_images(SMALL, count=2, normalize=False)
    np.testing.assert_array_equal(found.pixels, rgb.pixels[:, [0, 1, 2, 0, 1][:channels]])
    assert "red, green and blue repeated: good for comparing runtimes only" in found.source
    assert "repeated" not in rgb.source
    assert "repeated" not in sample_images(GREY, count=1).source


def timms(path: Path, mode: str, wanted: Preprocessing) -> np.ndarray:
    """What timm's own data set gives for the file of a class folder, without normalization."""
    transform = create_transform(
        (wanted.channels, wanted.height, wanted.width),
        mean=wanted.mean,
        std=wanted.std,
        interpolation=wanted.interpolation,
        crop_pct=wanted.crop_pct,
        crop_mode=wanted.crop_mode,
        normalize=False,
    )
    data = timm.data.ImageDataset(
        str(path.parent), input_img_mode=mode, transform=transform, input_key=path.suffix
    )
    names = data.filenames(basename=True)
    levels = data[names.index(path.name)][0]
    pixels: np.ndarray = levels.numpy().astype(np.float32) / np.float32(255)
    return pixels


MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def of_channels(channels: int, **changes: Any) -> Preprocessing:
    values = tuple(np.linspace(0.2, 0.6, channels).tolist())
    return Preprocessing(channels, 32, 32, mean=values, std=values, **changes)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_pictures_with_alpha_are_fed_as_timm_feeds_them(
    tmp_path: Path, channels: int, mode: str, crop_mode: str
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 44, 4), dtype=np.uint8)
    levels[:20, :20] = levels[0, 0]
    picture = Image.fromarray(levels)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.png"
    if mode == "P":
        picture.quantize(32).save(path)
    elif mode == "tRNS":
        picture.convert("RGB").save(path, transparency=tuple(levels[0, 0, :3].tolist()))
    else:
        picture.convert(mode).save(path)
    wanted = of_channels(channels, crop_mode=crop_mode)
    found = load_folder(tmp_path, wanted, normalize=False).pixels[0]
    np.testing.assert_array_equal(found, timms(path, MODES[channels], wanted))
    if channels in (2, 4):
        assert np.ptp(found[-1]) > 0.1
        assert not np.array_equal(found[-1], found[0])


def test_channels_that_a_picture_lacks_are_not_made_up(tmp_path: Path) -> None:
    save_noise(tmp_path / "rgb.png")
    Image.new("CMYK", (40, 40)).save(tmp_path / "ink.jpg")
    Image.new("L", (40, 40)).save(tmp_path / "grey.png")
    for channels in (2, 4):
        with pytest.raises(SimpruneError, match=f"L without an alpha channel.* {channels} chan"):
            load_folder(tmp_path, of_channels(channels))
    reasons = {"grey.png": "L", "ink.jpg": "CMYK", "rgb.png": "RGB"}
    Image.new("RGBA", (40, 40)).save(tmp_path / "rgba.png")
    found = load_folder(tmp_path, of_channels(4))
    assert found.names == ("rgba.png",)
    for name, mode in reasons.items():
        assert dict(found.skipped)[name].startswith(f"{mode} without an alpha channel")
    with pytest.raises(SimpruneError, match=r"no 5 channels, which the model takes: an \.npz"):
        load_folder(tmp_path, of_channels(5))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays_are_fed_channel_by_channel(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (44, 40, channels), dtype=np.uint8)
    levels[:, :20, -1] = 0  # where a fourth channel taken as alpha would blacken the others
    found = PictureLoader(of_channels(channels)).of_levels(levels)
    transform = create_transform((1, 32, 32), interpolation="bicubic", normalize=False)
    bands = [transform(Image.fromarray(levels[..., band])).numpy() for band in range(channels)]
    np.testing.assert_array_equal(found, np.concatenate(bands).astype(np.float32) / 255)


def test_arrays_of_other_channels_are_refused_and_grey_and_rgb_converted() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for channels in (2, 4, 5):
        with pytest.raises(UnusableImageError, match=f"3 channels, and the model takes {channels}"):
            PictureLoader(of_channels(channels)).of_levels(rgb)
    whole = of_channels(1, crop_pct=1.0), of_channels(3, crop_pct=1.0)
    grey = PictureLoader(whole[0]).of_levels(rgb)
    np.testing.assert_array_equal(
        grey[0], np.asarray(Image.fromarray(rgb).convert("L")).astype(np.float32) / 255
    )
    for levels in (rgb[..., 0], rgb[..., :1]):
        found = PictureLoader(whole[1]).of_levels(levels)
        np.testing.assert_array_equal(found, np.stack([rgb[..., 0]] * 3).astype(np.float32) / 255)


WIDE: dict[str, Any] = {
    "16-bit.png": np.uint16,
    "16-bit.tiff": np.uint16,
    "big-endian.tiff": ">u2",
    "32-bit.tiff": np.int32,
    "float.tiff": np.float32,
}


def save_wide(folder: Path, name: str, levels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(WIDE[name])).save(folder / name)
    with Image.open(folder / name) as saved:
        assert saved.mode[0] in "IF"
    return folder / name


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("preprocessing", [SMALL, GREY])
def test_wide_grey_pictures_are_timms_if_8_bits_hold_them(
    tmp_path: Path, name: str, preprocessing: Preprocessing
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 40))
    path = save_wide(tmp_path / "a", name, levels)
    found = load_folder(tmp_path, preprocessing, normalize=False).pixels[0]
    np.testing.assert_array_equal(found, timms(path, MODES[preprocessing.channels], preprocessing))
    assert found.std() > 0.1


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("highest", [4095, 256])
def test_wide_grey_pictures_that_timm_would_cut_off_are_refused(
    tmp_path: Path, name: str, highest: int
) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (40, 40))
    levels[3, 5] = highest
    path = save_wide(tmp_path / "a", name, levels)
    assert timms(path, "L", of_channels(1)).max() == 1
    with pytest.raises(SimpruneError, match=rf"grey levels from 0 to {highest} .*cuts them off"):
        load_folder(tmp_path, SMALL)


@pytest.mark.parametrize("low", [0.5, -1.0, np.nan])
def test_grey_levels_that_are_no_whole_numbers_are_refused(tmp_path: Path, low: float) -> None:
    levels = np.full((40, 40), 7, np.float32)
    levels[0, 0] = low
    save_wide(tmp_path, "float.tiff", levels)
    with pytest.raises(SimpruneError, match="which 8 bits do not hold"):
        load_folder(tmp_path, SMALL)


def test_folder_is_searched_below_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.JPG", "c.webp", ".hidden/x.png", "a/._1.jpg", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            path.write_text("no picture")
        else:
            save_noise(path)
    found = load_folder(tmp_path, SMALL)
    assert found.names == ("a/1.JPG", "b/2.png", "c.webp")
    assert found.skipped == ()
    assert found.source == f"folder {tmp_path}"
    assert found.pixels.shape == (3, 3, 32, 32)


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    save_noise(tmp_path / "real.png").rename(tmp_path / "real.jpg")
    assert load_folder(tmp_path, SMALL).names == ("real.jpg",)


@pytest.mark.parametrize("kind", ["GIF", "JPEG2000", "AVIF", "WEBP", "BMP", "MPO"])
def test_other_formats_under_a_jpg_name_are_read_as_timm_reads_them(
    tmp_path: Path, kind: str
) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"the installed Pillow does not write {kind}")
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)) for _ in range(2)]
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.jpg"
    several = {"save_all": True, "append_images": frames[1:]}
    frames[0].save(path, kind, **(several if kind in ("GIF", "WEBP", "AVIF", "MPO") else {}))
    found = load_folder(tmp_path, SMALL, normalize=False).pixels[0]
    np.testing.assert_array_equal(found, timms(path, "RGB", SMALL))


def test_postscript_is_never_run(tmp_path: Path) -> None:
    save_noise(tmp_path / "good.png")
    (tmp_path / "evil.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    assert load_folder(tmp_path, SMALL).skipped == (("evil.png", "not a picture"),)


def test_unusable_files_are_skipped_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    save_noise(tmp_path / "good.png")
    whole = save_noise(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("RGB", (400, 400)).save(tmp_path / "warned.png")
    Image.new("RGB", (800, 800)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1, 300)).save(tmp_path / "thin.png")
    found = load_folder(tmp_path, SMALL)
    # as timm: Pillow decodes with a warning above its limit, and not above twice that
    assert found.names == ("good.png", "warned.png")
    reasons = dict(found.skipped)
    assert set(reasons) == {
        "cut.jpg", "empty.png", "text.png", "link.png", "bomb.png", "thin.png",
    }  # fmt: skip
    assert "truncated" in reasons["cut.jpg"]
    assert reasons["empty.png"] == "empty file"
    assert reasons["text.png"] == "not a picture"
    assert reasons["link.png"] == "not a file"
    assert reasons["bomb.png"] == "more pixels than Pillow decodes safely"
    assert "thin" in reasons["thin.png"]


def test_damaged_bytes_never_stop_a_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    save_noise(tmp_path / "good.png")
    for suffix in ("png", "jpg", "bmp", "tiff", "webp", "ppm"):
        whole = save_noise(tmp_path / f"whole.{suffix}").read_bytes()
        for i in range(5):
            damaged = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 200), 8):
                damaged[position] = rng.integers(256)
            (tmp_path / f"damaged{i}.{suffix}").write_bytes(damaged)
    found = load_folder(tmp_path, SMALL)
    assert len(found.names) + len(found.skipped) == 37
    assert "good.png" in found.names
    assert np.isfinite(found.pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
@pytest.mark.parametrize("preprocessing", [SMALL, GREY])
def test_every_color_mode_is_read(tmp_path: Path, mode: str, preprocessing: Preprocessing) -> None:
    grey = np.linspace(0, 255, 40 * 40).reshape(40, 40)
    picture = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    picture.save(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    pixels = load_folder(tmp_path, preprocessing, normalize=False).pixels
    assert pixels.shape[1] == preprocessing.channels
    assert pixels.mean() == pytest.approx(0.5, abs=0.05)
    assert pixels[..., -1, :].mean() > pixels[..., 0, :].mean()


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (300, 7), (7, 300)])
def test_odd_sizes_fit(tmp_path: Path, size: tuple[int, int]) -> None:
    save_noise(tmp_path / "x.png", size)
    assert load_folder(tmp_path, SMALL).pixels.shape == (1, 3, 32, 32)


def test_limit_spreads_over_the_folder(tmp_path: Path) -> None:
    for name in range(10):
        save_noise(tmp_path / f"{name}.png", seed=name)
    found = load_folder(tmp_path, SMALL, limit=5)
    assert found.names == ("0.png", "2.png", "4.png", "6.png", "8.png")
    assert found.source == f"5 of 10 pictures in folder {tmp_path}"


def test_limit_is_filled_from_the_rest(tmp_path: Path) -> None:
    for name in range(6):
        save_noise(tmp_path / f"{name}.png", seed=name)
    (tmp_path / "2.png").write_bytes(b"")
    found = load_folder(tmp_path, SMALL, limit=3)
    assert found.names == ("0.png", "1.png", "4.png")
    assert found.skipped == (("2.png", "empty file"),)


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    save_noise(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert load_folder(tmp_path, SMALL).names == ("a/x.png",)


def test_names_that_are_not_utf8_stay_printable(tmp_path: Path) -> None:
    try:
        save_noise(tmp_path / "x.png").rename(tmp_path / "caf\udce9.png")
    except OSError:
        pytest.skip("the file system refuses such names")
    (name,) = load_folder(tmp_path, SMALL).names
    json.dumps(name).encode()
    assert name.encode()


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_text("no")
    for folder, message in (
        (tmp_path / "missing", "does not exist"),
        (bad / "x.png", "is not a folder"),
        (empty, "holds no pictures"),
        (bad, "none of the 1 pictures .*can be used .*x.png: not a picture"),
    ):
        with pytest.raises(SimpruneError, match=message) as caught:
            load_folder(folder, SMALL)
        assert "with images" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(SimpruneError, match="limit of 0"):
        load_folder(tmp_path, SMALL, limit=0)


def test_image_set_is_frozen() -> None:
    images = ImageSet(np.zeros((1, 3, 2, 2), np.float32), ("x",), (), "a test")
    with pytest.raises(AttributeError):
        images.source = "elsewhere"  # type: ignore[misc]
