"""Make the eight photographs that come with simprune-deploy, from scikit-image's data.

Only pictures that scikit-image ships inside its wheel and documents as CC0 or released into the
public domain are taken; each is scaled to a short side of 288 pixels and saved as JPEG. Writes
the pictures and ``LICENSES.md``::

    pip install scikit-image==0.26.0
    python tools/make_sample_images.py simprune_deploy/sample_images
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from importlib import metadata
from pathlib import Path

from PIL import Image

SHORT_SIDE = 288
QUALITIES = (85, 80, 75, 70, 65, 60, 55, 50)
MOST_BYTES = 40_000


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One file of scikit-image's data and whom to thank for it."""

    name: str
    file: str
    subject: str
    author: str
    source: str
    license: str


PHOTOGRAPHS = (
    Photograph(
        name="astronaut",
        file="astronaut.png",
        subject="the astronaut Eileen Collins",
        author="NASA",
        source="NASA Great Images database, https://flic.kr/p/r9qvLn",
        license="public domain (no known copyright restrictions)",
    ),
    Photograph(
        name="camera",
        file="camera.png",
        subject="a photographer at work, in gray",
        author="Lav Varshney",
        source="scikit-image",
        license="CC0",
    ),
    Photograph(
        name="cat",
        file="chelsea.png",
        subject="Chelsea the cat",
        author="Stefan van der Walt",
        source="scikit-image",
        license="CC0",
    ),
    Photograph(
        name="coffee",
        file="coffee.png",
        subject="a coffee cup, courtesy of Pikolo Espresso Bar",
        author="Rachel Michetti",
        source="scikit-image",
        license="CC0",
    ),
    Photograph(
        name="galaxies",
        file="hubble_deep_field.jpg",
        subject="the Hubble eXtreme Deep Field",
        author="NASA",
        source="http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        license="public domain (NASA's media guidelines)",
    ),
    Photograph(
        name="gravel",
        file="gravel.png",
        subject="gravel, in gray",
        author="CC0 Textures",
        source="https://cc0textures.com/view.php?tex=Gravel04",
        license="CC0",
    ),
    Photograph(
        name="retina",
        file="retina.jpg",
        subject="fundus photograph of a normal left eye",
        author="Mikael Häggström",
        source=("https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg"),
        license="CC0 1.0",
    ),
    Photograph(
        name="rocket",
        file="rocket.jpg",
        subject="launch of DSCOVR on a Falcon 9",
        author="SpaceX",
        source="https://www.flickr.com/photos/spacexphotos/16511594820/",
        license="public domain (released by SpaceX in March 2015)",
    ),
)

HEADER = """\
# The sample photographs

Scaled copies (short side {short_side} pixels, JPEG, metadata removed) of photographs in
scikit-image's data. The licenses are the ones its documentation states for each
(`skimage/data/_fetchers.py`, version {version}). Made by `tools/make_sample_images.py`.

| File | Shows | Author | License | Source |
|---|---|---|---|---|
"""


def scale(picture: Image.Image) -> Image.Image:
    """Scale so that the short side is SHORT_SIDE; gray pictures stay gray."""
    factor = SHORT_SIDE / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    mode = "L" if picture.mode == "L" else "RGB"
    return picture.convert(mode).resize(size, Image.Resampling.LANCZOS)


def encode(picture: Image.Image) -> bytes:
    """Return a JPEG at the best of QUALITIES that stays under MOST_BYTES."""
    for quality in QUALITIES:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() < MOST_BYTES:
            break
    return buffer.getvalue()


def main() -> None:
    import skimage

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="folder to write to")
    output: Path = parser.parse_args().output
    data = Path(skimage.__file__).parent / "data"

    output.mkdir(parents=True, exist_ok=True)
    table = HEADER.format(short_side=SHORT_SIDE, version=metadata.version("scikit-image"))
    for photograph in PHOTOGRAPHS:
        with Image.open(data / photograph.file) as picture:
            encoded = encode(scale(picture))
        (output / f"{photograph.name}.jpg").write_bytes(encoded)
        table += (
            f"| {photograph.name}.jpg | {photograph.subject} | {photograph.author} "
            f"| {photograph.license} | {photograph.source} (`{photograph.file}`) |\n"
        )
        print(f"{photograph.name}.jpg: {len(encoded):,} bytes")
    (output / "LICENSES.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
