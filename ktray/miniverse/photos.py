"""Photo-like JPEGs for speed tests: their sizes in pixels and bytes, and so the decoding time, are as in ImageNet."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 500, 375
DISTINCT = 64
_QUALITY = 90
_POWER = 1.35


def ensure_tars(folder: Path, images: int, a_tar: int = 250) -> list[str]:
    """Write ``images`` JPEGs of 500 x 375 pixels as WebDataset tars, unless they exist; 64 of them are distinct."""
    paths = []
    contents: list[bytes] = []
    for number, first in enumerate(range(0, images, a_tar)):
        count = min(a_tar, images - first)
        path = folder / f"photos-{number:05d}-{count}.tar"
        paths.append(str(path))
        if path.exists():
            continue
        contents = contents or [jpeg(seed) for seed in range(DISTINCT)]
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, first + count):
                content = contents[i % DISTINCT]
                info = tarfile.TarInfo(f"{i:08d}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        part.replace(path)
    return paths


def jpeg(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """An image with a power-law spectrum, similar to photographs (D. J. Field, 1987), with weak sensor noise.

    With the exponent used here, it has about 60 kB at 500 x 375 pixels, as images of ImageNet have.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def field() -> np.ndarray:
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        values = np.fft.irfft2(spectrum / frequency**_POWER, s=(height, width))
        return np.asarray(values / values.std())

    light, red, blue = field(), field(), field()  # colours vary less than light
    channels = np.stack([light + 0.3 * red, light, light + 0.3 * blue], axis=2)
    pixels = 128 + 40 * channels + rng.normal(scale=2.0, size=channels.shape)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()
