"""Views: augmentation as a small integer record from which the exact pixels can be made again.

A record is drawn from the image's key, the view's number and a seed alone, so any machine draws the same one
in any order; crop, resize, flip and colour follow from it. A teacher's cached output belongs to one record and
one image.
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
        whole: height and width of the image that the view was made for, where ``image`` is that one decoded smaller.
        out: (3, height, width) uint8 that the pixels are written to, such as a place in a batch.

    Returns:
        (3, height, width) uint8, contiguous: ``out``, or an array of its own. The same bits for the same input on
        processors with the same vector instructions; on others a value may differ by one, as torch rounds
        differently there.

    Raises:
        ValueError: the crop does not lie in the image.
    """
    height, width = (size, size) if isinstance(size, int) else size
    full_height, full_width = whole or image.shape[:2]
    if view.x < 0 or view.y < 0 or view.y + view.height > full_height or view.x + view.width > full_width:
        raise ValueError(f"{view} does not lie in {full_height} x {full_width} pixels: was it made for another size?")
    top, bottom = _scaled(view.y, view.height, image.shape[0], full_height)
    left, right = _scaled(view.x, view.width, image.shape[1], full_width)
    part = image[top:bottom, left:right]
    if (height, width) != part.shape[:2]:
        # Interleaved, and where it lies in the image: for such bytes torch has a vectorised kernel, faster than
        # Pillow's.
        crop = torch.from_numpy(part if part.flags.writeable else part.copy()).permute(2, 0, 1)[None]
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True, align_corners=False)
        part = crop[0].permute(1, 2, 0).numpy()
    # To planes by NumPy, whose copy takes the flip along and is faster than torch's.
    planes = (part[:, ::-1] if view.flip else part).transpose(2, 0, 1)
    if out is None:
        out = np.empty((3, height, width), np.uint8)
    np.copyto(out, planes)
    if (view.brightness, view.contrast, view.saturation) != (UNIT, UNIT, UNIT):
        _recolour(out, view)
    return out


def _scaled(start: int, length: int, pixels: int, whole: int) -> tuple[int, int]:
    """A span of ``whole`` pixels on an axis of fewer: first and one past the last."""
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
        # exp and log differ in the last bit between C libraries; to nine digits they do not.
        ratio = round(math.exp(math.log(low) + v * (math.log(high) - math.log(low))), 9)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(across * (width - w + 1)), int(down * (height - h + 1)), w, h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniforms(key: str, index: int, seed: int) -> Iterator[float]:
    """Numbers in [0, 1): 53 bits each of BLAKE2b over the name and a counter, as many as are asked for."""
    name = f"{seed}\0{index}\0{key}".encode("utf-8", "surrogatepass")
    for block in itertools.count():
        digest = hashlib.blake2b(name, salt=block.to_bytes(16, "little"), person=b"ktray.view").digest()
        for value in struct.unpack("<8Q", digest):
            yield (value >> 11) * 2.0**-53
