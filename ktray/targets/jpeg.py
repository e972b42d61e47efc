"""Views stored as JPEG instead of as they are: a part of the bytes, for a fraction of a millisecond a view when read.

The teacher has answered for the view before it was encoded, so the student sees pixels that differ a little from those
that the targets belong to.
"""

from __future__ import annotations

import numpy as np
import simplejpeg

from ktray.storage.columns import Rows

PIXELS, JPEG = "pixels", "jpeg"
# Of a photo-like view at quality 90: a file's tables, and bytes a pixel.
TABLES, BYTES_PER_PIXEL = 620, 0.4


def view_bytes(size: int, quality: int | None) -> int:
    """Of a stored view, about."""
    return 3 * size**2 if quality is None else TABLES + round(BYTES_PER_PIXEL * size**2)


def encode_views(rows: Rows, quality: int | None) -> Rows:
    """Rows with ``jpeg`` (n,), bytes, in place of ``pixels`` (n, 3, H, W) uint8. With None they stay as they are.

    Args:
        quality: 1 to 100, as libjpeg has it; colours keep their resolution.
    """
    if quality is None:
        return rows
    encoded = np.empty(len(rows[PIXELS]), dtype=object)
    for row, pixels in enumerate(rows[PIXELS]):
        image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        encoded[row] = simplejpeg.encode_jpeg(image, quality, "RGB", "444")
    return {**{name: value for name, value in rows.items() if name != PIXELS}, JPEG: encoded}


def decode_views(rows: Rows) -> Rows:
    """Inverse of `encode_views`, but for what JPEG loses."""
    if JPEG not in rows:
        return rows
    images = [simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1) for data in rows[JPEG]]
    pixels = np.stack(images) if images else np.zeros((0, 3, 0, 0), np.uint8)
    return {**{name: value for name, value in rows.items() if name != JPEG}, PIXELS: pixels}
