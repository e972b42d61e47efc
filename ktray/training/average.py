"""The averaged weights of a training."""

from __future__ import annotations

import torch
from torch import nn


class Average:
    """Exponential moving average of a model's weights and float buffers; integer buffers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        # Early steps average over fewer steps, otherwise the random initial weights would keep their influence.
        decay = min(self.decay, (1 + step) / (10 + step))
        live = model.state_dict()
        floats = [k for k, v in self.state.items() if v.is_floating_point()]
        counts = [k for k, v in self.state.items() if not v.is_floating_point()]
        # One call for all tensors: a kernel for each of them would take longer than their work on a GPU.
        torch._foreach_lerp_([self.state[k] for k in floats], [live[k] for k in floats], 1 - decay)
        if counts:
            torch._foreach_copy_([self.state[k] for k in counts], [live[k] for k in counts])
