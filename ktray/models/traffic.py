"""The memory traffic of a model: how many values its operations read and write, counted on the executed graph.

Eager PyTorch runs one operation after the other, and each reads its inputs from memory and writes its outputs to it.
Many models wait for memory rather than for arithmetic, so FLOPs alone do not say how long they take (the roofline
model: Williams et al., Communications of the ACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BATCH = 32  # samples that are counted together, as each reads the same weights


def forward_traffic(model: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Values per sample that a forward pass in evaluation mode reads and writes.

    Args:
        model: takes one float tensor; on the ``meta`` device nothing is computed.
        input_shape: one sample's shape, e.g. (3, 224, 224).
    """
    was = model.training
    model.eval()
    x = _input(model, input_shape)
    try:
        with torch.no_grad():
            return _count(lambda: model(x)) / _BATCH
    finally:
        model.train(was)


def train_traffic(model: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Values per sample that a forward and a backward pass in training mode read and write, on a copy of the model."""
    copy = deepcopy(model).train()
    x = _input(copy, input_shape)

    def step() -> None:
        out = copy(x)
        first = out[0] if isinstance(out, tuple) else out
        first.float().sum().backward()

    return _count(step) / _BATCH


def _count(run: Callable[[], object]) -> float:
    with _Traffic() as counter:
        run()
    return counter.values


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):  # a view moves nothing
            touched = [*tree_leaves((args, kwargs or {})), *tree_leaves(out)]
            self.values += sum(value.numel() for value in touched if isinstance(value, torch.Tensor))
        return out


def _input(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    first = next(model.parameters())
    return torch.zeros(_BATCH, *shape, device=first.device, dtype=first.dtype)
