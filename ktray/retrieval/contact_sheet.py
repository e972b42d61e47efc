"""The contact sheet: queries on the left and the retrieved images of each query on the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

THUMB = 96  # a multiple of 32 and 48, so that small images are enlarged evenly
_GAP = 8
_MARGIN = 24
_LABEL = 132
_LINE = 17
_ROW_GAP = 12
_ARROW = 34
_TITLE, _SUBTITLE, _NAME, _NUMBER = 21, 14, 14, 12

_EXPLAINED = "retrieved images, most similar first, with their cosine similarity to the query"

_PAPER = (255, 255, 255)
_BAND = (246, 247, 249)
_INK = (27, 31, 36)
_SOFT = (92, 100, 110)
_EDGE = (205, 210, 216)
_QUERY = (0, 90, 181)


@dataclass(frozen=True)
class SheetRow:
    """One query and its retrieved images.

    Attributes:
        query: uint8 (H, W, 3); None for a row of images without a query.
        label: the class of the query, or a description of the row.
        hits: (uint8 (H, W, 3), cosine similarity) pairs, most similar first; a similarity of NaN is not written.
    """

    query: np.ndarray | None
    label: str
    hits: Sequence[tuple[np.ndarray, float]]


def contact_sheet(rows: Sequence[SheetRow], target: Path | IO[bytes], title: str, subtitle: str = "") -> None:
    """Draw the contact sheet as PNG.

    Args:
        rows: the queries to show. Rows may have different numbers of hits; the columns are aligned.
        target: a path or a binary file.
        title: one line, such as the task and the source.
        subtitle: one line of counts, such as ``260 queries · 4,000 images · 12 near-duplicates dropped``.
    """
    columns = max((len(row.hits) for row in rows), default=0)
    row_height = _GAP + THUMB + _LINE + _ROW_GAP
    hits_left = _MARGIN + _LABEL + THUMB + _ARROW
    head = _MARGIN + 30 + (24 if subtitle else 0) + 26
    heading = _font(_TITLE, True)
    small = _font(_NUMBER, True)
    hits_width = max(columns * (THUMB + _GAP) - _GAP, round(small.getlength(_EXPLAINED)))
    text_width = max(heading.getlength(title), _font(_SUBTITLE).getlength(subtitle))
    width = max(hits_left + hits_width, _MARGIN + round(text_width)) + _MARGIN
    sheet = Image.new("RGB", (width, head + max(1, len(rows)) * row_height + _MARGIN // 2), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, _INK, heading)
    if subtitle:
        draw.text((_MARGIN, _MARGIN + 24), subtitle, _SOFT, _font(_SUBTITLE))
    if any(row.query is not None for row in rows):
        draw.text((_MARGIN + _LABEL + THUMB / 2, head - 10), "query", _QUERY, small, anchor="ms")
        draw.text((hits_left, head - 10), _EXPLAINED, _SOFT, small, anchor="ls")
    if not rows:
        draw.text((_MARGIN, head + 20), "There are no images to show.", _SOFT, _font(_NAME))
    for number, row in enumerate(rows):
        top = head + number * row_height
        if number % 2 == 0:
            draw.rectangle((0, top, width, top + row_height - 1), _BAND)
        _draw_row(sheet, draw, row, top + _GAP, hits_left)
    sheet.save(target, "PNG", optimize=True)


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: SheetRow, top: int, hits_left: int) -> None:
    lines = _wrap(row.label, _LABEL - 2 * _GAP, _font(_NAME, True), 3)
    first = top + THUMB / 2 - len(lines) * _LINE / 2
    for i, line in enumerate(lines):
        draw.text((_MARGIN + _LABEL - 2 * _GAP, first + i * _LINE), line, _INK, _font(_NAME, True), anchor="ra")
    left = _MARGIN + _LABEL
    middle, tip = top + THUMB // 2, hits_left - 10
    if row.query is not None:
        sheet.paste(_thumbnail(row.query), (left, top))
        draw.rectangle((left - 4, top - 4, left + THUMB + 3, top + THUMB + 3), outline=_QUERY, width=3)
        draw.line((left + THUMB + 10, middle, tip - 4, middle), _SOFT, 2)
        draw.polygon(((tip, middle), (tip - 7, middle - 5), (tip - 7, middle + 5)), _SOFT)
    for i, (image, similarity) in enumerate(row.hits):
        x = hits_left + i * (THUMB + _GAP)
        sheet.paste(_thumbnail(image), (x, top))
        draw.rectangle((x - 1, top - 1, x + THUMB, top + THUMB), outline=_EDGE)
        if math.isfinite(similarity):
            position = (x + THUMB / 2, top + THUMB + _LINE - 3)
            draw.text(position, f"{similarity:.3f}", _INK, _font(_NUMBER), anchor="ms")
    if not row.hits:
        draw.text((hits_left, middle), "no image retrieved", _SOFT, _font(_NAME), anchor="lm")


def _thumbnail(image: np.ndarray) -> Image.Image:
    """The whole image in a grey square of `THUMB` pixels. Small images are enlarged without smoothing."""
    picture = Image.fromarray(image)
    scale = THUMB / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (THUMB, THUMB), _EDGE)
    square.paste(picture.resize(size, resampling), ((THUMB - size[0]) // 2, (THUMB - size[1]) // 2))
    return square


def _wrap(text: str, width: float, font: ImageFont.FreeTypeFont, most: int) -> list[str]:
    """Break a text into at most ``most`` lines of the width, at spaces if possible; an ellipsis replaces the rest."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest:
        end = len(rest)
        last = len(lines) == most - 1
        while end > 1 and font.getlength(rest[:end] + ("…" if last and end < len(rest) else "")) > width:
            end -= 1
        if end == len(rest) or last:
            lines.append(rest if end == len(rest) else rest[:end].rstrip() + "…")
            break
        space = rest.rfind(" ", 1, end + 1)
        end = space if space > 0 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


@lru_cache(maxsize=8)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib is a dependency anyway and includes a font; a system may have none.
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
