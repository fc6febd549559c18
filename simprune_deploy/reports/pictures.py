"""Pictures of what was pruned, drawn with Pillow.

Every panel shows the image as the model sees it. A kept patch that stands for itself alone is
shown as it is; a cluster has a color: its pruned patches are tinted, its kept patch is framed and
carries the number of patches it stands for. A color belongs to a kept patch, so it stays the same
from layer to layer.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simprune_deploy.reports.clusters import Clusters

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

PANEL, SMALLEST_PATCH = 448, 16
"""About how many pixels wide a panel is, unless its patches would get too small to see."""

GAP, HEADER, CAPTION = 16, 40, 26
PAPER, INK, SOFT = (255, 255, 255), (31, 35, 40), (89, 99, 110)
TINT = 0.6
THUMB = 168
SHEET_COLUMNS = 4
MOST_LETTERS = 300
"""A file name can be longer than any page is wide."""


def panel_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a panel: whole pixels for every patch."""
    rows, columns = grid
    cell = max(SMALLEST_PATCH, round(PANEL / max(rows, columns)))
    return rows * cell, columns * cell


def color_of(head: int) -> tuple[int, int, int]:
    """Return the color of the cluster that a patch heads, always the same one."""
    # steps of the golden ratio: patches side by side, and those near to one another in the grid,
    # get hues far apart
    hue = head * 0.6180339887 % 1
    value, saturation = ((0.95, 0.85), (0.8, 0.65), (0.98, 0.55))[head % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def to_picture(pixels: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return float32[C, H, W] in [0, 1] as a color picture of the given height and width.

    Of 1 or 2 channels the first is shown in grey, of more the first three as RGB.
    """
    from PIL import Image

    channels = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    levels = (channels.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(levels))
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def draw_clusters(
    picture: Image.Image, clusters: Clusters, grid: tuple[int, int], marked: bool = True
) -> Image.Image:
    """Return a panel: the picture with its clusters, and unless it is `marked` no frames."""
    from PIL import Image, ImageDraw

    rows, columns = grid
    cell = picture.width // columns
    member = clusters.member.reshape(rows, columns)
    size_of = dict(zip(clusters.heads.tolist(), clusters.sizes.tolist(), strict=True))
    tint = np.asarray(picture).astype(np.float32)
    for position, head in enumerate(clusters.member.tolist()):
        if head != position:
            y, x = position // columns * cell, position % columns * cell
            block = tint[y : y + cell, x : x + cell]
            block += TINT * (np.array(color_of(head), np.float32) - block)
    panel = Image.fromarray(tint.round().astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    alone = np.vectorize(size_of.__getitem__)(member) == 1
    _draw_borders(draw, member, alone, cell)
    for head, size in size_of.items():
        if marked and size > 1:
            _draw_head(draw, head // columns * cell, head % columns * cell, cell, head, size)
    return panel


def _draw_borders(
    draw: ImageDraw.ImageDraw, member: np.ndarray, alone: np.ndarray, cell: int
) -> None:
    """Draw thin lines around the clusters, but none between patches that stand alone."""
    rows, columns = member.shape
    for row in range(rows):
        for column in range(columns):
            x, y, here = column * cell, row * cell, (row, column)
            for neighbour, end in (
                ((row, column - 1), (x, y + cell - 1)),
                ((row - 1, column), (x + cell - 1, y)),
            ):
                if min(neighbour) < 0 or member[here] == member[neighbour]:
                    continue
                if not (alone[here] and alone[neighbour]):
                    draw.line((x, y, *end), fill=PAPER)


def _draw_head(draw: ImageDraw.ImageDraw, y: int, x: int, cell: int, head: int, size: int) -> None:
    """Frame a kept patch in its color, with the number of patches it stands for."""
    frame = max(2, cell // 8)
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=INK, width=frame + 1)
    draw.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), outline=color_of(head), width=frame)
    text, font = str(size), _font(max(8, int(cell * 0.42)))
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    if right - left <= cell - 4 and bottom - top <= cell - 4:
        at = (x + (cell - (right - left)) / 2 - left, y + (cell - (bottom - top)) / 2 - top)
        draw.text(at, text, font=font, fill=PAPER, stroke_width=2, stroke_fill=INK)


def draw_sheet(
    picture: Image.Image, layers: Sequence[Clusters], grid: tuple[int, int], name: str, says: str
) -> Image.Image:
    """Return one image's page: the original, then a panel for each prune layer.

    Args:
        picture: As the model sees it, of :func:`panel_size`.
        layers: Its clusters.
        grid: Rows and columns of patches.
        name: What to call it.
        says: What the model says of it; may be empty.
    """
    from PIL import Image, ImageDraw

    panels = [picture, *(draw_clusters(picture, each, grid) for each in layers)]
    captions = ["as the model sees it", *(caption_of(each) for each in layers)]
    width = len(panels) * (picture.width + GAP) + GAP
    height = HEADER + picture.height + CAPTION + GAP
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    title = f"{name}   {says}" if says else name
    draw.text((GAP, 10), _fit(draw, title, width - 2 * GAP, 19), font=_font(19), fill=INK)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x = GAP + number * (picture.width + GAP)
        page.paste(panel, (x, HEADER))
        text = _fit(draw, caption, picture.width, 15)
        draw.text((x, HEADER + picture.height + 7), text, font=_font(15), fill=SOFT)
    return page


def caption_of(clusters: Clusters) -> str:
    """Return "before block 3: 97 of 196 patches kept (49%), largest group 31"."""
    kept, patches = len(clusters.heads), len(clusters.member)
    return (
        f"{clusters.where}: {kept} of {patches} patches kept ({kept / patches:.0%}), "
        f"largest group {clusters.sizes.max()}"
    )


def draw_contact_sheet(
    items: Sequence[tuple[str, Image.Image, Image.Image, Clusters]], title: str
) -> Image.Image:
    """Return small pictures of many images: each as it is, and after the last prune layer.

    Args:
        items: Name, picture, panel of the last layer, clusters of the last layer.
        title: What stands above.
    """
    from PIL import Image, ImageDraw

    columns = min(SHEET_COLUMNS, len(items))
    pair = 2 * THUMB + 4
    tall = max(round(THUMB * picture.height / picture.width) for _, picture, _, _ in items)
    step = tall + CAPTION + GAP
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * (pair + GAP) + GAP, HEADER + rows * step + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    text = _fit(draw, title, sheet.width - 2 * GAP, 17)
    draw.text((GAP, 10), text, font=_font(17), fill=INK)
    for number, (name, picture, panel, clusters) in enumerate(items):
        x = GAP + number % columns * (pair + GAP)
        y = HEADER + number // columns * step
        for offset, each in ((0, picture), (THUMB + 4, panel)):
            small = each.resize((THUMB, tall), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + offset, y))
        kept = len(clusters.heads) / len(clusters.member)
        text = _fit(draw, f"{kept:.0%}  {name}", pair, 13)
        draw.text((x, y + tall + 4), text, font=_font(13), fill=SOFT)
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, size: int) -> str:
    """Cut text to a width; what cannot be printed becomes a question mark."""
    shown = "".join(c if c.isprintable() else "?" for c in text[:MOST_LETTERS])
    font = _font(size)
    if len(text) <= MOST_LETTERS and draw.textlength(shown, font=font) <= width:
        return shown
    while shown and draw.textlength(f"{shown}…", font=font) > width:
        shown = shown[:-1]
    return f"{shown}…"


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
