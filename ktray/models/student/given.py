"""The forms in which a caller gives images to a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ktray.data.decode import MAX_PIXELS, decode_rgb
from ktray.errors import BadImage

AnyImage = Image.Image | np.ndarray | bytes | str | Path | Mapping[str, Any]


def upright_images(images: Sequence[AnyImage]) -> list[Image.Image | np.ndarray]:
    """Upright RGB pixels: what is encoded is decoded, what a path or uri names is read.

    Raises:
        BadImage: an image cannot be read or decoded.
        TypeError: an image is in none of the forms.
    """
    from ktray.data.sources.fetch import fetch_images  # slow to import, and arrays need no source

    plain = [_content(image) for image in images]
    named = [str(image) for image in plain if isinstance(image, str | Path)]
    found = fetch_images(named, max_pixels=MAX_PIXELS)
    upright: list[Image.Image | np.ndarray] = []
    for image in plain:
        if isinstance(image, str | Path):
            uri, pixels, why = next(found)
            if pixels is None:
                raise BadImage(f"'{uri}': {why}")
            upright.append(pixels)
        elif isinstance(image, bytes):
            upright.append(decode_rgb(image))
        elif isinstance(image, Image.Image):
            upright.append(ImageOps.exif_transpose(image))
        else:
            upright.append(image)
    return upright


def _content(image: AnyImage) -> Image.Image | np.ndarray | bytes | str | Path:
    """What a cell of Hugging Face contains; other images as they are."""
    content: Any = image
    if isinstance(image, Mapping):
        content = image.get("bytes")
        if content is None:
            content = image.get("path")
    if not isinstance(content, Image.Image | np.ndarray | bytes | str | Path):
        raise TypeError(
            f"A {type(content).__name__} is not an image. Use PIL images, (H, W, 3) uint8 arrays, bytes, paths or uris."
        )
    return content
