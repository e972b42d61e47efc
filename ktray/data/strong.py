"""Strong augmentation of a stored view, for the student only.

The target of the teacher belongs to the view as it is stored; the student may see a stronger variant of it (weak for
the teacher, strong for the student), which differs at each visit. Beyer et al., arXiv 2106.05237, use the same crop for
both. With stored targets this would mean a few fixed views, which a student learns by heart in a long training.

Everything is drawn from the key of a view and a visit (`ktray.data.augment.view_keys`), so that a restart and another
number of workers see the same images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ktray.data.augment import random_views, uniforms
from ktray.data.views import ViewPolicy

_CROP, _PHOTOMETRIC, _ERASE = 101, 102, 103  # salts, which differ from those of the objectives that cut views
LEVELS = 4  # number of strengths of a photometric operation
# The photometric operations of RandAugment (Cubuk et al., arXiv 1909.13719, section 3), without its geometric ones.
OPERATIONS = (
    "identity",
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
# Share of the area, and height / width, of an erased box: random erasing (Zhong et al., arXiv 1708.04896) with the
# ranges of torchvision's RandomErasing.
_AREA, _RATIO = (0.02, 0.33), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class StrongPolicy:
    """The distribution of strong variants of a view.

    Attributes:
        crop_min: area of the smallest crop, as a share of the view; 1: no crop.
        hflip: probability of a horizontal flip.
        photometric: number of operations of `OPERATIONS` that are applied to each image, one after the other.
        magnitude: strength of the operations, 0 to 1.
        erase: probability that a box of the image is replaced by the mean colour of the image.
    """

    crop_min: float = 1.0
    hflip: float = 0.0
    photometric: int = 0
    magnitude: float = 0.5
    erase: float = 0.0

    @property
    def active(self) -> bool:
        """Whether the policy changes anything."""
        return self.crop_min < 1 or self.hflip > 0 or self.photometric > 0 or self.erase > 0


PLAIN = StrongPolicy()
"""No strong augmentation."""


def strong_views(images: torch.Tensor, policy: StrongPolicy, keys: torch.Tensor) -> torch.Tensor:
    """A strong variant of each image: crop and flip, photometric operations, then random erasing.

    Args:
        images: (N, 3, H, W) uint8.
        policy: ranges of the random changes.
        keys: (N,) int64 on the CPU, one for each image and visit; they determine every random number.

    Returns:
        (N, 3, H, W) uint8 on the same device.
    """
    if policy.crop_min < 1 or policy.hflip > 0:
        box = ViewPolicy(scale=(policy.crop_min, 1.0), hflip=policy.hflip)
        images = random_views(images, box, keys, salt=_CROP)
    for number in range(policy.photometric):
        choice, strength = uniforms(keys, _PHOTOMETRIC + 10 * number, 2).numpy()
        images = _photometric(images, choice, strength, policy.magnitude)
    if policy.erase > 0:
        images = _erase(images, uniforms(keys, _ERASE, 5).numpy(), policy.erase)
    return images


def _photometric(images: torch.Tensor, choice: np.ndarray, strength: np.ndarray, magnitude: float) -> torch.Tensor:
    """Apply one operation to each image. Images with the same operation and strength are processed together."""
    operation = (choice * len(OPERATIONS)).astype(np.int64)
    level = (strength * 2 * LEVELS).astype(np.int64)  # the lower half is negative
    out = images.clone()
    for number, name in enumerate(OPERATIONS):
        chosen = operation == number
        if name == "identity" or not chosen.any():
            continue
        levels = np.where(chosen, level if name not in ("autocontrast", "equalize") else 0, -1)
        for one in np.unique(levels[chosen]).tolist():
            rows = torch.from_numpy(np.flatnonzero(levels == one)).to(images.device, non_blocking=True)
            out[rows] = apply(images[rows], name, magnitude * signed_level(one))
    return out


def signed_level(level: int) -> float:
    """The strength of a level 0 .. 2 LEVELS - 1: -1, ..., -1/LEVELS, 1/LEVELS, ..., 1."""
    return (level - LEVELS) / LEVELS if level < LEVELS else (level - LEVELS + 1) / LEVELS


def apply(images: torch.Tensor, name: str, strength: float) -> torch.Tensor:
    """Apply one of `OPERATIONS` to images (N, 3, H, W) uint8, with a strength from -1 to 1. The ranges are those of
    RandAugment in torchvision; only brightness, contrast, saturation and sharpness use the sign."""
    from torchvision.transforms.v2 import functional as F

    factor, size = 1 + 0.9 * strength, abs(strength)
    match name:
        case "brightness":
            return F.adjust_brightness(images, factor)
        case "contrast":
            return F.adjust_contrast(images, factor)
        case "saturation":
            return F.adjust_saturation(images, factor)
        case "sharpness":
            return F.adjust_sharpness(images, factor)
        case "posterize":
            return F.posterize(images, 8 - round(4 * size))
        case "solarize":
            return F.solarize(images, 255 * (1 - size))
        case "autocontrast":
            return F.autocontrast(images)
        case "equalize":
            return F.equalize(images)
        case "identity":
            return images
    raise ValueError(f"'{name}' is not an operation: {', '.join(OPERATIONS)}")


def _erase(images: torch.Tensor, draws: np.ndarray, probability: float) -> torch.Tensor:
    """Replace a box of some images by the mean colour of the image.

    Args:
        draws: (5, N) uniform numbers: whether, then those of `boxes`.
    """
    inside = boxes(draws[1:], *images.shape[2:]) & (draws[0] < probability)[:, None, None]
    mean = images.float().mean((2, 3), keepdim=True).round().to(torch.uint8)
    return torch.where(torch.from_numpy(inside).to(images.device, non_blocking=True)[:, None], mean, images)


def boxes(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, height, width) bool: a random rectangle in each of N images. Sides that are too long are cut.

    Args:
        draws: (4, N) uniform numbers: area, ratio of the sides, and position across and down.
    """
    area, aspect, across, down = draws
    share = _AREA[0] + area * (_AREA[1] - _AREA[0])
    ratio = np.exp(math.log(_RATIO[0]) + aspect * (math.log(_RATIO[1]) - math.log(_RATIO[0])))
    h, w = (np.round(np.minimum(np.sqrt(s), 1) * side) for s, side in ((share * ratio, height), (share / ratio, width)))
    top, left = (np.floor(at * (side - size + 1)) for at, side, size in ((down, height, h), (across, width, w)))
    rows, columns = (
        (np.arange(side) >= first[:, None]) & (np.arange(side) < (first + size)[:, None])
        for side, first, size in ((height, top, h), (width, left, w))
    )
    return rows[:, :, None] & columns[:, None, :]
