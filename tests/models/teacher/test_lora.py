"""Low-rank adaptation: an unchanged start, gradients in the products only, and a merge that changes nothing."""

from __future__ import annotations

from copy import deepcopy

import open_clip
import pytest
import timm
import torch
from torch import nn

from ktray.errors import KtrayError
from ktray.models.flops import forward_flops, train_flops
from ktray.models.teacher.layers import layer_decay_groups
from ktray.models.teacher.lora import LowRank, add_lora, merge_lora

RANK, ALPHA = 3, 6.0
CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}
RESNET = {**CLIP, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16}}


def tower(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ("clip", "clip_resnet"):
        config = CLIP if name == "clip" else RESNET
        vision = open_clip.CLIP(**config).visual
        for parameter in vision.parameters():  # open_clip starts some of them at zero
            nn.init.normal_(parameter, std=0.1)
        return vision.eval()
    module = timm.create_model(name, num_classes=0).eval()
    for key, parameter in module.named_parameters():
        if key.endswith("gamma"):  # ConvNeXt starts the scales of its blocks at almost zero
            nn.init.normal_(parameter)
    return module


def trained(module: nn.Module) -> nn.Module:
    """The tower with products that are not zero."""
    add_lora(module, RANK, ALPHA, seed=1)
    torch.manual_seed(2)
    for low in lows(module):
        nn.init.normal_(low.b, std=0.1)
    return module


def lows(module: nn.Module) -> list[LowRank]:
    return [m for m in module.modules() if isinstance(m, LowRank)]


TOWERS = pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_vit", 6 * 4),  # qkv, proj, fc1 and fc2 of six blocks
        ("clip", 2 * 4),  # in_proj, out_proj, c_fc and c_proj of two blocks
        ("clip_resnet", 4 * 3 + 4),  # conv1, conv3 and downsample of four blocks; the attention pool
        ("test_efficientnet", None),
        ("test_convnext", None),
    ],
)


@TOWERS
def test_the_start_is_the_base_and_only_products_learn(name: str, layers: int | None) -> None:
    base, adapted = tower(name), tower(name)
    add_lora(adapted, RANK, ALPHA, seed=1)
    assert layers is None or len(lows(adapted)) == layers
    assert lows(adapted)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    with_gradient = {n for n, p in adapted.named_parameters() if p.grad is not None}
    expected = {n for n, p in adapted.named_parameters() if n.endswith((".0.a", ".0.b"))}
    assert with_gradient == expected
    assert all(low.a.grad is not None and not low.a.grad.any() for low in lows(adapted))  # because B is zero
    assert any(low.b.grad is not None and low.b.grad.any() for low in lows(adapted))
    grouped = {id(p) for group in layer_decay_groups(adapted, 1.0, 0.0) for p in group["params"]}
    assert grouped == {id(p) for n, p in adapted.named_parameters() if n in expected}


@TOWERS
def test_the_merged_tower_is_the_formula_and_an_ordinary_one(name: str, layers: int | None) -> None:
    """Reference: the products are added to the weights of an untouched tower by hand."""
    reference, adapted = tower(name), trained(tower(name))
    state = {k: v.clone() for k, v in reference.state_dict().items()}
    for key, value in adapted.state_dict().items():
        if key.endswith(".0.a"):
            place, _, rest = key.rpartition(".parametrizations.")
            target = f"{place}.{rest.partition('.')[0]}"
            b = adapted.state_dict()[f"{key[:-1]}b"]
            product = torch.einsum("or,ri->oi", b.double(), value.double()) * (ALPHA / RANK)
            state[target] = (state[target].double() + product.reshape(state[target].shape)).float()
    reference.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = adapted(x)
        assert not torch.allclose(before, tower(name)(x), atol=1e-3)
        assert torch.allclose(before, reference(x), atol=1e-5)
        merge_lora(adapted)
        assert torch.equal(adapted(x), before)
    assert set(adapted.state_dict()) == set(state)
    assert type(adapted) is type(reference)
    assert [type(m) for m in adapted.modules()] == [type(m) for m in reference.modules()]
    tower(name).load_state_dict(adapted.state_dict())


def test_one_linear_layer_is_the_papers_equation() -> None:
    """h = W x + alpha / r * B A x (arXiv 2106.09685, equation 3), computed as two paths."""
    layer = nn.Sequential(nn.Linear(7, 5))
    weight, bias = layer[0].weight.detach().clone(), layer[0].bias.detach().clone()
    trained(layer)
    (low,) = lows(layer)
    assert (low.a.shape, low.b.shape) == ((RANK, 7), (5, RANK))
    x = torch.rand(4, 7)
    expected = x @ weight.T + bias + ALPHA / RANK * ((x @ low.a.T) @ low.b.T)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_the_products_are_drawn_from_the_seed_alone() -> None:
    drawn = []
    for noise, seed in ((0, 1), (5, 1), (0, 2)):
        module = tower("test_vit")
        torch.manual_seed(noise)
        add_lora(module, RANK, ALPHA, seed)
        drawn.append(torch.cat([low.a.flatten() for low in lows(module)]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_copy_counts_and_computes_the_same() -> None:
    """The training loop counts the FLOPs of a step on a copy, which is never merged."""
    module = trained(tower("clip"))
    other, x = deepcopy(module), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(module(x), other(x))
    lows(other)[0].b.data.zero_()
    assert lows(module)[0].b.any()
    assert train_flops(module, (3, 32, 32)) > 2 * forward_flops(tower("clip"), (3, 32, 32))


def test_a_rank_above_the_size_of_a_layer_is_cut() -> None:
    module = nn.Sequential(nn.Linear(7, 2))
    add_lora(module, 8, 16.0, 0)
    assert lows(module)[0].a.shape == (2, 7)


def test_a_tower_without_such_layers_is_an_error() -> None:
    with pytest.raises(KtrayError, match=r"no linear layers.*teacher.adapt=finetune"):
        add_lora(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 4.0, 0)
