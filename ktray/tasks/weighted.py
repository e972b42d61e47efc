"""Scores of weighted test images, for a bootstrap over images and seeds.

A metric is a function of sums over test images, so a bootstrap sample is a weight for each image: the number of times
that it was drawn. `WeightedCounts` works for all task kinds; the other classes are faster and need less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class WeightedScores(Protocol):
    """The test images of one method over its seeds, which can be scored with any weights of the images."""

    @property
    def shape(self) -> tuple[int, int]:
        """(S, N): seeds and images."""
        ...

    def score(self, weights: np.ndarray) -> np.ndarray:
        """Scores (B, S) float, 0..1, for weights of the images (B, N) float."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Top-1: ``correct`` is (S, N) bool."""

    correct: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.correct.shape[0], self.correct.shape[1]

    def score(self, weights: np.ndarray) -> np.ndarray:
        right: np.ndarray = weights @ self.correct.T.astype(np.float64)
        return right / weights.sum(1, keepdims=True)


@dataclass(frozen=True)
class MeanClassAccuracy:
    """Mean recall over the classes of the drawn images: ``correct`` is (S, N) bool, ``label`` is (N,) int."""

    correct: np.ndarray
    label: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.correct.shape[0], self.correct.shape[1]

    def score(self, weights: np.ndarray) -> np.ndarray:
        order = np.argsort(self.label, kind="stable")
        starts = np.flatnonzero(np.diff(self.label[order], prepend=-1))
        drawn = weights[:, order]
        images = np.add.reduceat(drawn, starts, axis=1)
        present = images > 0
        scores = []
        for correct in self.correct[:, order]:
            right = np.add.reduceat(drawn * correct, starts, axis=1)
            scores.append(np.divide(right, images, out=np.zeros_like(right), where=present).sum(1) / present.sum(1))
        return np.stack(scores, axis=1)


@dataclass(frozen=True)
class MeanIoU:
    """Mean intersection over union, pixels summed over the images: ``tp``, ``fp``, ``fn`` are (S, N, C) counts.

    A class that is neither in the drawn images nor in the predictions for them is left out of the mean.
    """

    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.tp.shape[0], self.tp.shape[1]

    def score(self, weights: np.ndarray) -> np.ndarray:
        scores = []
        for tp, fp, fn in zip(self.tp, self.fp, self.fn, strict=True):
            inside = weights @ tp.astype(np.float64)
            union = inside + weights @ fp.astype(np.float64) + weights @ fn.astype(np.float64)
            present = union > 0
            iou = np.divide(inside, union, out=np.zeros_like(inside), where=present)
            scores.append(iou.sum(1) / np.maximum(1, present.sum(1)))
        return np.stack(scores, axis=1)


@dataclass(frozen=True)
class WeightedCounts:
    """Any metric of summed counts: ``counts`` is (S, N, K), `scores` computes the metrics from their sums (K,)."""

    counts: np.ndarray
    scores: Callable[[np.ndarray], dict[str, float]]
    metric: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.counts.shape[0], self.counts.shape[1]

    def score(self, weights: np.ndarray) -> np.ndarray:
        sums = np.einsum("bn,snk->bsk", weights, self.counts)
        return np.array([[self.scores(total)[self.metric] for total in seeds] for seeds in sums])
