"""An image that looks like a photograph to a resampler, drawn from a seed."""

from __future__ import annotations

import numpy as np


def make_photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: smooth colours with sharp edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x / width, y / height, ((x // 9 + y // 7) % 2)], -1) * 255
    return np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)
