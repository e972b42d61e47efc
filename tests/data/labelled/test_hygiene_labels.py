"""Doubtful labels against the formulas written out, and leave-one-out probabilities against real refits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from ktray.data.labelled.hygiene import DOUBTFUL_LABEL, doubtful
from ktray.data.labelled.hygiene_labels import MARGIN, doubts
from ktray.models.teacher import leave_one_out as module
from ktray.models.teacher.leave_one_out import leave_one_out


def clusters(n: int, classes: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = np.arange(n) % classes
    x = centres[labels] + 0.6 * rng.normal(size=(n, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


@pytest.mark.parametrize("shape", [(40, 12), (20, 50)], ids=["tall", "wide"])
def test_probabilities_are_those_of_probes_that_are_fitted_without_each_image(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = clusters(shape[0], 3, shape[1])
    monkeypatch.setattr(module, "fit_temperature", lambda logits, truth: 0.5)
    found = leave_one_out(x, labels, 3, strengths=(0.03,))
    # scikit-learn's penalty is absolute, and that of all images is used for each refit.
    penalty = 0.03 * np.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).max()
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        model = Ridge(alpha=penalty).fit(x[rest], np.eye(3)[labels[rest]])
        expected = torch.from_numpy(model.predict(x[[i]]) / 0.5).softmax(1).numpy()[0]
        np.testing.assert_allclose(found[i], expected, atol=1e-8)


def test_the_strength_with_the_best_likelihood_is_chosen() -> None:
    x, labels = clusters(60, 3, 10)
    each = {s: leave_one_out(x, labels, 3, strengths=(s,)) for s in (1e-4, 1e-2, 1.0)}
    loss = {s: -np.log(p[np.arange(60), labels]).mean() for s, p in each.items()}
    best = min(loss, key=lambda s: loss[s])
    np.testing.assert_array_equal(leave_one_out(x, labels, 3, strengths=tuple(each)), each[best])


def test_the_only_image_of_a_class_is_not_judged() -> None:
    x, labels = clusters(30, 3, 8)
    labels = labels.copy()
    labels[4] = 3
    found = leave_one_out(x, labels, 4)
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, 0)).all()
    assert 4 not in doubts(found, labels).row
    assert np.isnan(leave_one_out(x[:3], np.arange(3), 3)).all()


def test_planted_label_faults_are_found() -> None:
    """With 5% flipped: at least half of them are listed, and at least 60% of the list are flipped."""
    x, true = clusters(400, 5, 32, seed=3)
    rng = np.random.default_rng(0)
    flipped = rng.choice(400, 20, replace=False)
    labels = true.copy()
    labels[flipped] = (labels[flipped] + rng.integers(1, 5, 20)) % 5
    listed = doubts(leave_one_out(x, labels, 5), labels)
    right = np.isin(listed.row, flipped)
    assert right.mean() >= 0.6
    assert right.sum() >= 10
    assert (listed.suggested[right] == true[listed.row[right]]).mean() > 0.9
    assert (np.diff(listed.margin) >= 0).all()
    assert len(doubts(leave_one_out(x, true, 5), true)) <= 1


def test_doubts_by_the_formulas_of_the_paper() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet([0.4] * 4, 80)
    labels = rng.integers(0, 4, 80)
    threshold = [p[labels == j, j].mean() for j in range(4)]
    expected = {}
    for i in range(80):
        reached = [j for j in range(4) if p[i, j] >= threshold[j]]
        if reached:
            other = max(reached, key=lambda j: p[i, j])
            margin = p[i, labels[i]] - p[i, other]
            if other != labels[i] and margin <= -0.2:
                expected[i] = (other, margin)
    listed = doubts(p, labels, most=-0.2, agreement=0.0)
    assert len(expected) > 10
    order = sorted(expected, key=lambda i: expected[i][1])
    assert listed.row.tolist() == order
    assert [(int(s), float(m)) for s, m in zip(listed.suggested, listed.margin, strict=True)] == [
        (o, pytest.approx(m)) for o, m in (expected[i] for i in order)
    ]
    strict = doubts(p, labels, agreement=0.0)
    assert set(strict.row) == {i for i, (_, m) in expected.items() if m <= MARGIN}
    assert len(strict) > 0
    assert len(doubts(p, labels)) == 0  # the predictions agree with one label in four


def test_nothing_to_judge_is_nothing_found() -> None:
    assert len(doubts(np.full((3, 2), np.nan), np.array([0, 1, 1]))) == 0
    assert len(doubts(np.zeros((0, 2)), np.zeros(0, np.int64))) == 0


def test_a_finding_names_the_image_its_label_and_the_prediction() -> None:
    p = np.array([[0.99, 0.01], [0.98, 0.02], [0.02, 0.98], [0.99, 0.01], [0.01, 0.99]])
    labels = np.array([0, 0, 1, 1, 1])
    (found,) = doubtful(doubts(p, labels), list("abcde"), labels.tolist(), ["cat", "dog"])
    assert (found.kind, found.uri, found.split) == (DOUBTFUL_LABEL, "d", "train")
    assert (found.label, found.other_label) == ("dog", "cat")
    assert found.value == pytest.approx(-0.98)
