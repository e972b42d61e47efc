"""The schedule of the learning rate, and the groups of parameters of the optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate at a step: a linear warm-up to 1, then half a cosine down to 0.

    Args:
        step: number of the step, from 0.
        steps: number of steps in all.
        warmup: share of the steps in which the rate rises.
    """
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def decay_groups(
    model: nn.Module, weight_decay: float, lr_scale: float = 1.0, frozen: float = 0.0
) -> list[dict[str, Any]]:
    """Two groups for the optimizer: matrices and kernels with weight decay, biases and norms without. In the share
    ``frozen`` of the steps at the start, they do not change."""
    named = [p for p in model.parameters() if p.requires_grad]
    both = {"lr_scale": lr_scale, "frozen": frozen}
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay, **both},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0, **both},
    ]
    return [g for g in groups if g["params"]]
