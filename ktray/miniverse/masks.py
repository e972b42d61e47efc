"""Grey masks (255 = ink) of glyphs, shapes and lines of text, at one and a half times the final size.

A mask is drawn once per process and cached: a world of 60,000 images needs only a few thousand masks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ktray.miniverse.vocabulary import FONTS

STYLES = ("plain", "heavy", "outlined")


def mask_size(size: int) -> int:
    """Side in pixels of the masks for images of `size` pixels."""
    return size * 3 // 2


@lru_cache(maxsize=128)
def _font(index: int, pixels: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[index]}.ttf"
    # The basic layout engine is used, because Raqm, if it is installed, would change the pixels by kerning.
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)


def _fit(ink: Image.Image, side: int) -> Image.Image:
    """Crop to the ink, scale its longer side to 92% of `side`, and centre it on a square."""
    box = ink.getbbox()
    if box is None:
        raise ValueError("the glyph has no ink, so the font lacks it")
    ink = ink.crop(box)
    scale = 0.92 * side / max(ink.size)
    width, height = (max(1, round(edge * scale)) for edge in ink.size)
    canvas = Image.new("L", (side, side))
    canvas.paste(ink.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return canvas


def _styled(mask: Image.Image, style: str) -> Image.Image:
    if style == "plain":
        return mask
    grown = mask.filter(ImageFilter.MaxFilter(3))
    return grown if style == "heavy" else ImageChops.subtract(grown.filter(ImageFilter.MaxFilter(3)), mask)


def text_mask(text: str, font: int, side: int) -> Image.Image:
    """The mask of a glyph or a short line of text in font number `font`, `side` pixels square."""
    face = _font(font, 2 * side)
    left, top, right, bottom = face.getbbox(text)
    ink = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(ink).text((2 - left, 2 - top), text, font=face, fill=255)
    return _fit(ink, side)


@lru_cache(maxsize=16384)
def glyph_mask(char: str, font: int, style: str, side: int) -> Image.Image:
    """The cached mask of one glyph in one of `STYLES`."""
    return _styled(text_mask(char, font, side), style)


def _regular(corners: int, turn: float = -90.0, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    return [
        (
            radii[i % len(radii)] * math.cos(math.radians(turn + 360 * i / corners)),
            radii[i % len(radii)] * math.sin(math.radians(turn + 360 * i / corners)),
        )
        for i in range(corners)
    ]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in steps
    ]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": _regular(3),
    "star": _regular(10, radii=(1.0, 0.42)),
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "pentagon": _regular(5),
    "hexagon": _regular(6),
    "cross": [
        (x, y)
        for x, y in (
            (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
            (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
        )
    ],
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "heart": _heart(),
}  # fmt: skip


@lru_cache(maxsize=256)
def shape_mask(shape: str, style: str, side: int) -> Image.Image:
    """The cached mask of one shape of `vocabulary.SHAPES` in one of `STYLES`."""
    big = 4 * side
    ink = Image.new("L", (big, big))
    draw = ImageDraw.Draw(ink)
    full = (0.04 * big, 0.04 * big, 0.96 * big, 0.96 * big)
    if shape in _POLYGONS:
        draw.polygon([(big * (0.5 + 0.46 * x), big * (0.5 + 0.46 * y)) for x, y in _POLYGONS[shape]], fill=255)
    elif shape == "circle":
        draw.ellipse(full, fill=255)
    elif shape == "ring":
        draw.ellipse(full, fill=255)
        draw.ellipse((0.25 * big, 0.25 * big, 0.75 * big, 0.75 * big), fill=0)
    elif shape == "crescent":
        draw.ellipse(full, fill=255)
        draw.ellipse((0.34 * big, 0.0, 1.1 * big, 0.76 * big), fill=0)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return _styled(_fit(ink, side), style)
