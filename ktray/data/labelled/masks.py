"""Label maps (masks): decoding, and the geometry that keeps them aligned with their images."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ktray.data.decode import MAX_PIXELS
from ktray.data.preprocess import Preprocess, _geometry
from ktray.errors import BadImage

IGNORE = 255  # value of a pixel without a class, which is ignored everywhere
MAX_CLASSES = 255  # masks are uint8, and one value is `IGNORE`


# Lossy formats are excluded: they would change the classes.
_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "PPM")
_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")
# Pillow scales grey pixels of 2 and 4 bits to 0..255.
_STRETCH = {"L;2": 85, "L;4": 17}


def decode_mask(data: bytes, num_classes: int, *, offset: int = 0, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one label map: grey or palette indices, 1 to 16 bits.

    Args:
        data: the file's bytes.
        num_classes: C, at most 255.
        offset: value of class 0 in the file. It is 1 for ADE20K, where the value 0 means no class.
        max_pixels: largest width x height.

    Returns:
        (H, W) uint8: 0..C-1, or 255 if the value minus the offset is not in this range, or is 255 in the file.

    Raises:
        BadImage: not a label map (colours, JPEG), broken, or too large. No other exception is raised for any bytes.
    """
    if not data:
        raise BadImage("empty mask (0 bytes)")
    try:
        values = _read(data, max_pixels)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"the mask has none of the formats {', '.join(_FORMATS)}") from None
    # Decoders raise many types of exceptions for broken input, as for images.
    except Exception as error:
        raise BadImage(f"broken mask: {' '.join(str(error).split()) or type(error).__name__}"[:200]) from None
    classes = values - offset
    unknown = (classes < 0) | (classes >= num_classes) | (values == IGNORE)
    return np.where(unknown, IGNORE, classes).astype(np.uint8)


def _read(data: bytes, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"the mask is too large: {width} x {height} pixels are above the limit of {max_pixels}")
        if image.mode not in _MODES:
            raise BadImage(f"the mask contains colours ({image.mode}) instead of class numbers")
        stored: Any = image.tile[0][3] if image.tile else ""
        stretch = _STRETCH.get(stored if isinstance(stored, str) else stored[0], 1)
        image.load()
        return np.asarray(ImageOps.exif_transpose(image)).astype(np.int64) // stretch


def check_mask(image: np.ndarray, mask: np.ndarray) -> None:
    """Raises BadImage if the mask (H, W) and its image (H, W, 3) have different sizes."""
    if image.shape[:2] != mask.shape:
        (ih, iw), (mh, mw) = image.shape[:2], mask.shape
        raise BadImage(f"the mask has {mw} x {mh} pixels, and its image has {iw} x {ih}")


def eval_mask(preprocess: Preprocess, mask: np.ndarray) -> np.ndarray:
    """Transform a whole mask in the same way as `Preprocess.eval_transform` transforms its image; padding is 255.

    Args:
        preprocess: the preprocessing of the model.
        mask: (H, W) uint8.

    Returns:
        (height, width) uint8, contiguous.
    """
    nearest: dict[str, Any] = {"interpolation": "nearest", "fill": (IGNORE,)}
    return np.array(_geometry(replace(preprocess, **nearest))(Image.fromarray(mask)), order="C")
