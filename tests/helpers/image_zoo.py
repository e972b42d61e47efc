"""A folder with every kind of image that a data set in the wild holds, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 48, 32


def photo(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A smooth coloured picture without symmetry, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """The image as a file of the given Pillow format."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def jpeg(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    return encode(photo(seed, width, height), "JPEG", quality=95)


def png_header_bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header claims side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def zoo() -> dict[str, tuple[str, bytes]]:
    """File name to ("ok" | "bad", bytes)."""
    rgb = Image.fromarray(photo())
    alpha = Image.fromarray(np.dstack([photo(), np.tile(np.linspace(0, 255, WIDTH, dtype=np.uint8), (HEIGHT, 1))]))
    wide = np.tile(np.linspace(0, 65535, WIDTH).astype(np.uint16), (HEIGHT, 1))
    frames = [Image.fromarray(photo(i)) for i in range(3)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    plain = jpeg()
    png = encode(rgb, "PNG")
    return {
        "rgb.jpg": ("ok", plain),
        "upper.JPEG": ("ok", plain),
        "rgb.png": ("ok", png),
        "rgb.webp": ("ok", encode(rgb, "WEBP", lossless=True)),
        "rgb.bmp": ("ok", encode(rgb, "BMP")),
        "rgb.tiff": ("ok", encode(rgb, "TIFF")),
        "with space und ümlaut 写真.jpg": ("ok", plain),
        "grey.jpg": ("ok", encode(rgb.convert("L"), "JPEG")),
        "cmyk.jpg": ("ok", encode(rgb.convert("CMYK"), "JPEG", quality=95)),
        "cmyk.tif": ("ok", encode(rgb.convert("CMYK"), "TIFF")),
        "sixteen_bit.png": ("ok", encode(wide, "PNG")),
        "sixteen_bit.tif": ("ok", encode(wide, "TIFF")),
        "palette.png": ("ok", encode(rgb.quantize(64), "PNG")),
        "palette_transparent.png": ("ok", encode(rgb.quantize(64), "PNG", transparency=0)),
        "rgba.png": ("ok", encode(alpha, "PNG")),
        "grey_alpha.png": ("ok", encode(alpha.convert("LA"), "PNG")),
        "one_bit.png": ("ok", encode(rgb.convert("1"), "PNG")),
        "rotated.jpg": ("ok", encode(rgb, "JPEG", quality=95, exif=rotated)),
        "rotated.png": ("ok", encode(rgb, "PNG", exif=rotated)),
        "animated.gif": ("ok", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        "animated.webp": ("ok", encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)),
        "animated.png": ("ok", encode(frames[0], "PNG", save_all=True, append_images=frames[1:])),
        "one_pixel.png": ("ok", encode(photo(0, 6, 4)[:1, :1], "PNG")),
        "zero_bytes.jpg": ("bad", b""),
        "text.jpg": ("bad", b"this is not an image\n" * 20),
        "truncated.jpg": ("bad", plain[: len(plain) * 2 // 3]),
        "truncated.png": ("bad", png[: len(png) // 2]),
        "header_only.jpg": ("bad", plain[:20]),
        "broken_png_data.png": ("bad", png[:60] + bytes(255 - b for b in png[60:-30]) + png[-30:]),
        "huge.png": ("bad", png_header_bomb()),
        "no_pixels.bmp": (
            "bad",
            b"BM" + struct.pack("<IHHIIIIHHIIIIII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0),
        ),
        "postscript.png": ("bad", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        "float.tif": ("bad", encode(np.full((4, 4), 1e9, dtype=np.float32), "TIFF")),
    }


def write_zoo(folder: Path | str) -> dict[str, str]:
    """Write the zoo into a folder. Returns file name to "ok" or "bad"."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    animals = zoo()
    for name, (_, data) in animals.items():
        (folder / name).write_bytes(data)
    return {name: kind for name, (kind, _) in animals.items()}
