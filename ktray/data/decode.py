"""Encoded bytes to pixels: one function, one kind of failure.

What is converted: CMYK, palette, grey, 16-bit (scaled to 8 bit), transparency (laid on white, as a viewer
shows it), EXIF orientation (applied), animations (first frame). What cannot be: `BadImage`.

Plain RGB JPEGs go through torchvision: the same pixels as Pillow's, bit for bit, a third faster on
500 x 375. Everything else, and JPEGs that are decoded at a reduced size, goes through Pillow.
"""

from __future__ import annotations

import functools
import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.io import ImageReadMode, decode_jpeg

from ktray.errors import BadImage

# Pillow warns of sizes, which are checked here, and of odd metadata, once per file. A filter for good and not
# `catch_warnings` around each call, which is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970

# Formats that hold photos and whose decoders run in this process: EPS would start Ghostscript, for example.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "MPO", "PPM")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, hint_size: int | None = None) -> np.ndarray:
    """Decode one image.

    Args:
        data: the file's bytes.
        max_pixels: largest width x height, checked from the header before any pixel is decoded. Pillow's own
            limit of 2 x 178,956,970 stands above it.
        hint_size: a shorter side, in pixels, that is enough for the caller. JPEGs at least twice as large
            are decoded at 1/2, 1/4 or 1/8 and never below it; other images keep their size.

    Returns:
        (H, W, 3) uint8, RGB, contiguous and writable.

    Raises:
        BadImage: empty, of an unknown format, truncated, broken, too large, or without pixels. Nothing else
            is raised, whatever the bytes are.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        return _decode(data, max_pixels, hint_size)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or of a format that is not read") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from None
    # Decoders raise what they like on broken input: OSError, SyntaxError, struct.error, ValueError, ...
    except Exception as error:
        raise BadImage(_reason(error)) from None


def _decode(data: bytes, max_pixels: int, hint_size: int | None) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise BadImage(f"no pixels ({width} x {height})")
        if width * height > max_pixels:
            raise BadImage(f"too large: {width} x {height} pixels is above the limit of {max_pixels}")
        if image.format == "JPEG":
            if hint_size and min(width, height) >= 2 * hint_size:
                image.draft(None, (hint_size, hint_size))
            elif image.mode == "RGB":
                return _decode_jpeg(data, upright=_orientation(image) == 1)
        return np.array(_to_rgb(image))


def _decode_jpeg(data: bytes, upright: bool) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=not upright)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata beside good pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # TIFF's loader applies the orientation itself and takes the tag away.
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken metadata beside good pixels
        image = image.copy()
    if image.mode in _SIXTEEN_BIT:
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "decode_jpeg" in text:  # torchvision's message names a source file first and libjpeg's message last
        text = text.rsplit(": ", 1)[-1]
    if "truncated" in text.lower() or "premature" in text.lower() or isinstance(error, EOFError):
        return f"truncated: {text}"
    return f"broken: {text}"[:200]


@functools.lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
