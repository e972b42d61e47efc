"""Features of a network before its classifier or head: pooled features, and the last feature map."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ktray.errors import KtrayError


def trunk(model: nn.Module) -> Any:
    """The plain timm model in a student's network: its attribute ``timm_model`` if the network has another head,
    otherwise the network itself."""
    return getattr(model, "timm_model", model)


def is_convolutional(model: nn.Module) -> bool:
    """Whether a network has more than one convolution. A single one is the patch embedding of a transformer."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def feature_dim(model: nn.Module) -> int:
    """Width of the pooled features of a timm model, before its classifier."""
    width: Any = getattr(model, "head_hidden_size", None) or model.num_features
    return int(width)


def pooled_features(model: Any, x: torch.Tensor) -> torch.Tensor:
    """(N, 3, h, w) normalised float to pooled features (N, F) of a timm model, before the classifier."""
    out: torch.Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return out


class Features(nn.Module):
    """A module that returns a student's pooled features (N, F), e.g. for compilation. It shares the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pooled_features(trunk(self.model), x)


class Maps(nn.Module):
    """A module that returns a student's pooled features (N, F) and last map (N, M, h, w). It shares the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = trunk(self.model)
        features = model.forward_features(x)
        return model.forward_head(features, pre_logits=True), feature_map(model, features)


def feature_map(model: Any, features: torch.Tensor) -> torch.Tensor:
    """The result of ``forward_features`` of a timm model as a map (N, M, h, w), without prefix tokens.

    Raises:
        KtrayError: the features are not a map of positions.
    """
    positions = map_positions(model, features)
    if positions is None:
        raise KtrayError(
            f"{type(model).__name__} has no feature map", "Set objective.patches=0, or choose another student.name."
        )
    if features.ndim == 4:
        return features if features.shape[1] == model.num_features else features.permute(0, 3, 1, 2)
    side = math.isqrt(positions)
    tokens = features[:, -positions:]
    if side * side != positions:
        raise KtrayError(
            f"{type(model).__name__} has {positions} positions, which do not form a square map",
            "Set objective.patches=0.",
        )
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def map_positions(model: Any, features: Any) -> int | None:
    """Number of positions in the last feature map or token sequence of a timm model; None if there is none."""
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
    """(M, side) of a student's last map, for input images of ``size`` pixels."""
    was = model.training
    model.eval()
    parameter = next(model.parameters())
    try:
        last_map = Maps(model)(torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device))[1]
    finally:
        model.train(was)
    return int(last_map.shape[1]), int(last_map.shape[-1])


def freeze_idle(model: nn.Module, reader: nn.Module, size: int) -> None:
    """Freeze the parameters of ``model`` that do not influence the output of ``reader``, such as an unused classifier.

    Otherwise the optimizer and DDP would wait for their gradients.

    Args:
        model: the model; it is changed in place.
        reader: the model itself, or a module that shares it.
        size: side of the input, in pixels.
    """
    was = reader.training
    trainable = [p for p in model.parameters() if p.requires_grad]
    reader.eval()
    try:
        with torch.enable_grad():
            out = reader(torch.zeros(1, 3, size, size, device=trainable[0].device, dtype=trainable[0].dtype))
            total = sum(part.float().sum() for part in (out if isinstance(out, tuple) else (out,)))
            gradients = torch.autograd.grad(total, trainable, allow_unused=True)
    finally:
        reader.train(was)
    for parameter, gradient in zip(trainable, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
