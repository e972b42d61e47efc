"""Views stored as JPEG: they take less space than raw pixels, and a fraction of a millisecond per view to decode.

The teacher processes a view before it is encoded. Therefore the pixels that the student is trained on differ slightly
from the pixels that the targets belong to.
"""

from __future__ import annotations

import numpy as np
import simplejpeg

from ktray.storage.columns import Rows

PIXELS, JPEG = "pixels", "jpeg"
# Size of a photo-like view at quality 90: bytes for the tables of a file, and bytes per pixel.
TABLES, BYTES_PER_PIXEL = 620, 0.4


def view_bytes(size: int, quality: int | None) -> int:
    """Approximate size of a stored view, in bytes."""
    return 3 * size**2 if quality is None else TABLES + round(BYTES_PER_PIXEL * size**2)


def encode_views(rows: Rows, quality: int | None) -> Rows:
    """Replace the column ``pixels`` (n, 3, H, W) uint8 with ``jpeg`` (n,), bytes.

    Args:
        rows: columns with ``pixels``.
        quality: quality of libjpeg, 1 to 100, without chroma subsampling. None returns the rows unchanged.
    """
    if quality is None:
        return rows
    encoded = np.empty(len(rows[PIXELS]), dtype=object)
    for row, pixels in enumerate(rows[PIXELS]):
        image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
        encoded[row] = simplejpeg.encode_jpeg(image, quality, "RGB", "444")
    return {**{name: value for name, value in rows.items() if name != PIXELS}, JPEG: encoded}


def decode_views(rows: Rows) -> Rows:
    """Inverse of `encode_views`, except for the losses of JPEG."""
    if JPEG not in rows:
        return rows
    images = [simplejpeg.decode_jpeg(data, "RGB").transpose(2, 0, 1) for data in rows[JPEG]]
    pixels = np.stack(images) if images else np.zeros((0, 3, 0, 0), np.uint8)
    return {**{name: value for name, value in rows.items() if name != JPEG}, PIXELS: pixels}
