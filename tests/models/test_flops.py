from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ktray.models.flops import count_flops, forward_flops, on_meta, train_flops
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource


def test_linear_and_convolution_are_two_per_multiply_add() -> None:
    assert forward_flops(nn.Linear(7, 5), (7,)) == 2 * 7 * 5
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert forward_flops(conv, (4, 8, 8)) == 2 * (6 * 4 * 4) * (4 // 2) * 3 * 3


def test_backward_costs_a_product_for_weights_and_one_for_inputs() -> None:
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    # The first layer's input needs no gradient.
    assert train_flops(net, (7,)) == 2 * 7 * 5 * 2 + 2 * 5 * 3 * 3
    net[0].requires_grad_(False)
    assert train_flops(net, (7,)) == 2 * 7 * 5 + 2 * 5 * 3 * 2
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_backward_of_a_convolution_costs_two_forwards_whatever_the_groups(layer: type, groups: int) -> None:
    conv = layer(8, 8, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 8, 10, 10, requires_grad=True)
    forward = count_flops(lambda: conv(x))
    assert forward == 2 * 2 * (10 * 10 if layer is nn.ConvTranspose2d else 5 * 5) * 8 * (8 // groups) * 9
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * forward


def test_attention_is_counted() -> None:
    q = torch.randn(2, 3, 5, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 3 * (2 * 5 * 5 * 8) * 2


def test_attention_is_counted_in_evaluation_of_multihead_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tokens = 6
    linear = 2 * tokens * (16 * 48 + 16 * 16 + 16 * 32 + 32 * 16)
    attention = 2 * (2 * tokens * tokens * 16)
    assert forward_flops(layer, (tokens, 16)) == linear + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_counts_at_once_leave_the_choice_of_kernels_as_it_was() -> None:
    """The second count begins while the first one runs, and would end after it."""
    first, second = threading.Event(), threading.Event()

    def early() -> None:
        first.set()
        second.wait(timeout=0.3)

    def late() -> None:
        second.set()
        time.sleep(0.1)

    threads = [threading.Thread(target=count_flops, args=(run,)) for run in (early, late)]
    threads[0].start()
    assert first.wait(timeout=10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_vit_equals_the_closed_form() -> None:
    model = timm.create_model("test_vit", num_classes=10)
    width, tokens, hidden = 64, 101, 64 * 3
    assert model.blocks[0].mlp.fc1.out_features == hidden
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 2 * (2 * tokens * tokens * width)
    expected = 2 * 100 * (3 * 16 * 16) * width + len(model.blocks) * block + 2 * width * 10
    assert forward_flops(model, (3, 160, 160)) == expected


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_meta_counts_the_same(name: str) -> None:
    real = timm.create_model(name, num_classes=10)
    plan = on_meta(lambda: timm.create_model(name, num_classes=10))
    assert next(plan.parameters()).is_meta
    size = (3, 160, 160)
    assert forward_flops(plan, size) == forward_flops(real, size) > 1e6
    assert train_flops(plan, size) == train_flops(real, size)
    assert 2.5 < train_flops(real, size) / forward_flops(real, size) <= 3


def test_teachers_can_be_planned(tiny_clip: SimpleNamespace) -> None:
    source = TeacherSource("open_clip:mine", tiny_clip.checkpoint, tiny_clip.config)
    plan = build_teacher(source, device="meta").image_tower
    assert forward_flops(plan, (3, 32, 32)) == forward_flops(tiny_clip.model.visual, (3, 32, 32)) > 1e5


def test_training_mode_and_weights_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = net[1].running_mean.clone()
    forward_flops(net, (3, 8, 8))
    train_flops(net, (3, 8, 8))
    assert net.training
    assert torch.equal(net[1].running_mean, before)
