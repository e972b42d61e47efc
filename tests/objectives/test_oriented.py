import pytest
import torch

from ktray.objectives.base import ObjectiveContext
from ktray.objectives.oriented import Oriented
from ktray.objectives.scratch import Scratch
from ktray.recipe.choice import chosen
from ktray.tasks.base import task_kind


def closed_form(teacher, student, t):
    p = torch.softmax(teacher.double() / t, 1)
    q = torch.softmax(student.double() / t, 1)
    return float((p * (p.log() - q.log())).sum(1).mean() * t * t)


@pytest.mark.parametrize("t", [0.5, 1.0, 4.0])
def test_loss_is_the_kl_of_softened_predictions(t):
    g = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(8, 5, generator=g) * 3, torch.randn(8, 5, generator=g)
    objective = Oriented(temperature=t)
    batch = objective.prepare({"images": torch.zeros(8, 3, 2, 2), "logits": teacher.half()}, g)
    out = objective.loss(student, batch)
    assert float(out["loss"]) == pytest.approx(closed_form(teacher.half(), student, t), rel=1e-4)


def test_gradient_reaches_the_student_alone_and_vanishes_at_agreement():
    teacher = torch.randn(4, 3, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    objective = Oriented(2.0)
    batch = objective.prepare({"images": torch.zeros(4, 3, 2, 2), "logits": teacher.detach()}, torch.Generator())
    objective.loss(student, batch)["loss"].backward()
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-6
    assert list(objective.parameters()) == []


def test_mixup_mixes_images_and_probabilities_of_the_same_pair():
    n, c = 6, 4
    logits = torch.eye(n, c) * 50
    images = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 2, 2).clone()
    objective = Oriented(1.0, mixup=0.8)
    batch = objective.prepare({"images": images, "logits": logits}, torch.Generator().manual_seed(1))
    targets = torch.softmax(logits, 1)
    mixed = batch["images"][:, 0, 0, 0]
    assert not torch.allclose(mixed, images[:, 0, 0, 0])
    for i in range(n):
        found = False
        for j in range(n):
            if i == j:
                continue
            lam = float((mixed[i] - j) / (i - j))
            if 0 <= lam <= 1 and torch.allclose(
                batch["targets"][i], lam * targets[i] + (1 - lam) * targets[j], atol=1e-4
            ):
                found = True
        assert found, f"row {i} is no mixture of one pair"


def test_scratch_needs_no_targets_and_its_labels_are_learned_by_cross_entropy():
    logits, label = torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = -torch.log_softmax(logits.double(), 1)[torch.arange(7), label].mean()
    assert float(task_kind("classification").loss(logits, label)) == pytest.approx(float(expected), rel=1e-5)
    assert chosen({"name": "scratch"}).traits.targets_needed == frozenset()


def test_build_follows_the_recipe():
    built = chosen({"name": "oriented", "temperature": 3.0, "mixup": 0.2}).build()
    built.setup(ObjectiveContext(3, 8, None, 0))
    assert isinstance(built, Oriented)
    assert (built.temperature, built.mixup) == (3.0, 0.2)
    assert isinstance(chosen({"name": "scratch"}).build(), Scratch)
