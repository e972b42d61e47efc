"""Views: augmentation as a small integer record from which the exact pixels can be reproduced.

A record depends only on the key of the image, the number of the view and a seed, so every machine draws the same record
in any order. The record determines crop, resize, flip and colour. A cached output of the teacher belongs to one record
and one image.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# Colour factors are stored in units of 1/1024: the rounding is invisible, and the stored value is exact.
UNIT = 1024
_TRIES = 10


@dataclass(frozen=True)
class ViewPolicy:
    """The distribution of views.

    Attributes:
        kind: ``train``: random views; ``eval``: the centred square crop for every key.
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
    """One view: crop box in pixels of the decoded, upright image, and colour factors in units of 1/1024.

    It is a tuple of `VIEW_LENGTH` ints. ``np.array(view, np.int32)`` is its form in a column; `view_from_ints` is the
    inverse.
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
        raise ValueError(f"a view has {VIEW_LENGTH} ints, but the row has {len(row)}")
    return View(*(int(value) for value in row))


def make_view(policy: ViewPolicy, key: str, index: int, seed: int, height: int, width: int) -> View:
    """View number ``index`` of the image ``key`` with the given height and width in pixels.

    Random resized crop as in Szegedy et al., arXiv 1409.4842, section 6: area and aspect ratio (log-uniform)
    are drawn until the box fits, at most ten times; otherwise the largest centred box within ``policy.ratio`` is used.
    """
    if policy.kind == "eval":
        side = max(1, round(min(height, width) * policy.crop_pct))
        return View((width - side) // 2, (height - side) // 2, side, side)
    draws = _uniforms(key, index, seed)
    flip = next(draws)
    jitters = (policy.brightness, policy.contrast, policy.saturation)
    colours = [_factor(next(draws), strength) for strength in jitters]
    return View(*_random_box(policy, draws, height, width), int(flip < policy.hflip), *colours)


def render(
    image: np.ndarray,
    view: View,
    size: int | tuple[int, int],
    whole: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The pixels of a view: crop, antialiased bilinear resize, flip, colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: height and width of the result, or one number for both.
        view: the view.
        whole: height and width of the original image, if ``image`` was decoded at a lower resolution.
        out: (3, height, width) uint8 to which the pixels are written, such as an item of a batch.

    Returns:
        (3, height, width) uint8, contiguous: ``out``, or a new array. The result is bitwise reproducible on processors
        with the same vector instructions; on others a value may differ by one, because torch rounds differently.

    Raises:
        ValueError: the crop is not inside the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    full_height, full_width = whole or image.shape[:2]
    if view.x < 0 or view.y < 0 or view.y + view.height > full_height or view.x + view.width > full_width:
        raise ValueError(
            f"{view} is not inside of {full_height} x {full_width} pixels; the view belongs to another image size"
        )
    top, bottom = _scaled(view.y, view.height, image.shape[0], full_height)
    left, right = _scaled(view.x, view.width, image.shape[1], full_width)
    part = image[top:bottom, left:right]
    if (height, width) != part.shape[:2]:
        # The crop stays interleaved and is not copied: torch has a vectorised kernel for this memory layout, which is
        # faster than Pillow's.
        crop = torch.from_numpy(part if part.flags.writeable else part.copy()).permute(2, 0, 1)[None]
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True, align_corners=False)
        part = crop[0].permute(1, 2, 0).numpy()
    # NumPy converts to planes, because its copy includes the flip and is faster than that of torch.
    planes = (part[:, ::-1] if view.flip else part).transpose(2, 0, 1)
    if out is None:
        out = np.empty((3, height, width), np.uint8)
    np.copyto(out, planes)
    if (view.brightness, view.contrast, view.saturation) != (UNIT, UNIT, UNIT):
        _recolour(out, view)
    return out


def _scaled(start: int, length: int, pixels: int, whole: int) -> tuple[int, int]:
    """Convert a span on an axis of ``whole`` pixels to an axis of ``pixels``: first pixel, and one past the last."""
    if pixels == whole:
        return start, start + length
    first = start * pixels // whole
    return first, max(first + 1, -(-(start + length) * pixels // whole))


# Rec. 601.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _recolour(pixels: np.ndarray, view: View) -> None:
    """Brightness b, saturation s and contrast c as one linear map in place, rounded and clipped once.

    For a pixel p with luma Y(p), after brightness bp, saturation s bp + (1 - s) b Y(p), contrast c (...) +
    (1 - c) b mean(Y): together b c s p + b c (1 - s) Y(p) + b (1 - c) mean(Y).
    """
    b, c, s = (factor / UNIT for factor in (view.brightness, view.contrast, view.saturation))
    planes = pixels.reshape(3, -1).astype(np.float32)
    mix = np.float32(b * c * s) * np.eye(3, dtype=np.float32) + np.float32(b * c * (1 - s)) * _LUMA
    mean = float(_LUMA @ planes.mean(axis=1, dtype=np.float64))
    planes = mix @ planes
    planes += np.float32(b * (1 - c) * mean + 0.5)
    pixels[:] = planes.clip(0, 255, out=planes).reshape(pixels.shape)


def _factor(uniform: float, strength: float) -> int:
    return UNIT + math.floor((2 * uniform - 1) * strength * UNIT + 0.5)


def _random_box(policy: ViewPolicy, draws: Iterator[float], height: int, width: int) -> tuple[int, int, int, int]:
    low, high = policy.ratio
    for _ in range(_TRIES):
        u, v, across, down = itertools.islice(draws, 4)
        area = height * width * (policy.scale[0] + u * (policy.scale[1] - policy.scale[0]))
        # exp and log differ in the last bit between C libraries; rounding to nine digits removes the difference.
        ratio = round(math.exp(math.log(low) + v * (math.log(high) - math.log(low))), 9)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniforms(key: str, index: int, seed: int) -> Iterator[float]:
    """Endless numbers in [0, 1): 53 bits each from BLAKE2b of the name and a counter."""
    name = f"{seed}\0{index}\0{key}".encode("utf-8", "surrogatepass")
    for block in itertools.count():
        digest = hashlib.blake2b(name, salt=block.to_bytes(16, "little"), person=b"ktray.view").digest()
        for value in struct.unpack("<8Q", digest):
            yield (value >> 11) * 2.0**-53
