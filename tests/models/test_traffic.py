"""Memory traffic of small models, counted by hand."""

import torch
from torch import nn

from ktray.models.flops import on_meta
from ktray.models.traffic import forward_traffic, train_traffic

BATCH = 32


def test_a_linear_layer_and_a_relu():
    model = on_meta(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU()))
    linear = BATCH * 12 + 12 * 8 + 8 + BATCH * 8  # images, weights and bias in, features out; a view moves nothing
    relu = 2 * BATCH * 8
    assert forward_traffic(model, (3, 2, 2)) == (linear + relu) / BATCH


def test_in_place_operations_read_and_write():
    kept, in_place = (on_meta(lambda i=i: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(i))) for i in (False, True))
    convolution = BATCH * 3 * 4 + 3 * 4 + 4 + BATCH * 4 * 4
    assert (
        forward_traffic(kept, (3, 2, 2))
        == forward_traffic(in_place, (3, 2, 2))
        == ((convolution + 2 * BATCH * 4 * 4) / BATCH)
    )


def test_training_moves_about_three_times_as_much_and_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward, training = forward_traffic(model, (3, 16, 16)), train_traffic(model, (3, 16, 16))
    assert 2 * forward < training < 5 * forward
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
