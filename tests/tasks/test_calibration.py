"""Calibration against other computations: scikit-learn's curve, loops, closed forms, and all orders of ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve

from ktray.models.teacher.heads import fit_temperature
from ktray.tasks import calibration as module
from ktray.tasks.calibration import BINS, COVERAGE, answered, at_coverage, calibration, probabilities


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, np.ndarray]:
    """Logits of 4,000 images whose labels are drawn from their softmax: a calibrated model."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2.5, (4000, 5)).astype(np.float32)
    labels = np.array([rng.choice(5, p=row) for row in softmax(logits.astype(np.float64), axis=1)])
    return logits, labels


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_bins_are_those_of_scikit_learn(scored, temperature) -> None:
    logits, labels = scored
    p = softmax(logits.astype(np.float64) / temperature, axis=1)
    confidence, right = p.max(1), p.argmax(1) == labels
    found = calibration(logits, labels, temperature)
    accuracy, mean = calibration_curve(right, confidence, n_bins=BINS, strategy="uniform")
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx(accuracy)
    assert [b["confidence"] for b in found["bins"]] == pytest.approx(mean)
    expected, images = 0.0, 0
    for b in range(BINS):  # the definition, image by image
        inside = [i for i in range(len(p)) if min(int(confidence[i] * BINS), BINS - 1) == b]
        if inside:
            gap = abs(sum(right[i] for i in inside) - sum(confidence[i] for i in inside))
            expected, images = expected + gap / len(p), images + len(inside)
    assert found["ece"] == pytest.approx(expected)
    assert sum(b["images"] for b in found["bins"]) == images == len(p)
    rows = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    assert found["nll"] == pytest.approx(-rows[np.arange(len(labels)), labels].mean())
    assert found["confidence"] == pytest.approx(confidence.mean())


def test_an_overconfident_model_is_found_and_its_temperature_mends_it(scored) -> None:
    logits, labels = scored
    assert calibration(logits, labels)["ece"] < 0.03  # only the noise of 4,000 draws
    sharp = logits * 4
    before = calibration(sharp, labels)
    assert before["ece"] > 0.15
    assert before["confidence"] > np.mean(sharp.argmax(1) == labels) + 0.15
    temperature = fit_temperature(torch.from_numpy(sharp), torch.from_numpy(labels))
    assert temperature == pytest.approx(4, rel=0.1)
    after = calibration(sharp, labels, temperature)
    assert after["ece"] < 0.03
    assert after["nll"] < before["nll"]


def test_accuracy_at_coverage_is_that_of_the_most_confident(scored) -> None:
    logits, labels = scored
    p = softmax(logits.astype(np.float64), axis=1)
    confidence, right = p.max(1), p.argmax(1) == labels
    order = np.argsort(-confidence)
    for row, share in zip(calibration(logits, labels)["coverage"], COVERAGE, strict=True):
        taken = order[: math.ceil(share * len(order))]
        assert row["share"] == share
        assert row["accuracy"] == pytest.approx(right[taken].mean())
        assert row["threshold"] == confidence[taken].min()
        assert answered(confidence, right, row["threshold"]) == (len(taken) / len(order), right[taken].mean())


def test_of_ties_every_choice_counts_alike() -> None:
    confidence, right = np.array([0.9, 0.5, 0.5, 0.5, 0.2]), np.array([True, True, False, False, True])
    for share, taken in ((0.4, 2), (0.6, 3)):
        choices = [[0, *more] for more in itertools.combinations((1, 2, 3), taken - 1)]
        expected = np.mean([right[list(choice)].mean() for choice in choices])
        found = at_coverage(confidence, right, share)
        assert found == {"share": share, "accuracy": pytest.approx(expected), "threshold": 0.5}
    assert at_coverage(confidence, right, 0.01)["accuracy"] == 1  # at least one image
    assert answered(confidence, right, 0.95) == (0.0, None)


def test_extreme_logits_have_probabilities() -> None:
    logits = np.array([[1e4, -1e4], [0.0, 0.0], [-1e4, 1e4]], np.float32)
    assert probabilities(logits) == pytest.approx(np.array([[1, 0], [0.5, 0.5], [0, 1]]))
    found = calibration(logits, np.array([1, 0, 1]))
    assert np.isfinite(found["nll"])
    assert [b["images"] for b in found["bins"]] == [1, 2]


def test_pieces_of_many_images_are_as_the_whole(scored, monkeypatch) -> None:
    logits, labels = scored
    whole = calibration(logits, labels, 0.7)
    monkeypatch.setattr(module, "_AT_ONCE", 333)
    assert calibration(logits, labels, 0.7) == whole
