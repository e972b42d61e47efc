"""Floating-point operations (FLOPs), counted on the executed graph.

`torch.utils.flop_counter` counts matrix products, convolutions and attention (a multiply-add counts as two). Norms,
activations and other elementwise operations, a few per cent in these models, are not counted.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ktray.models.lean_calls import FlopCounterMode

_ALONE = threading.RLock()


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of everything that `run` executes, including backward passes.

    Attention is executed as plain matrix products, so that the count of a model is the same on every device: fused
    kernels recompute in the backward pass, or are invisible to the counter, such as the encoder's fast path.
    """
    # The choice of kernels belongs to the process. Two counts at once would restore each other's choice.
    with _ALONE:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                run()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def forward_flops(model: nn.Module, input_shape: tuple[int, ...], batch: int = 2) -> float:
    """FLOPs per sample of a forward pass in evaluation mode.

    Args:
        model: takes one float tensor; its device is used (``meta`` computes nothing).
        input_shape: one sample's shape, e.g. (3, 224, 224).
        batch: number of samples that are counted together; costs per batch are divided by it.
    """
    x = _input(model, input_shape, batch)
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            return count_flops(lambda: model(x)) / batch
    finally:
        model.train(was)


def train_flops(model: nn.Module, input_shape: tuple[int, ...], batch: int = 2) -> float:
    """FLOPs per sample of a forward and a backward pass in training mode, on a copy of the model.

    Frozen parameters get no gradient, so a frozen tower costs only its forward pass.

    Args:
        model, input_shape, batch: see `forward_flops`.
    """
    copy = deepcopy(model).train()
    x = _input(copy, input_shape, batch)

    def step() -> None:
        out = copy(x)
        first = out[0] if isinstance(out, tuple) else out
        first.float().sum().backward()

    return count_flops(step) / batch


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model on the meta device, which needs no memory and has the same counts; for plans.

    `build` must not read weights. For teachers, use ``build_teacher(source, device="meta").image_tower``.
    """
    with torch.device("meta"):
        return build()


def _convolution_backward(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """FLOPs from shapes: those of the forward pass once for the input's gradient and once for the weight's gradient.

    torch's own formula (2.15) ignores the groups in the weight's gradient, so that a depthwise convolution counts as a
    dense one: 2.4 times too much for a whole training step of a small ConvNeXt.
    """
    positions = x[2:] if transposed else grad_out[2:]
    forward = 2 * x[0] * math.prod(positions) * math.prod(weight)
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


def _input(model: nn.Module, shape: tuple[int, ...], batch: int) -> torch.Tensor:
    first = next(model.parameters())
    return torch.zeros(batch, *shape, device=first.device, dtype=first.dtype)
