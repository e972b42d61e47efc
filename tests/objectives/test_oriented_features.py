"""Features and predictions of the adapted teacher in one pass, against the closed form in float64 and plain timm."""

import pytest
import timm
import torch
from scipy.special import rel_entr
from scipy.special import softmax as np_softmax

from ktray import recipe as recipes
from ktray.data.mixing import mixup
from ktray.errors import KtrayError
from ktray.models.student.classifier import FeaturesAndLogits
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.models.teacher.spec import AdaptedSpec
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.oriented_features import OrientedFeatures
from ktray.recipe.choice import chosen
from ktray.storage.store import Dir
from ktray.targets.predict import Predict

N, F, D, C = 6, 5, 7, 3


def setup(**kwargs):
    objective = OrientedFeatures(**kwargs)
    objective.setup(ObjectiveContext(C, F, D, seed=4))
    g = torch.Generator().manual_seed(0)
    student = torch.randn(N, F, generator=g) * 3, torch.randn(N, C, generator=g)
    batch = {
        "images": torch.rand(N, 3, 4, 4, generator=g),
        "embedding": torch.randn(N, D, generator=g) * 5,
        "logits": torch.randn(N, C, generator=g) * 2,
    }
    return objective, student, batch


def feature_term(objective, features, target):
    """1 - cosine between LayerNorm and linear layer of each row, by hand, and its target."""
    norm, linear = objective.feature_loss.project
    x = features.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    p = (x * norm.weight.double() + norm.bias.double()) @ linear.weight.double().T + linear.bias.double()
    t = target.double()
    return float((1 - (p * t).sum(1) / (p.norm(dim=1) * t.norm(dim=1))).mean().detach())


def prediction_term(logits, targets, t):
    q = np_softmax(logits.double().numpy() / t, axis=1)
    return t**2 * rel_entr(targets.double().numpy(), q).sum(1).mean()


@pytest.mark.parametrize(("weights", "t"), [((1.0, 1.0), 1.0), ((0.3, 2.0), 2.5)])
def test_loss_is_the_weighted_sum_of_both_terms(weights, t):
    features, predictions = weights
    objective, student, batch = setup(features=features, predictions=predictions, temperature=t)
    found = objective.loss(student, objective.prepare(batch, torch.Generator()))
    first = feature_term(objective, student[0], batch["embedding"])
    second = prediction_term(student[1], (batch["logits"] / t).softmax(1), t)
    assert found["loss"].item() == pytest.approx(features * first + predictions * second, rel=1e-5)
    assert found["feature_loss"].item() == pytest.approx(first, rel=1e-5)
    assert found["prediction_loss"].item() == pytest.approx(second, rel=1e-5)


def test_without_predictions_features_alone_count():
    objective, student, batch = setup(predictions=0.0)
    found = objective.loss(student[0], objective.prepare(batch, torch.Generator()))
    assert found["loss"].item() == pytest.approx(feature_term(objective, student[0], batch["embedding"]), rel=1e-5)
    assert "agreement" not in found


def test_finetune_has_predictions_alone():
    objective, student, batch = setup(predictions=0.5)
    replay = objective.prepare({"images": batch["images"], "logits": batch["logits"]}, torch.Generator())
    expected = 0.5 * prediction_term(student[1], batch["logits"].softmax(1), 1.0)
    assert objective.loss(student[1], replay)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_mixup_mixes_images_probabilities_and_unit_embeddings_with_one_weight():
    objective, student, batch = setup(mixup=0.4)
    prepared = objective.prepare(dict(batch), torch.Generator().manual_seed(9))
    unit = batch["embedding"] / batch["embedding"].norm(dim=1, keepdim=True)
    for name, value in (("targets", batch["logits"].softmax(1)), ("embedding", unit)):
        images, expected = mixup(batch["images"], value, 0.4, torch.Generator().manual_seed(9))
        torch.testing.assert_close(prepared["images"], images)
        torch.testing.assert_close(prepared[name], expected)
        assert not torch.allclose(expected, value)
    found = objective.loss(student, prepared)["loss"].item()
    second = prediction_term(student[1], prepared["targets"], 1.0)
    assert found == pytest.approx(feature_term(objective, student[0], prepared["embedding"]) + second, rel=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "mobilenetv3_small_050"])
