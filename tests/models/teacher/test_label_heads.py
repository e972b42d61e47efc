"""Heads for sets of classes: each class is a logistic regression of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from ktray.errors import KtrayError
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.label_heads import fit_label_temperature, label_probe, scaled_text_head


def sets(n: int, classes: int = 3, dim: int = 10, noise: float = 1.0, seed: int = 0) -> tuple:
    """Embeddings that are sums of the directions of their classes, of lengths that differ."""
    directions = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, classes, generator=g) < 0.4).float()
    x = y @ directions + noise * torch.randn(n, dim, generator=g)
    return x * (0.5 + torch.rand(n, 1, generator=g)), y


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_each_class_equals_scikit_learns_regression(l2: float) -> None:
    x, y = sets(90)
    head = label_probe(x, y, l2=[l2])
    unit = F.normalize(x.double(), dim=-1).numpy()
    for c in range(3):
        reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=20_000).fit(unit, y[:, c].numpy())
        np.testing.assert_allclose(head.weight[c].detach(), reference.coef_[0], atol=2e-3, rtol=2e-3)
        assert float(head.bias[c]) == pytest.approx(float(reference.intercept_[0]), abs=2e-3)


def test_strength_is_chosen_on_validation_and_a_start_is_kept() -> None:
    x, y = sets(30, noise=2.0)
    val = sets(200, noise=2.0, seed=1)
    head = label_probe(x, y, val=val)
    assert head.l2 == min(head.scores, key=lambda s: head.scores[s])
    assert len({round(s, 4) for s in head.scores.values()}) > 3
    start = LinearHead(torch.randn(3, 10), torch.randn(3))
    near = label_probe(x, y, l2=[1e4], start=start)  # the strength holds the weights at those of the start
    torch.testing.assert_close(near.weight, start.weight, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(near.bias, start.bias, atol=1e-2)
    assert label_probe(x, y, l2=[1e-3, 1e-2, 1e-1]).scores  # without validation: folds
    with pytest.raises(KtrayError, match="no labelled embeddings"):
        label_probe(x[:0], y[:0])


def test_a_class_of_every_image_and_one_class_alone_are_fitted() -> None:
    x, y = sets(40)
    y[:, 1] = 1
    head = label_probe(x, y, l2=[1e-2])
    assert torch.isfinite(head.weight).all()
    with torch.no_grad():
        assert (head(x)[:, 1] > 3).all()
    assert label_probe(x, y[:, :1], l2=[1e-2]).weight.shape == (1, 10)


def test_temperature_is_the_minimum_of_the_likelihood() -> None:
    _, y = sets(60)
    logits = 8 * (y - 0.4) + 6 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    found = fit_label_temperature(logits, y)
    grid = np.geomspace(0.05, 50, 500)
    best = min(grid, key=lambda t: F.binary_cross_entropy_with_logits(logits.double() / t, y.double()).item())
    assert found == pytest.approx(best, rel=0.03)
    assert fit_label_temperature(logits[:0], y[:0]) == 1.0


def test_temperature_of_perfect_logits_is_that_of_platts_targets() -> None:
    y = torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0]])
    found = fit_label_temperature(4 * (2 * y - 1), y)
    high, low = 3 / 4, 1 / 5  # (n1 + 1) / (n1 + 2) and 1 / (n0 + 2)

    def loss(t: float) -> float:
        p = 1 / (1 + math.exp(-4 / t))
        ones = -(high * math.log(p) + (1 - high) * math.log(1 - p))
        zeros = -(low * math.log(1 - (1 - p)) * 0 + low * math.log(1 - p) + (1 - low) * math.log(p))
        return 2 * ones + 3 * zeros

    assert found == pytest.approx(min(np.geomspace(0.5, 50, 4000), key=loss), rel=0.01)


def test_text_heads_keep_their_order_and_become_probabilities() -> None:
    x, y = sets(200)
    names = LinearHead(100 * F.normalize(torch.randn(3, 10, generator=torch.Generator().manual_seed(7)), dim=1))
    scaled = scaled_text_head(names, x, y)
    with torch.no_grad():
        before, after = names(x), scaled(x)
    for c in range(3):
        assert (before[:, c].argsort() == after[:, c].argsort()).all()
    assert roc_auc_score(y.numpy(), after.numpy()) > 0.7
    # One regression on the similarities of all pairs of image and class has the same scale and offset.
    flat = before.reshape(-1, 1).numpy()
    reference = LogisticRegression(C=1e6, tol=1e-10, max_iter=5000).fit(flat, y.reshape(-1).numpy())
    expected = flat[:, 0] * reference.coef_[0, 0] + reference.intercept_[0]
    np.testing.assert_allclose(after.reshape(-1).numpy(), expected, atol=2e-2)
