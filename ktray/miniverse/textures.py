"""Fields of values in 0..1 for the colours of textures and backgrounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Field = NDArray[np.float32]


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[Field, Field]:
    ticks = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.broadcast_to(ticks, (size, size)), np.broadcast_to(ticks[:, None], (size, size))


def _soft(wave: Field) -> Field:
    """A wave in -1..1 converted to a nearly square wave in 0..1, with edges about one pixel wide."""
    return np.clip(wave * 2.2, -1, 1) * np.float32(0.5) + np.float32(0.5)


def texture_field(name: str, size: int, uniform: Callable[[], float], rng: np.random.Generator) -> Field:
    """A field of a named texture, or ``shade`` (a straight ramp).

    Args:
        name: one of `vocabulary.TEXTURES`, or ``shade``.
        size: side in pixels.
        uniform: returns random numbers in 0..1; five are used.
        rng: generator for textures that need one random number per pixel.

    Returns:
        float32 [size, size], 0..1.
    """
    across, down = _axes(size)
    turn, pitch, phase, other, extra = (uniform() for _ in range(5))
    cos, sin = math.cos(math.pi * turn), math.sin(math.pi * turn)
    u, v = across * cos + down * sin, down * cos - across * sin
    waves = np.float32(2 * math.pi * (3 + 3.5 * pitch))
    start = np.float32(2 * math.pi * phase)
    if name == "shade":
        return u * np.float32(1 if other < 0.5 else -1) / np.float32(1.42) + np.float32(0.5)
    if name == "stripes":
        return _soft(np.sin(waves * u + start))
    if name == "checks":
        return _soft(np.sin(waves * u + start) * np.sin(waves * v + np.float32(6.28 * other)))
    if name == "grid":
        lines = np.maximum(np.cos(waves * u + start), np.cos(waves * v + np.float32(6.28 * other)))
        return _soft(np.asarray(lines * 2 - 1.3, dtype=np.float32))
    if name == "dots":
        spots = np.cos(waves * u + start) + np.cos(waves * v + np.float32(6.28 * other))
        return _soft(np.asarray(spots - 0.7, dtype=np.float32))
    if name == "waves":
        bent = u + np.float32(0.05 + 0.05 * extra) * np.sin(np.float32(12 + 8 * other) * v)
        return _soft(np.sin(waves * bent + start))
    if name == "ripples":
        radius = np.hypot(across - np.float32(other - 0.5), down - np.float32(extra - 0.5))
        return _soft(np.sin(waves * radius * np.float32(1.2) + start))
    if name == "speckles":
        return (rng.random((size, size), dtype=np.float32) < 0.1 + 0.25 * other).astype(np.float32)
    if name == "clouds":
        coarse = rng.random((4 + int(4 * pitch),) * 2, dtype=np.float32)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        return np.clip(np.asarray(image), 0, 1)
    raise ValueError(f"unknown texture {name!r}")
