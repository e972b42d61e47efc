"""Views: augmentation as a small integer record from which the exact pixels can be made again.

A record is drawn from the image's key, the view's number and a seed alone, so any machine draws the same one
in any order; all that follows (crop, resize, flip, colour) is integer arithmetic on it. A teacher's cached
output belongs to one record and one image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

# Colour factors are stored in 1/1024: fine enough to be invisible, coarse enough to be exact.
UNIT = 1024
_TRIES = 10


@dataclass(frozen=True)
class ViewPolicy:
    """What views are drawn from.

    Attributes:
        kind: ``train`` draws; ``eval`` is the centred square crop, the same for every key.
        scale: smallest and largest crop, as a share of the image's area.
        ratio: smallest and largest width / height of a crop.
        hflip: probability of a horizontal flip.
        brightness, contrast, saturation: factors are drawn from 1 - x to 1 + x.
        crop_pct: eval only; side of the crop as a share of the shorter side.
    """

    kind: Literal["train", "eval"] = "train"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    crop_pct: float = 1.0


class View(NamedTuple):
    """One view. Crop box in pixels of the decoded, upright image; colour factors in 1/1024.

    It is a tuple of `VIEW_LENGTH` ints: ``np.array(view, np.int32)`` is its column form and ``View(*row)`` the
    way back (see `view_from_ints`).
    """

    x: int
    y: int
    width: int
    height: int
    flip: int = 0
    brightness: int = UNIT
    contrast: int = UNIT
    saturation: int = UNIT


VIEW_LENGTH = len(View._fields)


def view_from_ints(row: Sequence[int] | np.ndarray) -> View:
    """The view stored as `VIEW_LENGTH` ints."""
    if len(row) != VIEW_LENGTH:
        raise ValueError(f"a view has {VIEW_LENGTH} ints, not {len(row)}")
    return View(*(int(value) for value in row))


def make_view(policy: ViewPolicy, key: str, index: int, seed: int, height: int, width: int) -> View:
    """The view number ``index`` of the image named ``key`` with this many pixels.

    Random resized crop as in Szegedy et al., arXiv 1409.4842, section 6: area and aspect ratio (log-uniform)
    are drawn until the box fits, ten times at most; then the largest centred box within ``policy.ratio``.
    """
    if policy.kind == "eval":
        side = max(1, round(min(height, width) * policy.crop_pct))
        return View((width - side) // 2, (height - side) // 2, side, side)
    draws = _uniforms(key, index, seed)
    flip, *factors = (draws[i] for i in range(4))
    colours = (_factor(u, x) for u, x in zip(factors, _jitters(policy), strict=True))
    box = _random_box(policy, draws[4:], height, width)
    return View(*box, int(flip < policy.hflip), *colours)


def render(image: np.ndarray, view: View, size: int | tuple[int, int]) -> np.ndarray:
    """The pixels of a view: crop, antialiased bilinear resize, flip, colour.

    Args:
        image: (H, W, 3) uint8 RGB, the size that the view was made for.
        size: height and width of the result, or one number for both.

    Returns:
        (height, width, 3) uint8, contiguous. The same bits for the same input wherever Pillow's resize is
        (its 8-bit resampling is fixed-point).

    Raises:
        ValueError: the crop does not lie in the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if view.x < 0 or view.y < 0 or view.y + view.height > image.shape[0] or view.x + view.width > image.shape[1]:
        raise ValueError(f"{view} does not lie in an image of shape {image.shape}: was it decoded at another size?")
    pixels = image[view.y : view.y + view.height, view.x : view.x + view.width]
    if (height, width) != pixels.shape[:2]:
        crop = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(crop.resize((width, height), Image.Resampling.BILINEAR))
    if view.flip:
        pixels = pixels[:, ::-1]
    if (view.brightness, view.contrast, view.saturation) != (UNIT, UNIT, UNIT):
        return _recolour(pixels, view)
    return np.array(pixels, order="C")


def _recolour(pixels: np.ndarray, view: View) -> np.ndarray:
    """Brightness b, saturation s and contrast c as one linear map, rounded and clipped once.

    For a pixel p with luma Y(p), after brightness bp, saturation s bp + (1 - s) b Y(p), contrast c (...) +
    (1 - c) b mean(Y): together b c s p + b c (1 - s) Y(p) + b (1 - c) mean(Y).
    """
    b, c, s = view.brightness, view.contrast, view.saturation
    wide = pixels.astype(np.int32)
    # Rec. 601 luma in 1/256.
    luma = (77 * wide[..., 0] + 150 * wide[..., 1] + 29 * wide[..., 2] + 128) >> 8
    mean = int(luma.sum(dtype=np.int64)) // luma.size
    own = b * c * s // UNIT**2
    grey = b * c * (UNIT - s) // UNIT**2
    shift = b * (UNIT - c) * mean // UNIT
    wide *= own
    wide += (grey * luma + (shift + UNIT // 2))[..., None]
    wide >>= 10
    return np.clip(wide, 0, 255).astype(np.uint8)


def _jitters(policy: ViewPolicy) -> tuple[float, float, float]:
    return policy.brightness, policy.contrast, policy.saturation


def _factor(uniform: float, strength: float) -> int:
    return UNIT + math.floor((2 * uniform - 1) * strength * UNIT + 0.5)


def _random_box(policy: ViewPolicy, draws: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    low, high = policy.ratio
    for attempt in range(_TRIES):
        u, v, across, down = draws[4 * attempt : 4 * attempt + 4]
        area = height * width * (policy.scale[0] + u * (policy.scale[1] - policy.scale[0]))
        # exp and log differ in the last bit between C libraries; to nine digits they do not.
        ratio = round(math.exp(math.log(low) + v * (math.log(high) - math.log(low))), 9)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniforms(key: str, index: int, seed: int) -> list[float]:
    """Numbers in [0, 1) from Philox4x64, a counter-based generator (Salmon et al., SC 2011)."""
    name = f"{seed}\0{index}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=16, person=b"ktray.view").digest()
    # The raw stream is fixed by Philox itself; Generator's methods may change between numpy versions.
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(4 + 4 * _TRIES)
    return [int(value >> np.uint64(11)) * 2.0**-53 for value in raw]
