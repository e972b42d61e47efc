"""Maps of logits or features: resizing, and the loss on label maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ktray.data.labelled.masks import IGNORE


def resize_map(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, C, h, w) to (N, C, *size), bilinear with half-pixel centres."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def map_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over labelled pixels.

    Logits are compared at the resolution of the labels (as in DeepLabV3, arXiv 1706.05587, section 4.1).

    Args:
        logits: (N, C, h, w).
        labels: (N, H, W) uint8 or int64; pixels with the value 255 are ignored.

    Returns:
        A scalar; 0, with gradients of 0, if all pixels are ignored.
    """
    resized = resize_map(logits.float(), (labels.shape[1], labels.shape[2]))
    total = F.cross_entropy(resized, labels.long(), ignore_index=IGNORE, reduction="sum")
    # reduction="mean" would be NaN without labelled pixels.
    return total / (labels != IGNORE).sum().clamp(min=1)
