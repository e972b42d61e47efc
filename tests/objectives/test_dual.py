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
from ktray.objectives.dual import Dual, balanced_weight, shared_gradient
from ktray.recipe.choice import chosen

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


def gradient_at_a_shared_layer(objective, features, batch):
    """The norms of the gradients of both losses at a real linear layer on the features, whose weights are the
    identity."""
    norms = []
    for label_weight in (1.0, 0.0):
        layer = torch.nn.Linear(F, F, bias=False).double()
        torch.nn.init.eye_(layer.weight)
        plain = Dual(label_weight=label_weight).double()
        plain.setup(ObjectiveContext(C, F, None, seed=4))
        plain.load_state_dict({k: v for k, v in objective.state_dict().items() if k != "weight"})
        prepared = plain.prepare({**batch, "images": torch.zeros(N, 3, 2, 2)}, torch.Generator())
        plain.loss(layer(features.double()).float(), prepared)["loss"].backward()
        norms.append(float(layer.weight.grad.norm()))
    return norms


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_the_balanced_weight_gives_the_labels_their_share_of_the_gradient(share):
    objective, features, batch = setup(balanced=True, label_weight=share)
    label, distil = gradient_at_a_shared_layer(objective, features, batch)
    weight = balanced_weight(torch.tensor(label), torch.tensor(distil), share).item()
    assert weight * label / (weight * label + (1 - weight) * distil) == pytest.approx(share, rel=1e-6)
    assert abs(weight - share) > 0.02
    prepared = objective.prepare({**batch, "images": torch.zeros(N, 3, 2, 2)}, torch.Generator())
    first = objective.loss(features.requires_grad_(), prepared)
    plain = closed_form(objective, features.detach(), batch, 1.0, share)
    assert first["loss"].item() == pytest.approx(plain, rel=1e-5), "the first step has the weight of the recipe"
    assert first["weight"].item() == pytest.approx(share + (weight - share) / 50, rel=1e-5)
    for _ in range(20):
        last = objective.loss(features, prepared)
    assert last["weight"].item() == pytest.approx(weight + (share - weight) * 0.98**21, rel=1e-4)
    used = weight + (share - weight) * 0.98**20
    assert last["loss"].item() == pytest.approx(closed_form(objective, features.detach(), batch, 1.0, used), rel=1e-4)
    last["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())


def test_without_gradients_the_share_is_the_weight():
    zero = torch.tensor(0.0)
    assert balanced_weight(zero, zero, 0.3).item() == pytest.approx(0.3)
    assert balanced_weight(zero, torch.tensor(1.0), 0.3).item() == pytest.approx(1.0)


def test_the_gradient_of_all_workers_counts(monkeypatch):
    features = torch.randn(6, F, generator=torch.Generator().manual_seed(2), requires_grad=True)
    whole = shared_gradient(features.pow(3).mean(), features)
    sent = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for exchange in (lambda total: sent.append(total.clone()), lambda total: total.copy_(sum(sent))):
        monkeypatch.setattr("torch.distributed.all_reduce", exchange)
        for part in (features[:3], features[3:]):
            found = shared_gradient(part.pow(3).mean(), part)
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_weight_is_in_the_checkpoint_and_rests_in_evaluation():
    objective, features, batch = setup(balanced=True)
    prepared = objective.prepare({**batch, "images": torch.zeros(N, 3, 2, 2)}, torch.Generator())
    features.requires_grad_()
    for _ in range(3):
        objective.loss(features, prepared)
    other, *_ = setup(balanced=True)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.loss(features, prepared)["weight"], objective.loss(features, prepared)["weight"])
    before = objective.weight.clone()
    objective.eval().loss(features, prepared)
    with torch.no_grad():
        objective.train().loss(features, prepared)
    assert torch.equal(objective.weight, before)


def test_a_fixed_weight_is_the_default_and_adds_nothing_to_the_checkpoint():
    plain = chosen({"name": "dual"}).build()
    assert not plain.balanced
    assert not list(plain.buffers())
    assert chosen({"name": "dual", "balance": "gradients"}).build().balanced
