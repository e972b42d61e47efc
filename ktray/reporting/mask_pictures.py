"""Label maps as pictures for the report."""

from __future__ import annotations

import colorsys

import numpy as np

# Longer side of a picture in the report, in pixels.
SIDE = 256


def triptych(image: np.ndarray, mask: np.ndarray, predicted: np.ndarray, ignore: int) -> np.ndarray:
    """Image, mask and prediction side by side: (H, W, 3), (H, W), (H, W) uint8 to (H', 3 W' + gaps, 3) uint8. Pixels
    with the value ``ignore`` are white."""
    step = max(1, -(-max(mask.shape) // SIDE))
    painted = [_paint(values[::step, ::step], ignore) for values in (mask, predicted)]
    parts = [image[::step, ::step], *painted]
    gap = np.full((parts[0].shape[0], 2, 3), 255, np.uint8)
    return np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1)


def most_pixels(values: np.ndarray, counted: np.ndarray, classes: list[str]) -> str:
    """Names of up to three classes with the most counted pixels. Class 0, which is usually the background, comes last.

    Args:
        values: (H, W) classes.
        counted: (H, W) bool, the pixels to count.
    """
    counts = np.bincount(values[counted], minlength=len(classes))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    order.sort(key=lambda i: i == 0)
    return ", ".join(classes[i] for i in order[:3]) or "none"


def _paint(mask: np.ndarray, ignore: int) -> np.ndarray:
    """The mask with a colour for each class."""
    # Steps of the golden ratio keep the hues of neighbouring numbers far apart.
    hues = [colorsys.hsv_to_rgb((0.1 + i * 0.618034) % 1.0, 0.65, 0.85 if i % 2 else 0.6) for i in range(256)]
    palette = np.round(255 * np.array(hues)).astype(np.uint8)
    palette[0], palette[ignore] = (40, 44, 52), (255, 255, 255)
    return np.asarray(palette[mask])
