"""Image-text contrast against open_clip's own loss and a closed form for equal captions."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from scipy.special import log_softmax

from ktray.models.features import Features
from ktray.models.flops import count_flops
from ktray.models.student.classifier import classifier_of
from ktray.objectives.base import ObjectiveContext
from ktray.objectives.clip import Clip

N, F, VOCABULARY, LENGTH = 6, 5, 12, 7
END = VOCABULARY - 1


def captions(rows):
    text = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for i, words in enumerate(rows):
        text[i, : len(words) + 1] = torch.tensor([*words, END])
    return text


DIFFERENT = captions([[1, 2], [3], [4, 5, 6], [1, 3], [2, 2, 2, 2, 2, 2], [7, 8]])
SOME_EQUAL = captions([[1, 2], [3], [1, 2], [1, 3], [3], [3]])


def setup(**kwargs):
    objective = Clip(width=32, layers=2, dim=8, **kwargs)
    objective.setup(ObjectiveContext(3, F, None, seed=4, vocabulary=VOCABULARY, text_length=LENGTH))
    return objective, torch.randn(N, F, generator=torch.Generator().manual_seed(0))


def embeddings(objective, features, text):
    image = features @ objective.project.weight.T
    words = objective.text(text)
    return (torch.nn.functional.normalize(x, dim=1).detach() for x in (image, words))


def test_different_captions_give_open_clips_loss():
    objective, features = setup()
    image, text = embeddings(objective, features, DIFFERENT)
    expected = open_clip.ClipLoss()(image, text, torch.tensor(1 / 0.07))
    found = objective.loss(features, {"text": DIFFERENT})
    assert float(found["loss"].detach()) == pytest.approx(float(expected), rel=1e-5)
    assert float(found["scale"]) == pytest.approx(1 / 0.07, rel=1e-5)


def test_equal_captions_share_the_target():
    objective, features = setup()
    image, text = embeddings(objective, features, SOME_EQUAL)
    logits = image.double().numpy() @ text.double().numpy().T / 0.07
    same = np.array([[a.tolist() == b.tolist() for b in SOME_EQUAL] for a in SOME_EQUAL], dtype=float)
    assert same.sum() == 4 + 9 + 1
    target = same / same.sum(1, keepdims=True)
    both = (target * (log_softmax(logits, axis=1) + log_softmax(logits.T, axis=1))).sum(1).mean()
    found = float(objective.loss(features, {"text": SOME_EQUAL})["loss"].detach())
    assert found == pytest.approx(-both / 2, rel=1e-5)


def test_a_caption_is_read_at_its_end_whatever_follows():
    objective, _ = setup()
    text = captions([[1, 2], [3], [4, 5, 6]])
    padded = text.clone()
    padded[0, 3:], padded[1, 2:], padded[2, 4:] = 5, 6, 7
    with torch.no_grad():
        assert torch.allclose(objective.text(text), objective.text(padded), atol=1e-6)
        assert not torch.allclose(objective.text(text), objective.text(captions([[1, 3], [4], [4, 5, 7]])), atol=1e-3)


def test_the_scale_stops_at_a_hundred():
    objective, features = setup()
    objective.log_scale.data.fill_(9.0)
    image, text = embeddings(objective, features, DIFFERENT)
    expected = open_clip.ClipLoss()(image, text, torch.tensor(100.0))
    found = float(objective.loss(features, {"text": DIFFERENT})["loss"].detach())
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_gradient_reaches_body_text_tower_and_scale_and_never_the_classifier():
    model = timm.create_model("test_resnet", num_classes=3)
    classifier_of(model).requires_grad_(False)
    objective = Clip(width=32)
    objective.setup(ObjectiveContext(3, model.num_features, None, seed=0, vocabulary=VOCABULARY, text_length=LENGTH))
    batch = {"pixels": torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8), "text": DIFFERENT}
    objective.step(Features(model), lambda x: x / 255, batch, torch.Generator())["loss"].backward()
    head = set(map(id, classifier_of(model).parameters()))
    for name, p in model.named_parameters():
        assert (p.grad is None) == (id(p) in head), name
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    assert {id(p) for p in model.parameters()}.isdisjoint(map(id, objective.parameters()))


def test_flops_of_the_text_tower_are_those_that_are_counted():
    objective, _ = setup()
    counted = count_flops(lambda: objective.text(DIFFERENT)) / N
    found = objective.flops(lambda side: 7.0 * side, lambda side: 0.0, 32)
    assert found == pytest.approx(7 * 32 + 3 * counted, rel=1e-6)


def test_it_learns_which_caption_belongs_to_which_image():
    objective, features = setup()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    first = last = objective.loss(features, {"text": DIFFERENT})
    for _ in range(40):
        last["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        last = objective.loss(features, {"text": DIFFERENT})
    assert float(last["loss"].detach()) < float(first["loss"].detach()) / 4
    assert float(last["retrieved"]) == 1.0


def test_captions_are_needed():
    with pytest.raises(ValueError, match="vocabulary"):
        Clip().setup(ObjectiveContext(3, F, None, seed=0))
