"""Fingerprints of images: a digest of the pixels, and perceptual hashes.

The hash of an image hardly changes when the image is saved again, resized, brightened or slightly cropped.

`ktray.retrieval.heldout_duplicates` and `ktray.data.labelled.copies` compare them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

_GRID = 32
_LOW = 8
# Crops of a held-out image that are compared with the gallery (left, top, right, bottom as fractions of the sides).
CROPS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.025, 0.025, 0.975, 0.975),
    (0.05, 0.05, 0.95, 0.95),
    (0.0, 0.0, 0.96, 0.96),
    (0.04, 0.0, 1.0, 0.96),
    (0.0, 0.04, 0.96, 1.0),
    (0.04, 0.04, 1.0, 1.0),
    (0.0, 0.0, 0.92, 0.92),
    (0.08, 0.0, 1.0, 0.92),
    (0.0, 0.08, 0.92, 1.0),
    (0.08, 0.08, 1.0, 1.0),
)


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of n images: perceptual ``hash`` (n,) or (n, V) uint64, and ``digest`` of the pixels (n,) uint64."""

    hash: np.ndarray
    digest: np.ndarray


def _cosines(size: int) -> np.ndarray:
    """The first `_LOW` rows of the DCT-II matrix of ``size`` points, (8, size) float64."""
    frequency, point = np.arange(_LOW)[:, None], np.arange(size)[None]
    return np.asarray(np.cos(np.pi * (point + 0.5) * frequency / size))


_DCT = _cosines(_GRID)


def _small(grey: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BILINEAR, box=box))


def _hashes(small: Sequence[np.ndarray]) -> np.ndarray:
    """(n, `_GRID`, `_GRID`) grey images to (n,) uint64 perceptual hashes. The hashes of similar images differ in
    few of their 64 bits.

    The common "pHash" (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the
    8 x 8 lowest frequencies of the DCT of the 32 x 32 grey image, each compared with their median. The constant
    term is omitted (its bit is 0), so that brightness has no influence.
    """
    # Values are rounded, so that a frequency that is absent in a plain image is 0 instead of rounding noise.
    grids = np.asarray(small, dtype=np.float64).reshape(-1, _GRID, _GRID)
    low = np.round(_DCT @ grids @ _DCT.T, 6).reshape(len(small), _LOW * _LOW)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()


def fingerprint(images: Iterable[np.ndarray]) -> Fingerprints:
    """Fingerprints with one hash per image, for the gallery. ``images``: uint8 (H, W, 3) each, of any sizes."""
    return fingerprint_small([shrink(image) for image in images])


Small = tuple[np.ndarray, int]


def shrink(image: np.ndarray) -> Small:
    """What `fingerprint_small` needs of an image, in a kilobyte, for callers that cannot keep many images in memory."""
    grey = Image.fromarray(image).convert("L")
    return _small(grey, (0, 0, *grey.size)), pixel_digest(image)


def fingerprint_small(small: Sequence[Small]) -> Fingerprints:
    """`fingerprint`, computed from the results of `shrink`."""
    return Fingerprints(_hashes([s[0] for s in small]), np.array([s[1] for s in small], dtype=np.uint64))


def fingerprint_heldout(images: Sequence[np.ndarray]) -> Fingerprints:
    """Fingerprints with several hashes per image (of crops and mirrored crops), for held-out images."""
    hashes = []
    for image in images:
        small = []
        for picture in (image, image[:, ::-1]):
            grey = Image.fromarray(np.ascontiguousarray(picture)).convert("L")
            w, h = grey.size
            small += [_small(grey, (x0 * w, y0 * h, x1 * w, y1 * h)) for x0, y0, x1, y1 in CROPS]
        hashes.append(_hashes(small))
    return Fingerprints(
        np.array(hashes, dtype=np.uint64).reshape(-1, 2 * len(CROPS)),
        np.array([pixel_digest(i) for i in images], dtype=np.uint64),
    )


def pixel_digest(image: np.ndarray) -> int:
    """A digest of the size and the pixels, 64 bits."""
    content = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    content.update(np.ascontiguousarray(image).tobytes())
    return int.from_bytes(content.digest(), "big")


_BITS_OF_BYTE = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


def bit_counts(values: np.ndarray) -> np.ndarray:
    """(P,) uint8, number of set bits of each of (P,) uint64."""
    if hasattr(np, "bitwise_count"):  # since NumPy 2.0, and ten times as fast
        return np.asarray(np.bitwise_count(values))
    return np.asarray(_BITS_OF_BYTE[values.view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.uint8))
