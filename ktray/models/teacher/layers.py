"""An image tower's parameters in layers from input to output, for learning rates that fall with depth.

Layer-wise decay as in ELECTRA (arXiv 2003.10555, appendix A) and BEiT (arXiv 2106.08254): the layer that is
``d`` below the top learns at ``layer_decay ** d`` times the rate.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ktray.recipe.registries import TEACHERS

Layer = list[tuple[str, nn.Parameter]]


class LayerOrder:
    """Number of a parameter's layer by its name: the first prefix that matches, else the last layer."""

    def __init__(self, prefixes: dict[str, int], last: int) -> None:
        self.prefixes, self.last = prefixes, last

    def __call__(self, name: str) -> int:
        return next((n for prefix, n in self.prefixes.items() if name.startswith(prefix)), self.last)


def tower_layers(tower: nn.Module) -> list[Layer]:
    """Every parameter of a tower exactly once, in layers from input to output.

    Args:
        tower: an image tower of any family; of one that no family knows, the child modules are the layers.
    """
    order = _order(tower)
    layers: dict[int, Layer] = {}
    for name, parameter in tower.named_parameters():
        layers.setdefault(order(name), []).append((name, parameter))
    return [layers[number] for number in sorted(layers)]


def layer_decay_groups(tower: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups ``{"params", "lr_scale", "weight_decay"}``; biases and norms are not decayed.

    The last layer has ``lr_scale`` 1. Parameters that need no gradient are left out.
    """
    layers = tower_layers(tower)
    groups = []
    for depth, layer in enumerate(reversed(layers)):
        free = [p for _, p in layer if p.requires_grad]
        for decayed in (True, False):
            params = [p for p in free if (p.ndim > 1) is decayed]
            if params:
                groups.append(
                    {
                        "params": params,
                        "lr_scale": layer_decay**depth,
                        "weight_decay": weight_decay if decayed else 0.0,
                    }
                )
    return groups


def _order(tower: nn.Module) -> LayerOrder:
    orders = (family.layer_order(tower) for _, family in TEACHERS)
    known = next((order for order in orders if order is not None), None)
    if known is not None:
        return known
    children = {f"{name}.": i for i, (name, _) in enumerate(tower.named_children())}
    return LayerOrder(children, len(children))
