"""Mix pairs of images of a batch, and their targets with the same weight: mixup and CutMix."""

from __future__ import annotations

import numpy as np
import torch


def mix(
    images: torch.Tensor, targets: torch.Tensor, mixup_alpha: float, cutmix_alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a batch by `mixup` or `cutmix`. If both are on, each batch draws one of them with equal probability.

    Args:
        images, targets, generator: as in `mixup`.
        mixup_alpha, cutmix_alpha: parameters of the Beta distributions; 0: off.
    """
    if mixup_alpha > 0 and cutmix_alpha > 0:
        first = bool(_draws(generator, salt=1).random() < 0.5)
        mixup_alpha, cutmix_alpha = (mixup_alpha, 0.0) if first else (0.0, cutmix_alpha)
    if mixup_alpha > 0:
        return mixup(images, targets, mixup_alpha, generator)
    if cutmix_alpha > 0:
        return cutmix(images, targets, cutmix_alpha, generator)
    return images, targets


def mixup(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix pairs of images and, with the same weight, their targets (Zhang et al., arXiv 1710.09412, eq. 1).

    Each batch has one weight lambda ~ Beta(alpha, alpha) and one random pairing, as in the authors' experiments.

    Args:
        images: (N, C, H, W) floating point.
        targets: (N, K) soft targets, or maps of them (N, K, h, w).
        alpha: parameter of the Beta distribution, above 0.
        generator: source of the weight and the pairing.

    Returns:
        ``lambda x + (1 - lambda) x[pairing]`` for images and for targets.
    """
    weight = float(_draws(generator).beta(alpha, alpha))
    pairing = _pairing(images, generator)
    return images.lerp(images[pairing], 1 - weight), targets.lerp(targets[pairing], 1 - weight)


def cutmix(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste a box of another image into each image, and mix the targets by the area of the box (Yun et al., arXiv
    1905.04899, section 3.1).

    Each batch has one lambda ~ Beta(alpha, alpha), one box and one random pairing. The box has the share 1 - lambda of
    the area and a uniformly drawn centre. It is clipped at the border, and lambda is then the share that is kept.

    Args:
        images: (N, C, H, W) floating point.
        targets: (N, K) soft targets, which are mixed by area; or maps (N, K, h, w), in which each cell takes the target
            of the image that its centre shows.
        alpha: parameter of the Beta distribution, above 0.
        generator: source of lambda, the box and the pairing.
    """
    height, width = images.shape[2:]
    draws = _draws(generator)
    side = float(np.sqrt(1 - draws.beta(alpha, alpha)))
    y, x = draws.integers(height), draws.integers(width)
    top, bottom = (int(np.clip(y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
    pairing = _pairing(images, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[pairing, :, top:bottom, left:right]
    if targets.ndim == 4:
        pasted = np.zeros((height, width), bool)
        pasted[top:bottom, left:right] = True
        rows, columns = (_centres(n, side) for n, side in zip(targets.shape[2:], (height, width), strict=True))
        cells = torch.from_numpy(pasted[np.ix_(rows, columns)]).to(targets.device, non_blocking=True)
        return mixed, torch.where(cells, targets[pairing], targets)
    return mixed, targets.lerp(targets[pairing], (bottom - top) * (right - left) / (height * width))


def _draws(generator: torch.Generator, salt: int = 0) -> np.random.Generator:
    """A generator of numbers on the host. A number from a GPU would make the host wait for the GPU, so the seed of its
    generator, which is new in each step, takes its place."""
    if generator.device.type == "cuda":
        return np.random.default_rng([generator.initial_seed(), salt])
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def _pairing(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)


def _centres(cells: int, pixels: int) -> np.ndarray:
    """The pixels at the centres of ``cells`` equal parts of an axis."""
    return ((np.arange(cells) + 0.5) * pixels / cells).astype(np.int64)
