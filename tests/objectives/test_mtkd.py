"""Predictions at three levels, against sums over images, pairs of images and pairs of classes."""

import pytest
import torch
from scipy.special import rel_entr

from ktray import recipe as recipes
from ktray.data.mixing import mixup
from ktray.errors import KtrayError
from ktray.objectives.mtkd import Mtkd
from ktray.objectives.oriented import Oriented
from ktray.recipe.choice import chosen

N, C = 5, 4


def setup(seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(N, C, generator=g) * 2
    batch = {"images": torch.rand(N, 3, 4, 4, generator=g), "logits": torch.randn(N, C, generator=g) * 2}
    return Mtkd(**kwargs), student, batch


def terms(student, targets, t):
    """Each term, one pair after the other, in float64."""
    p, q = targets.double().numpy(), (student.double() / t).softmax(1).numpy()
    instance = t**2 * rel_entr(p, q).sum(1).mean()
    images = sum((p[i] @ p[j] - q[i] @ q[j]) ** 2 for i in range(N) for j in range(N))
    classes = sum((p[:, a] @ p[:, b] - q[:, a] @ q[:, b]) ** 2 for a in range(C) for b in range(C))
    return instance, images * C / N**2, classes * C / N**2


@pytest.mark.parametrize(("weights", "t"), [((1.0, 1.0, 1.0), 1.0), ((0.5, 2.0, 3.0), 2.0), ((0.0, 1.0, 0.0), 1.0)])
def test_loss_is_the_weighted_sum_of_three_levels(weights, t):
    objective, student, batch = setup(weights=weights, temperature=t)
    found = objective.loss(student, objective.prepare(batch, torch.Generator()))
    expected = terms(student, (batch["logits"] / t).softmax(1), t)
    for name, value in zip(("instance", "batch", "classes"), expected, strict=True):
        assert found[f"{name}_loss"].item() == pytest.approx(value, rel=1e-5)
    assert found["loss"].item() == pytest.approx(sum(w * x for w, x in zip(weights, expected, strict=True)), rel=1e-5)


def test_the_first_level_alone_is_oriented():
    objective, student, batch = setup(weights=(1.0, 0.0, 0.0), temperature=1.5)
    plain = Oriented(1.5)
    expected = plain.loss(student, plain.prepare(batch, torch.Generator()))
    found = objective.loss(student, objective.prepare(batch, torch.Generator()))
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert found["agreement"] == expected["agreement"]


def test_mixed_probabilities_are_matched():
    objective, student, batch = setup(mixup=0.5)
    found = objective.loss(student, objective.prepare(batch, torch.Generator().manual_seed(3)))
    _, mixed = mixup(batch["images"], batch["logits"].softmax(1), 0.5, torch.Generator().manual_seed(3))
    assert found["loss"].item() == pytest.approx(sum(terms(student, mixed, 1.0)), rel=1e-5)


def test_a_batch_that_is_repeated_has_the_same_loss():
    """The factors C / N^2 make the terms independent of the size of the batch."""
    objective, student, batch = setup()
    once = objective.loss(student, objective.prepare(batch, torch.Generator()))
    twice = {name: torch.cat([value, value]) for name, value in batch.items()}
    found = objective.loss(torch.cat([student, student]), objective.prepare(twice, torch.Generator()))
    assert found["loss"].item() == pytest.approx(once["loss"].item(), rel=1e-5)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    objective, _, batch = setup(temperature=2.0)
    student = (batch["logits"] + 3).requires_grad_()
    objective.loss(student, objective.prepare(batch, torch.Generator()))["loss"].backward()
    assert student.grad.abs().max() < 1e-6


def test_each_level_has_a_gradient_of_its_own():
    found = []
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        objective, student, batch = setup(weights=weights)
        student.requires_grad_()
        objective.loss(student, objective.prepare(batch, torch.Generator()))["loss"].backward()
        found.append(student.grad / student.grad.norm())
    assert all(torch.isfinite(one).all() for one in found)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not torch.allclose(found[1], found[2], atol=1e-3)


def test_keys_arrive_and_weights_of_zero_are_refused():
    section = chosen({"name": "mtkd", "instance_weight": 0.5, "batch_weight": 2, "class_weight": 3, "mixup": 0.2})
    built = section.build()
    assert (built.weights, built.instance.mixup) == ((0.5, 2.0, 3.0), 0.2)
    assert section.traits.replays
    none = [f"objective.{level}_weight=0" for level in ("instance", "batch", "class")]
    with pytest.raises(KtrayError, match="are all 0"):
        recipes.load(None, ["objective.name=mtkd", *none])
