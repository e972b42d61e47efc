"""Decoding of images: one function and one exception.

Converted to RGB are CMYK, palette, grey, 16-bit (scaled to 8 bits), transparency (on a white background, as in an image
viewer) and animations (the first frame); EXIF orientation is applied. For anything else, `BadImage` is raised.

RGB JPEGs are decoded by libjpeg-turbo (simplejpeg): the pixels are identical to those of Pillow, and it is faster than
Pillow and torchvision. A JPEG that is much larger than its caller needs is decoded at 1/2, 1/4 or 1/8 of its size,
which takes less work. Pillow decodes all other images, including those that libjpeg-turbo rejects; for HEIC it needs
the extra ``heic``.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from ktray.data import heic
from ktray.data.magic import HEAD_BYTES, what_it_is
from ktray.errors import BadImage

# Pillow warns of large sizes, which are checked here, and of unusual metadata, once per file. The filter is permanent,
# because `catch_warnings` around each call is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 178_956_970

# Formats for photos whose decoders run in this process. EPS, for example, would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "MPO", "PPM")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


# Takes height and width of the whole, upright image and returns the acceptable factor of size reduction.
Enough = Callable[[int, int], float]


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, enough: Enough | None = None) -> np.ndarray:
    """Decode one image.

    Args:
        data: the file's bytes.
        max_pixels: largest width x height; it is checked in the header before any pixel is decoded. Pillow's own limit
            of 2 x 178,956,970 also applies.
        enough: called with height and width of the whole image; returns the factor by which the image may be smaller.
            From a factor of 2 on, RGB JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, but not below the factor;
            other images keep their size.

    Returns:
        (H, W, 3) uint8, RGB, contiguous and writable.

    Raises:
        BadImage: empty, in an unknown format, truncated, broken, too large, or without pixels. No other exception is
            raised for any bytes.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        return _decode(data, max_pixels, enough)
    except BadImage:
        raise
    except Image.UnidentifiedImageError:
        kind = what_it_is(data[:HEAD_BYTES])
        raise BadImage(f"not an image: {kind}" if kind else "not an image, or in an unsupported format") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from None
    # Decoders raise many types of exceptions for broken input: OSError, SyntaxError, struct.error, ValueError, ...
    except Exception as error:
        raise BadImage(_reason(error)) from None


def _decode(data: bytes, max_pixels: int, enough: Enough | None) -> np.ndarray:
    jpeg = _decode_jpeg(data, max_pixels, enough)
    if jpeg is not None:
        return jpeg
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise BadImage(f"the image has no pixels ({width} x {height})")
        _check_size(height, width, max_pixels)
        pixels = np.array(_to_rgb(image))
        if enough:
            enough(*pixels.shape[:2])
        return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"too large: {width} x {height} pixels are above the limit of {max_pixels}")


def _shrink(times: float) -> int:
    return next((factor for factor in (8, 4, 2) if times >= factor), 1)


def _decode_jpeg(data: bytes, max_pixels: int, enough: Enough | None) -> np.ndarray | None:
    """None if it is not a valid colour JPEG. Pillow then reads it, or reports what is wrong."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in ("YCbCr", "RGB"):
        return None
    _check_size(height, width, max_pixels)
    turn = _orientation(data)
    # Orientations from 5 on are rotated by 90 degrees.
    shrink = _shrink(enough(*((width, height) if turn > 4 else (height, width)))) if enough else 1
    least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
    try:
        return _upright(simplejpeg.decode_jpeg(data, "RGB", **least), turn)
    except ValueError:
        return None


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Apply the EXIF orientation: from 5 on the axes are exchanged; then each axis may be mirrored."""
    if turn > 4:
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _orientation(data: bytes) -> int:
    """The orientation in the EXIF data of a JPEG, or else in its XMP data; 1 if it is missing or invalid."""
    if not _has_metadata(data):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            turn = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        return turn if 1 <= turn <= 8 else 1
    except Exception:  # the metadata are broken, but the pixels are valid
        return 1


def _has_metadata(data: bytes) -> bool:
    """Whether a JPEG has a segment before its pixels that may hold an orientation: EXIF data, or XMP data that mention
    it. Most have none, and this check is fast."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"\xda", b""):
        padding = data[at + 1] == 0xFF
        size = 1 if padding else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xE1:
            if data[at + 4 : at + 9] == b"Exif\0":
                return True
            if data[at + 4 : at + 17] == b"http://ns.ado" and b"Orientation" in data[at : at + size]:
                return True
        at += size
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # The TIFF loader applies the orientation itself and removes the tag.
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # the metadata are broken, but the pixels are valid
        image = image.copy()
    if image.mode in _SIXTEEN_BIT:
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "truncated" in text.lower() or "premature" in text.lower() or isinstance(error, EOFError):
        return "truncated: the file is incomplete"
    return f"broken: {text}"[:200]


@functools.lru_cache(maxsize=1)
def formats() -> list[str]:
    """The supported formats of Pillow. Their decoders run in this process and start no other program."""
    Image.init()
    return [name for name in (*_FORMATS, *([heic.FORMAT] if heic.available() else [])) if name in Image.OPEN]
