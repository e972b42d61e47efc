"""An image tower's parameters in layers from input to output, for learning rates that fall with depth.

Layer-wise decay as in ELECTRA (arXiv 2003.10555, appendix A) and BEiT (arXiv 2106.08254): the layer that is
``d`` below the top learns at ``layer_decay ** d`` times the rate.
"""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn

Layer = list[tuple[str, nn.Parameter]]


def tower_layers(tower: nn.Module) -> list[Layer]:
    """Every parameter of a tower exactly once, in layers from input to output.

    Args:
        tower: a timm model, or the image tower of an open_clip model.
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


class _Order:
    """Number of a parameter's layer by its name: the first prefix that matches, else the last layer."""

    def __init__(self, prefixes: dict[str, int], last: int) -> None:
        self.prefixes, self.last = prefixes, last

    def __call__(self, name: str) -> int:
        return next((n for prefix, n in self.prefixes.items() if name.startswith(prefix)), self.last)


def _order(tower: nn.Module) -> _Order:
    # Slow to import, and students do without it.
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, TimmModel):
        trunk = _order(tower.trunk)
        return _Order({f"trunk.{k}": v for k, v in trunk.prefixes.items()}, trunk.last)
    if isinstance(tower, VisionTransformer):
        stem = ("conv1.", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre.")
        blocks = len(tower.transformer.resblocks)
        prefixes = {**dict.fromkeys(stem, 0), **{f"transformer.resblocks.{i}.": i + 1 for i in range(blocks)}}
        # The last norm and the projection learn with the last block.
        return _Order(prefixes, blocks)
    if isinstance(tower, ModifiedResNet):
        stages = {f"layer{i}.": i for i in range(1, 5)}
        return _Order({**dict.fromkeys(("conv", "bn"), 0), **stages}, 5)
    if hasattr(tower, "group_matcher"):
        matcher: Any = tower.group_matcher
        by_layer = group_parameters(tower, matcher(coarse=False))
        return _Order({n: i for i, names in by_layer.items() for n in names}, max(by_layer))
    children = {f"{name}.": i for i, (name, _) in enumerate(tower.named_children())}
    return _Order(children, len(children))
