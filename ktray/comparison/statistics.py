"""What several runs say together: means, spread, intervals, the Pareto front, and what equal accuracy costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One way over its seeds. Accuracies are fractions; cost is the mean over seeds, of all stages a model needed."""

    name: str
    accuracy: float
    spread: float
    low: float
    high: float
    validation: float
    flops: float
    device_seconds: float
    usd: float | None
    steps: int
    seeds: int


def interval(correct: np.ndarray, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean accuracy over test images and seeds, both drawn with replacement.

    Args:
        correct: (S, N) bool, by seed and test image; the same images in every row.
        draws: resamples.
        level: of the interval.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    seeds, images = correct.shape
    values = correct.astype(np.float64)
    means = np.empty(draws)
    for i in range(draws):
        # Means of drawn seeds by image first: the same as indexing both ways, without the (S, N) copy.
        weights = np.bincount(rng.integers(0, seeds, seeds), minlength=seeds) / seeds
        means[i] = (weights @ values)[rng.integers(0, images, images)].mean()
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def difference(a: np.ndarray, b: np.ndarray, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Interval of the accuracy of ``a`` minus that of ``b``; the images are drawn together, the seeds apart."""
    rng = np.random.default_rng(0)
    images = a.shape[1]
    means = np.empty(draws)
    left, right = a.astype(np.float64), b.astype(np.float64)
    for i in range(draws):
        drawn = rng.integers(0, images, images)
        weights = [np.bincount(rng.integers(0, len(x), len(x)), minlength=len(x)) / len(x) for x in (left, right)]
        means[i] = (weights[0] @ left - weights[1] @ right)[drawn].mean()
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, accuracy) that no other point beats in one and equals in the other, by rising cost."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def cheaper(rows: Sequence[Row], index: int) -> tuple[str, float] | None:
    """The cheapest other way that is at least as accurate as row ``index``, and how many times less it costs.

    None where no other way reaches it at less cost.
    """
    me = rows[index]
    able = [r for i, r in enumerate(rows) if i != index and r.accuracy >= me.accuracy and r.flops < me.flops]
    if not able:
        return None
    best = min(able, key=lambda r: r.flops)
    return best.name, me.flops / best.flops
