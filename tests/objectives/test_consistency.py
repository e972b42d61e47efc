"""Weak-to-strong consistency, against the equations of FixMatch in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax, softmax

from ktray.data.augment import random_views, view_keys
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.consistency import Consistency, erase
from ktray.recipe.choice import chosen

N, B, C, SIZE = 6, 4, 3, 32


def setup(**kwargs):
    objective = Consistency(**kwargs)
    objective.setup(ObjectiveContext(C, 8, None, seed=0, image_size=SIZE))
    return objective


def outputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    weak = torch.randn(N, C, generator=g) * 3
    return torch.randn(B + N, C, generator=g), {"weak": weak, "label_of": torch.tensor([0, 2, 1, 2])}


def images(seed=1, n=N):
    g = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randint(256, (n, 3, 36, 36), generator=g, dtype=torch.uint8),
        "label_images": torch.randint(256, (B, 3, SIZE, SIZE), generator=g, dtype=torch.uint8),
        "label_of": torch.tensor([0, 2, 1, 2]),
        "view_key": view_keys(0, np.arange(n), np.zeros(n, np.int64)),
    }


@pytest.mark.parametrize("threshold", [0.0, 0.8, 0.95, 1.0])
def test_loss_is_equations_3_and_4(threshold):
    objective = setup(threshold=threshold, unlabelled_weight=0.7)
    out, batch = outputs()
    found = objective.loss(out, batch)
    logs, q = log_softmax(out.double().numpy(), axis=1), softmax(batch["weak"].double().numpy(), axis=1)
    label = -np.mean([logs[i, y] for i, y in enumerate(batch["label_of"].tolist())])
    counted = [-logs[B + i, q[i].argmax()] for i in range(N) if q[i].max() >= threshold]
    assert found["label_loss"].item() == pytest.approx(label, rel=1e-5)
    assert found["unlabelled_loss"].item() == pytest.approx(sum(counted) / N, rel=1e-5)
    assert found["loss"].item() == pytest.approx(label + 0.7 * sum(counted) / N, rel=1e-5)
    assert found["confident"].item() == pytest.approx(len(counted) / N)


def test_unsure_images_have_no_gradient():
    out, batch = outputs()
    out.requires_grad_()
    setup(threshold=0.9).loss(out, batch)["loss"].backward()
    sure = batch["weak"].softmax(1).max(1).values >= 0.9
    assert 0 < sure.sum() < N
    assert torch.equal(out.grad[B:].abs().sum(1) > 0, sure)
    assert (out.grad[:B].abs().sum(1) > 0).all()


def test_weak_views_are_predicted_without_gradient_and_strong_views_are_trained_on():
    objective, given, seen = setup(threshold=0.0), images(), []
    out, batch = outputs()

    def student(x):
        seen.append((x, torch.is_grad_enabled()))
        return batch["weak"] if len(x) == N else out

    found = objective.step(student, lambda x: x.float(), given, torch.Generator())
    (weak, with_gradient), (trained, trained_with_gradient) = seen
    assert (with_gradient, trained_with_gradient) == (False, True)
    assert torch.equal(weak, random_views(given["pixels"], objective.weak, given["view_key"], size=SIZE).float())
    assert torch.equal(trained[:B], given["label_images"].float())
    strong = random_views(given["pixels"], objective.strong, given["view_key"], salt=1, size=SIZE)
    assert torch.equal(trained[B:], erase(strong, given["view_key"]).float())
    assert found["loss"].item() == pytest.approx(objective.loss(out, batch)["loss"].item(), rel=1e-6)


def test_views_depend_on_their_key_alone():
    """The same in another batch and another order; others at the next visit."""
    objective, given = setup(), images()
    weak, strong = objective.views(given["pixels"], given["view_key"])
    order = torch.tensor([4, 1])
    again = objective.views(given["pixels"][order], given["view_key"][order])
    assert torch.equal(again[0], weak[order])
    assert torch.equal(again[1], strong[order])
    later = objective.views(given["pixels"], view_keys(0, np.arange(N), np.ones(N, np.int64)))
    assert not torch.equal(later[0], weak)
    assert not torch.equal(later[1], strong)


def test_one_rectangle_of_each_view_is_grey_and_the_rest_is_kept():
    n, height, width = 400, 24, 40
    views = torch.zeros(n, 3, height, width, dtype=torch.uint8)
    keys = view_keys(3, np.arange(n), np.zeros(n, np.int64))
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)
    areas, corners = [], []
    for view in erase(views, keys):
        inside = (view == grey).all(0)
        assert torch.equal(view, torch.where(inside, grey, torch.zeros_like(grey)))
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        box = inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        areas.append(box.numel() / (height * width))
        corners.append((int(rows.min()), int(columns.min())))
    # Uniform from 0.02 to 0.33, apart from rounding to whole pixels and from sides that are cut.
    assert np.mean(areas) == pytest.approx(0.175, abs=0.015)
    assert 0.01 < min(areas) < 0.04
    assert 0.3 < max(areas) < 0.36
    assert len(set(corners)) > 150


def test_gradient_reaches_the_whole_student():
    model = timm.create_model("test_resnet", num_classes=C)
    objective = setup(threshold=0.0)
    objective.step(model, lambda x: x.float() / 255, images(), torch.Generator())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not list(objective.parameters())


def test_a_student_teaches_itself_what_the_labels_only_hint_at():
    """Two classes by brightness. The labels are two dim images of each; the unlabelled images include bright ones."""
    torch.manual_seed(0)
    level = torch.cat([torch.linspace(20, 100, 16), torch.linspace(155, 235, 16)])
    pixels = level.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).to(torch.uint8)
    batch = {
        "pixels": pixels,
        "view_key": view_keys(0, np.arange(32), np.zeros(32, np.int64)),
        "label_images": pixels[[14, 15, 16, 17]],
        "label_of": torch.tensor([0, 0, 1, 1]),
    }
    student = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    objective = Consistency(threshold=0.8)
    objective.setup(ObjectiveContext(2, 3, None, seed=0, image_size=16))
    objective.strong = replace(objective.strong, brightness=0.1, contrast=0.1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    confident = []
    for step in range(150):
        batch["view_key"] = view_keys(0, np.arange(32), np.full(32, step))
        found = objective.step(student, lambda x: (x.float() - 127) / 64, batch, torch.Generator())
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        confident.append(float(found["confident"]))
    predicted = student((pixels.float() - 127) / 64).argmax(1)
    assert torch.equal(predicted, (level > 127).long())
    assert confident[0] < confident[-1]


def test_it_costs_a_training_step_and_a_prediction():
    assert setup().flops(lambda side: 3.0 * side, lambda side: 1.0 * side, 10) == 40.0


def test_the_recipe_arrives():
    section = chosen({"name": "consistency", "threshold": 0.8, "unlabelled_weight": 0.5})
    built = section.build(hflip=0.0)
    assert (built.threshold, built.unlabelled_weight) == (0.8, 0.5)
    assert (built.weak.hflip, built.strong.hflip) == (0.0, 0.0)
    traits = section.traits
    assert (traits.views, traits.labelled, traits.taught, traits.replays) == ("canvas", True, False, False)
    with pytest.raises(ValueError, match="image_size"):
        Consistency().setup(ObjectiveContext(C, 8, None, seed=0))
