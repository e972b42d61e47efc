"""The parameters of an image tower in layers from input to output, for layer-wise learning rates.

Layer-wise decay as in ELECTRA (arXiv 2003.10555, appendix A) and BEiT (arXiv 2106.08254): the learning
rate of the layer ``d`` below the top is multiplied by ``layer_decay ** d``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ktray.recipe.registries import TEACHERS

Layer = list[tuple[str, nn.Parameter]]


class LayerOrder:
    """Maps the name of a parameter to the number of its layer: the first matching prefix, or else the last layer."""

    def __init__(self, prefixes: dict[str, int], last: int) -> None:
        self.prefixes, self.last = prefixes, last

    def __call__(self, name: str) -> int:
        return next((n for prefix, n in self.prefixes.items() if name.startswith(prefix)), self.last)


def tower_layers(tower: nn.Module) -> list[Layer]:
    """All parameters of a tower, each exactly once, in layers from input to output.

    Args:
        tower: an image tower of any family. If no family recognises it, its child modules are the layers.
    """
    order = _order(tower)
    layers: dict[int, Layer] = {}
    for name, parameter in tower.named_parameters():
        layers.setdefault(order(name), []).append((name, parameter))
    return [layers[number] for number in sorted(layers)]


def layer_decay_groups(tower: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups ``{"params", "lr_scale", "weight_decay"}``; no weight decay for biases and norms.

    The last layer has ``lr_scale`` 1. Frozen parameters are omitted.
    """
    layers = tower_layers(tower)
    groups = []
    for depth, layer in enumerate(reversed(layers)):
        trainable = [p for _, p in layer if p.requires_grad]
        for decayed in (True, False):
            params = [p for p in trainable if (p.ndim > 1) is decayed]
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
    recognised = next((order for order in orders if order is not None), None)
    if recognised is not None:
        return recognised
    children = {f"{name}.": i for i, (name, _) in enumerate(tower.named_children())}
    return LayerOrder(children, len(children))
