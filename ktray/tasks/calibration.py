"""How honest class probabilities are: whether an image with probability p is right with frequency p, and how accurate
the confident predictions are.

The confidence of an image is the probability of its predicted class. With the images in 15 bins of equal width by
confidence, the expected calibration error is (Guo et al., arXiv 1706.04599, section 2)

    ECE = sum over bins b of n_b / n * |accuracy of b - mean confidence of b|.

Accuracy at a coverage c is that of the share c of the images with the highest confidence; the model abstains from the
others (Geifman and El-Yaniv, arXiv 1705.08500, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

BINS = 15
_AT_ONCE = 4096  # images of which all probabilities are in memory
COVERAGE = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Class probabilities (N, C) float64 of logits (N, C) that are divided by the temperature."""
    scaled = logits.astype(np.float64) / temperature
    odds = np.exp(scaled - scaled.max(1, keepdims=True))
    return np.asarray(odds / odds.sum(1, keepdims=True))


def calibration(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> dict[str, Any]:
    """The honesty of a model's probabilities.

    Args:
        logits: (N, C) of N > 0 images.
        labels: (N,) true classes.
        temperature: divides the logits.

    Returns:
        ``ece``; ``nll``, the mean negative log-likelihood of the labels, in nats; ``confidence``, the mean; ``bins``,
        those with images, each with its number of ``images``, mean ``confidence`` and ``accuracy``; ``coverage``, a row
        for each of `COVERAGE` with its ``share``, ``accuracy``, and ``threshold``, the lowest confidence in it.
    """
    predicted, confidence, likelihood = certainty(logits, labels, temperature)
    return honesty(confidence, predicted == labels, likelihood)


def certainty(
    logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `honesty` and accuracy need of each image, so that the logits of many classes need not be kept: the
    predicted class (N,) int64, its probability (N,) float64, and the probability of the true class (N,) float64."""

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for first in range(0, max(1, len(logits)), _AT_ONCE):
            p = probabilities(logits[first : first + _AT_ONCE], temperature)
            true = labels[first : first + _AT_ONCE].astype(int)
            yield p.argmax(1), p.max(1), p[np.arange(len(p)), true]

    predicted, confidence, likelihood = (np.concatenate(columns) for columns in zip(*parts(), strict=True))
    return predicted, confidence, likelihood


def honesty(confidence: np.ndarray, right: np.ndarray, likelihood: np.ndarray) -> dict[str, Any]:
    """`calibration`, from the probability of the predicted class (N,), whether it is right (N,) bool, and the
    probability of the true class (N,)."""
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [
        {
            "images": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
        }
        for inside in (number == b for b in range(BINS))
        if inside.any()
    ]
    return {
        "ece": sum(b["images"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(confidence),
        "nll": float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean()),
        "confidence": float(confidence.mean()),
        "bins": bins,
        "coverage": [at_coverage(confidence, right, share) for share in COVERAGE],
    }


def at_coverage(confidence: np.ndarray, right: np.ndarray, share: float) -> dict[str, float]:
    """``share``, ``accuracy`` and ``threshold`` of the most confident images.

    Of images with equal confidence at the threshold, a random choice is taken: its expected accuracy counts.

    Args:
        confidence: (N,).
        right: (N,) bool.
        share: of the images that are predicted; at least one is.
    """
    count = max(1, math.ceil(share * len(confidence) - 1e-9))
    threshold = float(np.sort(confidence)[-count])
    above, at = confidence > threshold, confidence == threshold
    taken = count - int(above.sum())
    accuracy = (float(right[above].sum()) + taken * float(right[at].mean())) / count
    return {"share": share, "accuracy": accuracy, "threshold": threshold}


def answered(confidence: np.ndarray, right: np.ndarray, threshold: float) -> tuple[float, float | None]:
    """The share of images with at least this confidence, and their accuracy; None if there are none."""
    above = confidence >= threshold
    return float(above.mean()), float(right[above].mean()) if above.any() else None
