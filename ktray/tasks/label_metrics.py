"""Metrics of predictions for sets of classes, where each class has a score of its own.

The average precision of a class is the sum over the images, from the highest score to the lowest, of the precision at
the score times the increase of the recall, without interpolation: ``sum_k (R_k - R_{k-1}) P_k``, where k runs over the
different scores (as in scikit-learn's ``average_precision_score``). A class that no image has is left out of means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DEFAULT_THRESHOLD = 0.5


def average_precision(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The average precision of each class, a fraction; NaN for a class that no image has.

    Args:
        scores: (N, C), any scale.
        labels: (N, C), 0 or 1.
        weights: (B, N), weights of the images, for example how often a bootstrap has drawn them. Images of weight 0 do
            not count. None: (1, N) ones.

    Returns:
        (B, C) float64.
    """
    images, classes = scores.shape
    weights = np.ones((1, images)) if weights is None else np.asarray(weights, np.float64)
    out = np.full((len(weights), classes), np.nan)
    if not images:
        return out
    for c in range(classes):
        order = np.argsort(-scores[:, c], kind="stable")
        ranked = scores[order, c]
        last = np.append(np.flatnonzero(ranked[:-1] != ranked[1:]), images - 1)  # of each group of equal scores
        drawn = weights[:, order]
        right = np.cumsum(drawn * (labels[order, c] > 0), axis=1)[:, last]
        claimed = np.cumsum(drawn, axis=1)[:, last]
        precision = np.divide(right, claimed, out=np.zeros_like(right), where=claimed > 0)
        total = right[:, -1]
        steps = (np.diff(right, axis=1, prepend=0.0) * precision).sum(1)
        out[:, c] = np.divide(steps, total, out=out[:, c].copy(), where=total > 0)
    return out


def mean_over_classes(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis without NaN; 0 where all are NaN."""
    known = ~np.isnan(values)
    total: np.ndarray = np.where(known, values, 0.0).sum(-1) / np.maximum(1, known.sum(-1))
    return total


def f1(right: np.ndarray, claimed: np.ndarray, true: np.ndarray) -> np.ndarray:
    """F1 by class, 2 TP / (2 TP + FP + FN), from the numbers of correct predictions, of predictions and of labels; NaN
    for a class that is neither labelled nor predicted."""
    return ratio(2 * right, claimed + true)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients, NaN for 0 / 0."""
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=np.asarray(whole) > 0)


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By class, the threshold of the probability with the highest F1: a class is predicted from its threshold upwards.

    A threshold lies halfway between two neighbouring probabilities. Among equally good ones it is the one nearest to
    0.5; a class that no image has keeps 0.5.

    Args:
        probabilities: (N, C), 0..1.
        labels: (N, C), 0 or 1.

    Returns:
        (C,) float64.
    """
    images, classes = probabilities.shape
    out = np.full(classes, DEFAULT_THRESHOLD)
    for c in range(classes):
        true = int((labels[:, c] > 0).sum())
        if not true:
            continue
        order = np.argsort(-probabilities[:, c], kind="stable")
        ranked = probabilities[order, c].astype(np.float64)
        last = np.append(np.flatnonzero(ranked[:-1] != ranked[1:]), images - 1)
        right = np.cumsum(labels[order, c] > 0)[last]
        values = 2 * right / (last + 1 + true)
        below = np.append(ranked[last[:-1] + 1], 0.0)  # the next lower probability
        middle = (ranked[last] + below) / 2
        best = np.flatnonzero(values >= values.max() - 1e-12)
        out[c] = middle[best[np.argmin(np.abs(middle[best] - DEFAULT_THRESHOLD))]]
    return out


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean average precision under weights of the images (`ktray.tasks.weighted.WeightedScores`): ``scores`` is
    (S, N, C), ``labels`` (N, C)."""

    scores: np.ndarray
    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.scores.shape[0], self.scores.shape[1]

    def score(self, weights: np.ndarray) -> np.ndarray:
        seeds = [mean_over_classes(average_precision(scores, self.labels, weights)) for scores in self.scores]
        return np.stack(seeds, axis=1)
