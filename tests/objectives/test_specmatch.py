"""Matching along principal directions, against sklearn's PCA and sums by hand."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

from ktray.objectives.base import ObjectiveContext
from ktray.objectives.specmatch import Specmatch, principal
from ktray.recipe.choice import chosen

N, F, D, M = 6, 5, 7, 40


def sample(seed=0):
    """Embeddings (M, D) with a mean, and with variances that fall from 9 to 0.01."""
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(99)))[0]
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, D, generator=g) @ torch.diag(torch.logspace(0.5, -1, D)) @ rotation + 2


def setup(warmup=0.0, **kwargs):
    objective = Specmatch(warmup=warmup, **kwargs)
    objective.setup(ObjectiveContext(3, F, D, seed=4, teacher_sample=sample()))
    g = torch.Generator().manual_seed(1)
    return objective, torch.randn(N, F, generator=g), sample(7)[:N]


def errors_by_hand(objective, features, embedding):
    """e_k of each direction of sklearn's PCA, in float64."""
    pca = PCA().fit(sample().double().numpy())
    variance = sample().double().numpy().var(axis=0).mean()
    x = features.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm, linear = objective.project
    p = (x * norm.weight.double() + norm.bias.double()) @ linear.weight.double().T + linear.bias.double()
    t = (embedding.double().numpy() - pca.mean_) / np.sqrt(variance)
    return (((p.detach().numpy() - t) @ pca.components_.T) ** 2).mean(axis=0)


def test_directions_are_those_of_sklearn():
    mean, directions, variance = principal(sample())
    pca = PCA().fit(sample().double().numpy())
    np.testing.assert_allclose(mean, pca.mean_, rtol=1e-6)
    np.testing.assert_allclose(np.abs((pca.components_ @ directions.numpy()).diagonal()), 1, atol=1e-6)
    assert float(variance) == pytest.approx(float(sample().double().numpy().var(axis=0).mean()), rel=1e-6)


@pytest.mark.parametrize(("power", "epsilon"), [(1 / 3, 1e-4), (0.5, 0.1), (1.0, 1e-4)])
def test_loss_is_its_closed_form(power, epsilon):
    objective, features, embedding = setup(power=power, epsilon=epsilon)
    found = objective.loss(features, {"embedding": embedding.half().float()})["loss"].item()
    errors = errors_by_hand(objective, features, embedding.half().float())
    assert found == pytest.approx(((errors + epsilon) ** power).mean(), rel=1e-4)


@pytest.mark.parametrize("power", [1 / 3, 1.0])
def test_gradient_is_that_of_the_closed_form(power):
    """The value and the gradient have separate terms, so both are compared: here with finite differences."""
    objective, features, embedding = setup(power=power)
    features.requires_grad_()
    objective.loss(features, {"embedding": embedding})["loss"].backward()
    for row, column in ((0, 0), (3, 2), (5, 4)):
        values = []
        for step in (1e-4, -1e-4):
            moved = features.detach().double().clone()
            moved[row, column] += step
            values.append(((errors_by_hand(objective, moved, embedding) + 1e-4) ** power).mean())
        assert features.grad[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-2, abs=1e-5)


def test_a_power_of_one_is_the_squared_error_in_any_basis():
    objective, features, embedding = setup(power=1.0, epsilon=1e-12)
    target = (embedding - objective.mean) * objective.scale
    expected = (objective.project(features) - target).square().mean()
    assert objective.loss(features, {"embedding": embedding})["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_small_power_gives_directions_of_small_variance_more_weight():
    """The share of the gradient that goes to the last three directions, with a projection that predicts the mean."""
    shares = []
    for power in (1.0, 1 / 3):
        objective, features, embedding = setup(power=power)
        nn.init.zeros_(objective.project[1].weight)
        nn.init.zeros_(objective.project[1].bias)
        objective.loss(features, {"embedding": embedding})["loss"].backward()
        by_direction = objective.directions.T @ objective.project[1].weight.grad
        energy = by_direction.square().sum(1)
        shares.append(float(energy[-3:].sum() / energy.sum()))
    assert shares[1] > 10 * shares[0]


def test_the_student_rests_while_the_projection_warms_up():
    objective, features, embedding = setup(warmup=0.25)
    for progress, moves in ((0.0, False), (0.125, False), (0.25, True), (0.5, True)):
        if progress:
            objective.after_step(nn.Identity(), progress)
        features.grad = None
        objective.zero_grad()
        objective.loss(features.requires_grad_(), {"embedding": embedding})["loss"].backward()
        assert bool(features.grad.abs().sum() > 0) == moves
        assert all(p.grad.abs().sum() > 0 for p in objective.project.parameters())
    assert objective.frozen_share == 0.25


def test_directions_and_progress_are_in_the_checkpoint():
    objective, features, embedding = setup(warmup=0.25)
    objective.after_step(nn.Identity(), 0.5)
    other = Specmatch(warmup=0.25)
    other.setup(ObjectiveContext(3, F, D, seed=9, teacher_sample=sample(5)))
    before = other.loss(features, {"embedding": embedding})["loss"]
    other.load_state_dict(objective.state_dict())
    expected = objective.loss(features, {"embedding": embedding})["loss"]
    assert before != expected
    assert other.loss(features, {"embedding": embedding})["loss"] == expected
    assert {name for name, p in objective.named_parameters() if not p.requires_grad} == {"mean", "directions", "scale"}


def test_equal_embeddings_have_a_finite_loss():
    objective = Specmatch(warmup=0.0)
    objective.setup(ObjectiveContext(3, F, D, seed=4, teacher_sample=torch.ones(3, D)))
    features = torch.randn(N, F, requires_grad=True)
    objective.loss(features, {"embedding": torch.ones(N, D)})["loss"].backward()
    assert torch.isfinite(features.grad).all()


def test_what_is_missing_is_named():
    for context in (ObjectiveContext(3, F, D, seed=1), ObjectiveContext(3, F, None, seed=1, teacher_sample=sample())):
        with pytest.raises(ValueError, match="teacher_sample"):
            Specmatch().setup(context)


def test_build_follows_the_recipe():
    section = chosen({"name": "specmatch", "power": 0.5, "epsilon": 0.01, "warmup": 0.1})
    built = section.build()
    assert (built.power, built.epsilon, built.warmup) == (0.5, 0.01, 0.1)
    assert (section.traits.sampled, section.traits.reads, section.traits.targets_needed) == (
        True,
        "features",
        {"embedding"},
    )


def test_two_workers_with_unequal_parts_have_the_gradient_of_one(monkeypatch):
    """The sum over the workers is simulated: the first pass records what each sends, the second returns the sum."""
    objective, features, embedding = setup()
    features.requires_grad_()
    whole = objective.loss(features, {"embedding": embedding})["loss"]
    whole.backward()
    sent, gradients = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for exchange in (lambda total: sent.append(total.clone()), lambda total: total.copy_(sum(sent))):
        monkeypatch.setattr("torch.distributed.all_reduce", exchange)
        for part in (slice(0, 2), slice(2, 6)):
            mine = features.detach()[part].clone().requires_grad_()
            loss = objective.loss(mine, {"embedding": embedding[part]})["loss"]
            (loss * len(mine) / N).backward()  # a worker's loss counts with its share of the rows
            gradients.append(mine.grad)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(gradients[2:]), features.grad)
