"""Low-rank adaptation of a tower (LoRA, Hu et al., arXiv 2106.09685, section 4.1).

The weight W (out, in) of a layer stays frozen, and a product of two small matrices is trained in addition:

    W' = W + alpha / r * B A,   with A (r, in) random and B (out, r) zero at the start,

so that training starts from the base model. The adapted layers are the linear layers of attention and MLP, which
include the packed projections of ``nn.MultiheadAttention``, and the 1 x 1 convolutions, which are linear in the
channels. Afterwards the products are added to the weights, and the tower is an ordinary one again.

The products are formed as weights (`torch.nn.utils.parametrize`) and not as a second path for the activations, because
``nn.MultiheadAttention`` reads the weights of its layers directly. So the memory of the optimizer is saved, and not the
time for the gradients of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from ktray.errors import KtrayError


class LowRank(nn.Module):
    """The parametrisation of one weight.

    Args:
        weight: (out, in) or (out, in, 1, 1).
        rank: r; at most the smaller side of the weight is used.
        alpha: the product is scaled by ``alpha / rank``.

    Attributes:
        a, b: the matrices A (r, in) and B (out, r).
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, width = weight.shape[:2]
        used = min(rank, out, width)
        self.scale = alpha / rank
        # With this deviation, A x has the size of a component of x.
        a = torch.randn(used, width, dtype=weight.dtype) / math.sqrt(width)
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(weight.new_zeros(out, used))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * (self.b @ self.a).view_as(weight)


def add_lora(tower: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze a tower, and add trainable products of low rank to the weights of its layers; changes it in place.

    Args:
        tower: an image tower of any family.
        rank, alpha: see `LowRank`.
        seed: seed of the matrices A, which are the same on every device.

    Raises:
        KtrayError: the tower has no linear layer and no 1 x 1 convolution.
    """
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    adapted = list(_adapted(tower))
    if not adapted:
        raise KtrayError(
            "The teacher has no linear layers and no 1 x 1 convolutions, which teacher.adapt=lora adapts",
            "Set teacher.adapt=finetune or probe.",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module, name in adapted:
            weight = getattr(module, name)
            parametrize.register_parametrization(module, name, LowRank(weight, rank, alpha))


def merge_lora(tower: nn.Module) -> None:
    """Add the products to the weights and remove what `add_lora` has added; changes the tower in place.

    Copies of the tower (``deepcopy``) cannot be used afterwards: torch keeps the properties of adapted weights in the
    class of a layer, which its copies share.
    """
    for module in list(tower.modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _adapted(tower: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in tower.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield module, "in_proj_weight"
        elif isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
        ):
            yield module, "weight"
