"""Batched augmentation of images in memory, on the CPU or a device, for training without stored views."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.views import ViewPolicy

# Rec. 601.
_LUMA = (0.299, 0.587, 0.114)
_STEP = np.uint64(0x9E3779B97F4A7C15)


@overload
def random_views(
    images: torch.Tensor, policy: ViewPolicy, keys: torch.Tensor, *, salt: int = 0, size: int | None = None
) -> torch.Tensor: ...


@overload
def random_views(
    images: torch.Tensor,
    policy: ViewPolicy,
    keys: torch.Tensor,
    *,
    salt: int = 0,
    size: int | None = None,
    masks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def random_views(
    images: torch.Tensor,
    policy: ViewPolicy,
    keys: torch.Tensor,
    *,
    salt: int = 0,
    size: int | None = None,
    masks: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One random view of each image: resized crop, horizontal flip and colour changes.

    The random numbers of an image depend only on its key, so they are the same on every device and in every batch.
    Crops are sampled bilinearly without antialiasing, so the images should be at most twice as large as ``size``.

    Args:
        images: (N, 3, H, W) uint8.
        policy: ranges of the random changes.
        keys: (N,) int64, one for each image and visit; see `view_keys`.
        salt: number of the view, if a key has several views.
        size: side of the result; None: the shorter side of the images.
        masks: (N, H, W) uint8 label maps of the images.

    Returns:
        (N, 3, size, size) uint8 on the same device; with ``masks`` also (N, size, size) uint8, the masks with the same
        crop and flip, by nearest-neighbour sampling.
    """
    n, _, height, width = images.shape
    size = size or min(height, width)
    draws = uniforms(keys, salt, 8)
    boxes = _boxes(draws[:5], policy, height, width).to(images.device, non_blocking=True)
    grid = F.affine_grid(boxes, [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    strengths = (policy.brightness, policy.contrast, policy.saturation)
    if any(strengths):
        factors = [1 + (2 * u - 1) * x for u, x in zip(draws[5:], strengths, strict=True)]
        pixels = _recolour(pixels, *(f.to(pixels, non_blocking=True).view(n, 1, 1, 1) for f in factors))
    views = pixels.round_().clamp_(0, 255).to(torch.uint8)
    if masks is None:
        return views
    labels = F.grid_sample(masks[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return views, labels[:, 0].to(torch.uint8)


def view_keys(seed: int, rows: np.ndarray, visits: np.ndarray) -> torch.Tensor:
    """(N,) int64 keys for `random_views`: for row ``rows[i]`` at its visit number ``visits[i]``."""
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(np.asarray(rows, np.uint64) + _mix(np.uint64(seed % 2**63))) + np.asarray(visits, np.uint64))
    return torch.from_numpy(mixed.view(np.int64).copy())


def uniforms(keys: torch.Tensor, salt: int, count: int) -> torch.Tensor:
    """(count, N) float64 in [0, 1), determined by key, salt and row number."""
    values = keys.cpu().numpy().view(np.uint64)
    with np.errstate(over="ignore"):
        salted = _mix(values + _mix(np.uint64(salt + 1)))
        drawn = np.stack([_mix(salted + np.uint64(i + 1) * _STEP) for i in range(count)])
    return torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): maps consecutive numbers to pseudorandom ones."""
    z = np.asarray(x, np.uint64) + _STEP
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _boxes(draws: torch.Tensor, policy: ViewPolicy, height: int, width: int) -> torch.Tensor:
    """(N, 2, 3) affine maps from coordinates of the view (-1..1) to coordinates of the image, including the flip."""
    area, aspect, across, down, flip = draws
    low, high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    pixels = height * width * (policy.scale[0] + area * (policy.scale[1] - policy.scale[0]))
    ratio = torch.exp(low + aspect * (high - low))
    # Drawing again for boxes that do not fit would need a loop; clipping nearly preserves the distribution of areas.
    w = (torch.sqrt(pixels * ratio) / width).clamp(max=1.0)
    h = (torch.sqrt(pixels / ratio) / height).clamp(max=1.0)
    sign = torch.where(flip < policy.hflip, -1.0, 1.0)
    zero = torch.zeros_like(w)
    rows = [torch.stack([sign * w, zero, (2 * across - 1) * (1 - w)]), torch.stack([zero, h, (2 * down - 1) * (1 - h)])]
    return torch.stack(rows).permute(2, 0, 1).float()


@lru_cache
def _luma(device: torch.device) -> torch.Tensor:
    """The weights of the colours; kept, because a copy to a GPU makes the host wait."""
    return torch.tensor(_LUMA, device=device).view(1, 3, 1, 1)


def _recolour(pixels: torch.Tensor, b: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Brightness, saturation and contrast as one linear map; see `ktray.data.views`."""
    luma = (pixels * _luma(pixels.device)).sum(1, keepdim=True)
    return (b * c * s) * pixels + (b * c * (1 - s)) * luma + (b * (1 - c)) * luma.mean((2, 3), keepdim=True)
