"""Feature matching against closed forms and open_clip's own loss."""

import math

import open_clip
import pytest
import timm
import torch

from ktray import recipe
from ktray.models.student import Features, classifier_of
from ktray.objectives import Agnostic, Context, build_objective

N, F, D = 6, 5, 7


def setup(match):
    objective = Agnostic(match)
    objective.setup(Context(3, F, D, seed=4))
    g = torch.Generator().manual_seed(0)
    return objective, torch.randn(N, F, generator=g) * 3, torch.randn(N, D, generator=g) * 5


def projected(objective, features):
    """LayerNorm and the linear layer by hand, in float64."""
    x = features.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    norm, linear = objective.project
    x = x * norm.weight.double() + norm.bias.double()
    return x @ linear.weight.double().T + linear.bias.double()


def test_cosine_is_its_closed_form():
    objective, features, embedding = setup("cosine")
    p, t = projected(objective, features), embedding.double()
    expected = (1 - (p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1))).mean()
    found = objective.loss(features, {"embedding": embedding})
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found["cosine"]) == pytest.approx(1 - float(expected), rel=1e-5)


def test_mse_is_its_closed_form():
    objective, features, embedding = setup("mse")
    t = embedding.double() / embedding.double().norm(dim=1, keepdim=True) * math.sqrt(D)
    expected = ((projected(objective, features) - t) ** 2).mean()
    found = float(objective.loss(features, {"embedding": embedding})["loss"])
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_contrastive_is_open_clips_loss():
    objective, features, embedding = setup("contrastive")
    p = torch.nn.functional.normalize(projected(objective, features).float(), dim=1)
    t = torch.nn.functional.normalize(embedding, dim=1)
    expected = open_clip.ClipLoss()(p, t, torch.tensor(1 / 0.07))
    found = float(objective.loss(features, {"embedding": embedding})["loss"])
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("match", ["cosine", "mse", "contrastive"])
def test_length_of_the_teachers_embedding_does_not_matter_and_fp16_is_enough(match):
    objective, features, embedding = setup(match)
    one = float(objective.loss(features, {"embedding": embedding})["loss"])
    assert float(objective.loss(features, {"embedding": embedding * 10})["loss"]) == pytest.approx(one, rel=1e-5)
    assert float(objective.loss(features, {"embedding": embedding.half()})["loss"]) == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("match", ["cosine", "mse", "contrastive"])
def test_gradient_reaches_projection_and_body_and_never_the_classifier(match):
    model = timm.create_model("test_resnet", num_classes=3)
    classifier_of(model).requires_grad_(False)
    objective = Agnostic(match)
    objective.setup(Context(3, model.num_features, D, seed=0))
    out = Features(model)(torch.randn(4, 3, 32, 32))
    objective.loss(out, {"embedding": torch.randn(4, D)})["loss"].backward()
    head = set(map(id, classifier_of(model).parameters()))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in head), name
    assert all(p.grad is not None for p in objective.parameters())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in objective.parameters()}


def test_the_seed_decides_the_projection_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    a, b = Agnostic(), Agnostic()
    a.setup(Context(3, F, D, seed=1))
    b.setup(Context(3, F, D, seed=1))
    assert torch.equal(a.project[1].weight, b.project[1].weight)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="teacher_dim"):
        Agnostic().setup(Context(3, F, None, seed=1))


def test_build_follows_the_recipe():
    built = build_objective(recipe.Objective(name="agnostic", match="mse"))
    assert isinstance(built, Agnostic)
    assert (built.match, built.reads, built.targets_needed) == ("mse", "features", {"embedding"})
