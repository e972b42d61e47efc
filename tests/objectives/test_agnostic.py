"""Feature matching against closed forms and open_clip's own loss."""

import math

import open_clip
import pytest
import timm
import torch

from ktray.models.features import Features
from ktray.models.student.classifier import classifier_of
from ktray.objectives.agnostic import Agnostic
from ktray.objectives.base import ObjectiveContext
from ktray.recipe.choice import chosen

N, F, D = 6, 5, 7


def setup(match):
    objective = Agnostic(match)
    objective.setup(ObjectiveContext(3, F, D, seed=4))
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
    assert found["loss"].item() == pytest.approx(float(expected), rel=1e-5)
    assert float(found["cosine"]) == pytest.approx(1 - float(expected), rel=1e-5)


def test_mse_is_its_closed_form():
    objective, features, embedding = setup("mse")
    t = embedding.double() / embedding.double().norm(dim=1, keepdim=True) * math.sqrt(D)
    expected = ((projected(objective, features) - t) ** 2).mean()
    found = objective.loss(features, {"embedding": embedding})["loss"].item()
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_contrastive_is_open_clips_loss():
    objective, features, embedding = setup("contrastive")
    p = torch.nn.functional.normalize(projected(objective, features).float(), dim=1)
    t = torch.nn.functional.normalize(embedding, dim=1)
    expected = open_clip.ClipLoss()(p, t, torch.tensor(1 / 0.07))
    found = objective.loss(features, {"embedding": embedding})["loss"].item()
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("match", ["cosine", "mse", "contrastive"])
def test_length_of_the_teachers_embedding_does_not_matter_and_fp16_is_enough(match):
    objective, features, embedding = setup(match)
    one = objective.loss(features, {"embedding": embedding})["loss"].item()
    assert objective.loss(features, {"embedding": embedding * 10})["loss"].item() == pytest.approx(one, rel=1e-5)
    assert objective.loss(features, {"embedding": embedding.half()})["loss"].item() == pytest.approx(one, rel=1e-2)


@pytest.mark.parametrize("match", ["cosine", "mse", "contrastive"])
def test_gradient_reaches_projection_and_body_and_never_the_classifier(match):
    model = timm.create_model("test_resnet", num_classes=3)
    classifier_of(model).requires_grad_(False)
    objective = Agnostic(match)
    objective.setup(ObjectiveContext(3, model.num_features, D, seed=0))
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
    a.setup(ObjectiveContext(3, F, D, seed=1))
    b.setup(ObjectiveContext(3, F, D, seed=1))
    assert torch.equal(a.project[1].weight, b.project[1].weight)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="teacher_dim"):
        Agnostic().setup(ObjectiveContext(3, F, None, seed=1))


FP, DP, GRID = 4, 9, (3, 2)


def with_patches(match, weight, grid=GRID):
    objective = Agnostic(match, patches=weight)
    objective.setup(ObjectiveContext(3, F, D, seed=4, teacher_patch_dim=DP, student_map_dim=FP))
    g = torch.Generator().manual_seed(0)
    features, last = torch.randn(N, F, generator=g), torch.randn(N, FP, *GRID, generator=g)
    batch = {"embedding": torch.randn(N, D, generator=g), "patch_embedding": torch.randn(N, DP, *grid, generator=g) * 4}
    return objective, (features, last), batch


def patch_term(objective, last, patches, match):
    """Position by position, in float64."""
    found = []
    for i in range(N):
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                row = last[i, :, y, x].double()
                row = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
                _, linear = objective.project_patches
                p = linear.weight.double() @ row + linear.bias.double()
                t = patches[i, :, y, x].double()
                t = t / t.norm()
                found.append(((p - math.sqrt(DP) * t) ** 2).mean() if match == "mse" else 1 - p @ t / p.norm())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("match", ["cosine", "mse", "contrastive"])
def test_patches_add_their_own_term_position_by_position(match):
    objective, out, batch = with_patches(match, 0.7)
    plain, _, _ = setup(match)
    plain.load_state_dict(objective.state_dict(), strict=False)
    alone = float(plain.loss(out[0], batch)["loss"].detach())
    expected = alone + 0.7 * patch_term(objective, out[1], batch["patch_embedding"], match)
    assert float(objective.loss(out, batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_patches_on_another_grid_are_averaged_or_interpolated():
    objective, out, batch = with_patches("cosine", 1.0, grid=(6, 4))
    blocks = batch["patch_embedding"].view(N, DP, 3, 2, 2, 2).mean((3, 5))
    found = objective.loss(out, batch)
    expected = objective.loss(out, {**batch, "patch_embedding": blocks})
    assert float(found["loss"].detach()) == pytest.approx(float(expected["loss"].detach()), rel=1e-5)
    coarse = batch["patch_embedding"][:, :, :1, :1]
    found = objective.loss(out, {**batch, "patch_embedding": coarse})
    expected = objective.loss(out, {**batch, "patch_embedding": coarse.expand(N, DP, *GRID)})
    assert float(found["loss"].detach()) == pytest.approx(float(expected["loss"].detach()), rel=1e-5)


def test_gradient_of_the_patch_term_reaches_its_own_projection_and_the_map():
    objective, (features, last), batch = with_patches("mse", 1.0)
    last.requires_grad_()
    objective.loss((features, last), batch)["loss"].backward()
    assert (last.grad.abs().sum(1) > 0).all()
    assert all(p.grad is not None for p in objective.parameters())
    traits = chosen({"name": "agnostic", "patches": 0.5}).traits
    assert (traits.reads, traits.targets_needed) == ("map", {"embedding", "patch_embedding"})


def test_patches_need_both_widths():
    for given in ({"teacher_patch_dim": DP}, {"student_map_dim": FP}):
        with pytest.raises(ValueError, match="patches"):
            Agnostic(patches=1.0).setup(ObjectiveContext(3, F, D, seed=1, **given))


def test_build_follows_the_recipe():
    section = chosen({"name": "agnostic", "match": "mse"})
    built = section.build()
    assert isinstance(built, Agnostic)
    assert (built.match, section.traits.reads, section.traits.targets_needed) == ("mse", "features", {"embedding"})
