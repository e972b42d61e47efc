"""What is read of a student before its classifier or its own head: pooled features, and the last map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ktray.errors import KtrayError


def trunk(model: nn.Module) -> Any:
    """The plain timm model in a student's network: its ``timm_model`` where it has one under a head of its own, else
    the network itself."""
    return getattr(model, "timm_model", model)


def feature_dim(model: nn.Module) -> int:
    """Width of a timm model's pooled features, before its classifier."""
    width: Any = getattr(model, "head_hidden_size", None) or model.num_features
    return int(width)


def pooled_features(model: Any, x: torch.Tensor) -> torch.Tensor:
    """(N, 3, h, w) normalised float to pooled features (N, F) of a timm model, before the classifier."""
    out: torch.Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return out


class Features(nn.Module):
    """A student's pooled features (N, F) as a module of its own, e.g. to be compiled; the model is shared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pooled_features(trunk(self.model), x)


class Maps(nn.Module):
    """A student's pooled features (N, F) and its last map (N, M, h, w); the model is shared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = trunk(self.model)
        features = model.forward_features(x)
        return model.forward_head(features, pre_logits=True), feature_map(model, features)


def feature_map(model: Any, features: torch.Tensor) -> torch.Tensor:
    """What ``forward_features`` of a timm model gives, as a map (N, M, h, w); prefix tokens are left out.

    Raises:
        KtrayError: it is no map of positions.
    """
    positions = map_positions(model, features)
    if positions is None:
        raise KtrayError(
            f"{type(model).__name__} has no map of features", "Set objective.patches=0, or another student.name."
        )
    if features.ndim == 4:
        return features if features.shape[1] == model.num_features else features.permute(0, 3, 1, 2)
    side = math.isqrt(positions)
    tokens = features[:, -positions:]
    if side * side != positions:
        raise KtrayError(f"{type(model).__name__} has {positions} positions, no square map", "Set objective.patches=0.")
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def map_positions(model: Any, features: Any) -> int | None:
    """Positions in the last map of features or tokens of a timm model; None where there is no such map."""
    if not isinstance(features, torch.Tensor):
        return None
    if features.ndim == 3:
        return int(features.shape[1]) - int(getattr(model, "num_prefix_tokens", 0))
    if features.ndim == 4:
        channels_first = features.shape[1] == model.num_features
        rows, columns = features.shape[2:] if channels_first else features.shape[1:3]
        return int(rows * columns)
    return None


@torch.no_grad()
def map_shape(model: nn.Module, size: int) -> tuple[int, int]:
    """(M, side) of a student's last map at this input size, pixels."""
    was = model.training
    model.eval()
    like = next(model.parameters())
    try:
        found = Maps(model)(torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))[1]
    finally:
        model.train(was)
    return int(found.shape[1]), int(found.shape[-1])


def freeze_idle(model: nn.Module, reader: nn.Module, size: int) -> None:
    """Freeze the parameters of ``model`` that take no part in what ``reader`` gives, such as an unread classifier, so
    that neither the optimizer nor DDP waits for their gradients.

    Args:
        reader: the model itself, or a module that shares it.
        size: side of the input, pixels.
    """
    was = reader.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    reader.eval()
    try:
        with torch.enable_grad():
            out = reader(torch.zeros(1, 3, size, size, device=wanted[0].device, dtype=wanted[0].dtype))
            total = sum(part.float().sum() for part in (out if isinstance(out, tuple) else (out,)))
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    finally:
        reader.train(was)
    for parameter, gradient in zip(wanted, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