def test_one_pass_gives_what_timm_gives_in_two(name):
    model = timm.create_model(name, num_classes=C).eval()
    size = 160 if name == "test_vit" else 64
    x = torch.randn(2, 3, size, size)
    passes = []
    model.forward_features = lambda x, plain=model.forward_features, **more: passes.append(1) or plain(x, **more)
    with torch.no_grad():
        features, logits = FeaturesAndLogits(model)(x)
        assert len(passes) == 1
        torch.testing.assert_close(logits, model(x))
        torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))


def test_a_student_without_a_linear_classifier_is_refused():
    model = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(KtrayError, match="no linear classifier"):
        FeaturesAndLogits(model)


@pytest.mark.parametrize("predictions", [0.0, 1.0])
def test_gradient_reaches_projection_and_all_that_is_read(predictions):
    model = timm.create_model("test_resnet", num_classes=C)
    objective = OrientedFeatures(predictions=predictions)
    objective.setup(ObjectiveContext(C, model.num_features, D, seed=0))
    features, logits = FeaturesAndLogits(model)(torch.randn(N, 3, 32, 32))
    _, _, batch = setup()
    prepared = objective.prepare(batch, torch.Generator())
    objective.loss((features, logits) if predictions else features, prepared)["loss"].backward()
    head = set(map(id, model.get_classifier().parameters()))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in head and not predictions), name
    assert all(p.grad is not None for p in objective.parameters())


def test_the_embedding_that_teach_stores_is_that_of_the_finetuned_tower(tmp_path):
    """The tower is changed, saved and loaded again; with a frozen tower, the embedding is that of the base teacher."""
    base = load_teacher("miniverse")
    head = LinearHead(torch.zeros(C, base.embed_dim), torch.zeros(C))
    pixels = torch.randint(256, (4, 3, *base.preprocess.size), dtype=torch.uint8)

    def stored(folder):
        spec = AdaptedSpec(Dir(str(folder)), base.preprocess)
        return Predict(spec, ("embedding", "logits"), 32, 0).load()(pixels)["embedding"].float()

    AdaptedTeacher(base, head, list("abc")).save(tmp_path / "probe")
    own = load_teacher("miniverse")
    before = AdaptedTeacher(base, head, list("abc")).embed(pixels)
    torch.testing.assert_close(stored(tmp_path / "probe"), before, rtol=2e-3, atol=2e-3)
    tuned = AdaptedTeacher(own, head, list("abc"), finetuned=True)
    with torch.no_grad():
        for p in tuned.image_tower.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tuned.save(tmp_path / "finetune")
    after = tuned.embed(pixels)
    assert not torch.allclose(after, before, rtol=0.05)
    torch.testing.assert_close(stored(tmp_path / "finetune"), after.detach(), rtol=2e-3, atol=2e-3)


def test_traits_make_adapt_adapt_the_teacher_with_any_weight():
    both = chosen({"name": "oriented_features"}).traits
    assert (both.reads, both.trains_classifier, both.replays) == ("features_and_logits", True, True)
    alone = chosen({"name": "oriented_features", "predictions": 0}).traits
    assert (alone.reads, alone.trains_classifier, alone.replays) == ("features", False, False)
    assert both.targets_needed == alone.targets_needed == {"logits", "embedding"}


def test_contrastive_features_of_mixed_images_are_refused():
    with pytest.raises(KtrayError, match="mixed images"):
        recipes.load(None, ["objective.name=oriented_features", "objective.match=contrastive", "objective.mixup=0.2"])


def test_the_width_of_the_teacher_is_needed():
    with pytest.raises(ValueError, match="teacher_dim"):
        OrientedFeatures().setup(ObjectiveContext(C, F, None, seed=1))
