"""Generic labels against sklearn's log loss and a closed form of smoothing."""

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax
from sklearn.metrics import log_loss

from ktray.models.features import Features
from ktray.models.student.classifier import classifier_of
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.supervised import Supervised

N, F, K = 8, 5, 4
LABEL = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])


def setup(**kwargs):
    objective = Supervised(**kwargs)
    objective.setup(ObjectiveContext(26, F, None, seed=4, source_classes=K))
    features = torch.randn(N, F, generator=torch.Generator().manual_seed(0))
    return objective, features


def logits(objective, features):
    head = objective.head
    return (features.double() @ head.weight.double().T + head.bias.double()).detach().numpy()


def prepared(objective, seed=0):
    batch = {"images": torch.arange(N).float().view(N, 1, 1, 1).expand(N, 3, 2, 2).clone(), "label": LABEL}
    return objective.prepare(batch, torch.Generator().manual_seed(seed))


def test_without_smoothing_it_is_sklearns_log_loss():
    objective, features = setup(label_smoothing=0.0)
    probabilities = np.exp(log_softmax(logits(objective, features), axis=1))
    found = objective.loss(features, prepared(objective))
    assert float(found["loss"].detach()) == pytest.approx(log_loss(LABEL, probabilities), rel=1e-5)
    assert float(found["top1"]) == (probabilities.argmax(1) == LABEL.numpy()).mean()


def test_smoothing_is_its_closed_form():
    objective, features = setup(label_smoothing=0.3)
    target = 0.7 * np.eye(K)[LABEL.numpy()] + 0.3 / K
    expected = -(target * log_softmax(logits(objective, features), axis=1)).sum(1).mean()
    assert float(objective.loss(features, prepared(objective))["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_mixup_mixes_images_and_classes_with_one_weight():
    objective, _ = setup(mixup=0.8)
    batch = prepared(objective, seed=2)
    value = batch["images"][:, 0, 0, 0]
    assert not torch.allclose(value, torch.arange(N).float())
    eye = torch.eye(K)[LABEL]
    for i in range(N):
        partners = [
            j
            for j in range(N)
            if j != i
            and 0 <= (w := float((value[i] - j) / (i - j))) <= 1
            and torch.allclose(batch["targets"][i], w * eye[i] + (1 - w) * eye[j], atol=1e-4)
        ]
        assert partners or torch.equal(batch["targets"][i], eye[i])


def test_gradient_reaches_body_and_head_and_never_the_classifier():
    model = timm.create_model("test_resnet", num_classes=3)
    classifier_of(model).requires_grad_(False)
    objective = Supervised()
    objective.setup(ObjectiveContext(3, model.num_features, None, seed=0, source_classes=K))
    batch = {"pixels": torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8), "label": LABEL}
    objective.step(Features(model), lambda x: x / 255, batch, torch.Generator())["loss"].backward()
    head = set(map(id, classifier_of(model).parameters()))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in head), name
    assert all(p.grad is not None for p in objective.parameters())


def test_classes_of_the_generic_set_are_needed():
    with pytest.raises(ValueError, match="source_classes"):
        Supervised().setup(ObjectiveContext(26, F, None, seed=0))
