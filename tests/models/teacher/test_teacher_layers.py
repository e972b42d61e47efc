from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import timm
from torch import nn

from ktray.models.teacher.layers import layer_decay_groups, tower_layers


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_every_parameter_of_a_timm_model_once(name: str) -> None:
    model = timm.create_model(name, num_classes=0)
    found = [n for layer in tower_layers(model) for n, _ in layer]
    assert sorted(found) == sorted(n for n, _ in model.named_parameters())
    assert len(tower_layers(model)) > 3


def test_open_clip_vit_goes_from_stem_to_blocks(tiny_clip: SimpleNamespace) -> None:
    names = [[n for n, _ in layer] for layer in tower_layers(tiny_clip.model.visual)]
    assert len(names) == 3
    assert set(names[0]) == {
        "class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias",
    }  # fmt: skip
    assert all(n.startswith("transformer.resblocks.0.") for n in names[1])
    assert "proj" in names[2]
    assert sum(map(len, names)) == len(list(tiny_clip.model.visual.named_parameters()))


def test_rates_fall_by_the_decay_per_block() -> None:
    model = timm.create_model("test_vit", num_classes=0)
    groups = layer_decay_groups(model, 0.5, 0.1)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(scale) == len(list(model.parameters()))
    blocks = {int(m[1]): scale[id(p)] for n, p in model.named_parameters() if (m := re.match(r"blocks\.(\d+)\.", n))}
    last = max(blocks)
    assert scale[id(model.norm.weight)] == 1.0
    for i in range(last):
        assert blocks[i] == pytest.approx(0.5 * blocks[i + 1])
    assert scale[id(model.cls_token)] == pytest.approx(0.5 * blocks[0])
    assert decay[id(model.blocks[0].mlp.fc1.weight)] == 0.1
    assert decay[id(model.blocks[0].mlp.fc1.bias)] == 0.0


def test_frozen_parameters_and_unknown_towers() -> None:
    tower = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    tower[0].weight.requires_grad_(False)
    groups = layer_decay_groups(tower, 0.5, 0.0)
    assert [(g["lr_scale"], len(g["params"])) for g in groups] == [(1.0, 1), (1.0, 1), (0.5, 1)]
