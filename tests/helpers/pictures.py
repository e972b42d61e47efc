"""Small images, each different from all others."""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image


def picture(name: str, kind: str = "JPEG", size: tuple[int, int] = (24, 16), **options: object) -> bytes:
    """An image that differs from those of all other names."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    pixels = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size)
    out = io.BytesIO()
    pixels.save(out, kind, **options)
    return out.getvalue()
