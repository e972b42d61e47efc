"""Two heads in one stage, against closed forms and sklearn's log loss."""

import numpy as np
import pytest
import timm
import torch
from scipy.special import rel_entr
from scipy.special import softmax as np_softmax
from sklearn.metrics import log_loss

from ktray.models.features import Features
from ktray.models.student.classifier import classifier_of
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.dual import Dual

N, B, C, F = 6, 4, 3, 5


def setup(**kwargs):
    objective = Dual(**kwargs)
    objective.setup(ObjectiveContext(C, F, None, seed=4))
    g = torch.Generator().manual_seed(0)
    features = torch.randn(N + B, F, generator=g)
    batch = {"logits": torch.randn(N, C, generator=g) * 3, "label_of": torch.tensor([0, 2, 1, 2])}
    return objective, features, batch


def images(n=N, b=B, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
        "label_images": torch.randint(256, (b, 3, 32, 32), generator=g, dtype=torch.uint8),
    }


def closed_form(objective, features, batch, t, weight):
    def head(layer, x):
        return x.double().numpy() @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    label = log_loss(
        batch["label_of"].numpy(), np_softmax(head(objective.label_head, features[N:]), axis=1), labels=range(C)
    )
    p = np_softmax(batch["logits"].double().numpy() / t, axis=1)
    q = np_softmax(head(objective.distil_head, features[:N]) / t, axis=1)
    return weight * label + (1 - weight) * t**2 * rel_entr(p, q).sum(1).mean()


@pytest.mark.parametrize(("t", "weight"), [(1.0, 0.5), (2.0, 0.2)])
def test_loss_is_the_weighted_sum_of_log_loss_and_kl(t, weight):
    objective, features, batch = setup(temperature=t, label_weight=weight)
    prepared = objective.prepare({**batch, "images": torch.zeros(N, 3, 2, 2)}, torch.Generator())
    found = float(objective.loss(features, prepared)["loss"].detach())
    assert found == pytest.approx(closed_form(objective, features, batch, t, weight), rel=1e-5)


def test_step_sees_views_and_labelled_images_in_one_forward():
    objective, features, batch = setup()
    seen = []

    def student(x):
        seen.append(x)
        return features

    given = images()
    found = objective.step(student, lambda x: x / 2, {**batch, **given}, torch.Generator())
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat([given["pixels"], given["label_images"]]).float() / 2)
    assert float(found["loss"].detach()) == pytest.approx(closed_form(objective, features, batch, 1.0, 0.5), rel=1e-5)


def test_mixup_mixes_the_views_alone():
    objective, features, batch = setup(mixup=1.0)
    seen = []

    def student(x):
        seen.append(x)
        return features

    given = images()
    objective.step(student, lambda x: x, {**batch, **given}, torch.Generator().manual_seed(3))
    assert not torch.equal(seen[0][:N], given["pixels"].float())
    assert torch.equal(seen[0][N:], given["label_images"].float())


def test_each_head_learns_from_its_own_images_and_the_body_from_both():
    objective, features, batch = setup()
    features.requires_grad_()
    prepared = objective.prepare({**batch, "images": torch.zeros(N, 3, 2, 2)}, torch.Generator())
    for weight, row, other in ((1.0, N, 0), (0.0, 0, N)):
        objective.label_weight = weight
        grads = torch.autograd.grad(objective.loss(features, prepared)["loss"], features)[0]
        assert grads[row].abs().sum() > 0
        assert grads[other].abs().sum() == 0


def test_gradient_reaches_body_and_heads_and_never_the_classifier():
    model = timm.create_model("test_resnet", num_classes=C)
    classifier_of(model).requires_grad_(False)
    objective = Dual()
    objective.setup(ObjectiveContext(C, model.num_features, None, seed=0))
    _, _, batch = setup()
    objective.step(Features(model), lambda x: x / 255, {**batch, **images()}, torch.Generator())["loss"].backward()
    head = set(map(id, classifier_of(model).parameters()))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in head), name
    assert len(list(objective.parameters())) == 4
    assert all(p.grad is not None for p in objective.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_finish_gives_plain_timm_the_product_of_both_experts_however_often(name):
    a, b = 0.3, 0.5
    model = timm.create_model(name, num_classes=C).eval()
    objective = Dual(mix=a, mix_temperature=b)
    objective.setup(ObjectiveContext(C, model.num_features, None, seed=0))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = Features(model)(x)
        own, other = objective.label_head(features).softmax(1), (objective.distil_head(features) / b).softmax(1)
    product = own.double().numpy() ** a * other.double().numpy() ** (1 - a)
    product /= product.sum(1, keepdims=True)
    objective.finish(model)
    once = {k: v.clone() for k, v in model.state_dict().items()}
    objective.finish(model)
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())
    plain = timm.create_model(name, num_classes=C).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(plain(x).softmax(1).numpy(), product, rtol=1e-4, atol=1e-6)


def test_the_seed_decides_the_heads_which_differ():
    state = torch.random.get_rng_state()
    (a, *_), (b, *_) = setup(), setup()
    assert torch.equal(a.label_head.weight, b.label_head.weight)
    assert not torch.equal(a.label_head.weight, a.distil_head.weight)
    assert torch.equal(state, torch.random.get_rng_state())
