"""Augmentation of resident images in batches, on whatever device they lie: for training that caches nothing."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F

from ktray.data.views import ViewPolicy

# Rec. 601.
_LUMA = (0.299, 0.587, 0.114)


def random_views(
    images: torch.Tensor, policy: ViewPolicy, *, seed: int, step: int, size: int | None = None
) -> torch.Tensor:
    """One random view of each image: resized crop, horizontal flip, colour, as `ViewPolicy` says.

    The draws follow from (seed, step) and the batch size alone, on the CPU, so they are the same on every
    device. Crops are sampled bilinearly without antialiasing: keep canvases at most twice as large as ``size``.

    Args:
        images: (N, 3, H, W) uint8.
        size: side of the result; None: the shorter side of the images.

    Returns:
        (N, 3, size, size) uint8 on the same device.
    """
    n, _, height, width = images.shape
    size = size or min(height, width)
    digest = hashlib.blake2b(f"{seed}\0{step}".encode(), digest_size=8, person=b"ktray.augment").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    draws = torch.rand((8, n), generator=generator, dtype=torch.float64)
    grid = F.affine_grid(
        _boxes(draws[:5], policy, height, width).to(images.device), [n, 3, size, size], align_corners=False
    )
    pixels = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    strengths = (policy.brightness, policy.contrast, policy.saturation)
    if any(strengths):
        factors = [1 + (2 * u - 1) * x for u, x in zip(draws[5:], strengths, strict=True)]
        pixels = _recolour(pixels, *(f.to(pixels).view(n, 1, 1, 1) for f in factors))
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _boxes(draws: torch.Tensor, policy: ViewPolicy, height: int, width: int) -> torch.Tensor:
    """(N, 2, 3) maps from the result's coordinates (-1..1) to the image's, with the flip in them."""
    area, aspect, across, down, flip = draws
    low, high = math.log(policy.ratio[0]), math.log(policy.ratio[1])
    pixels = height * width * (policy.scale[0] + area * (policy.scale[1] - policy.scale[0]))
    ratio = torch.exp(low + aspect * (high - low))
    # Redrawing boxes that do not fit would need a loop; cutting them to the image keeps the area's law nearly.
    w = (torch.sqrt(pixels * ratio) / width).clamp(max=1.0)
    h = (torch.sqrt(pixels / ratio) / height).clamp(max=1.0)
    sign = torch.where(flip < policy.hflip, -1.0, 1.0)
    zero = torch.zeros_like(w)
    rows = [torch.stack([sign * w, zero, (2 * across - 1) * (1 - w)]), torch.stack([zero, h, (2 * down - 1) * (1 - h)])]
    return torch.stack(rows).permute(2, 0, 1).float()


def _recolour(pixels: torch.Tensor, b: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Brightness, saturation, contrast as one linear map; see `ktray.data.views`."""
    weights = torch.tensor(_LUMA, device=pixels.device).view(1, 3, 1, 1)
    luma = (pixels * weights).sum(1, keepdim=True)
    return (b * c * s) * pixels + (b * c * (1 - s)) * luma + (b * (1 - c)) * luma.mean((2, 3), keepdim=True)


def mixup(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix pairs of images and, with the same weight, their targets (Zhang et al., arXiv 1710.09412, eq. 1).

    One weight lambda ~ Beta(alpha, alpha) a batch and one random pairing, as in the authors' experiments.

    Args:
        images: (N, C, H, W) floating point.
        targets: (N, K) soft targets.
        alpha: above 0.
        generator: its state alone decides the weight and the pairing.

    Returns:
        ``lambda x + (1 - lambda) x[pairing]`` of both.
    """
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    pairing = torch.randperm(len(images), generator=generator, device=device).to(images.device)
    return images.lerp(images[pairing], 1 - weight), targets.lerp(targets[pairing], 1 - weight)
