"""Statistics over runs: metrics as sums over images, the bootstrap, the Pareto front, the cost of equal accuracy.

Each metric is a function of sums over test images, so a bootstrap sample is a weight for each image: how often it was
drawn. All methods are scored on the same drawn images (a paired bootstrap); their seeds are drawn independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ktray.tasks.weighted import WeightedScores

DRAWS = 2000
LEVEL = 0.95
_CHUNK_BYTES = 64_000_000  # drawn weights that are in memory at once


def plain(scores: WeightedScores) -> np.ndarray:
    """Return the scores (S,) of S seeds on the test set without resampling."""
    scores_on_test: np.ndarray = scores.score(np.ones((1, scores.shape[1])))[0]
    return scores_on_test


def resample(methods: Sequence[WeightedScores], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap each method's mean over seeds: images and seeds are drawn with replacement.

    Args:
        methods: the scores of each method, all with the same N test images in the same order; the numbers of seeds may
            differ.
        draws: number of resamples.
        seed: seed of the resampling.

    Returns:
        (draws, len(methods)) float64.
    """
    rng = np.random.default_rng(seed)
    (images,) = {method.shape[1] for method in methods}
    out = np.empty((draws, len(methods)))
    chunk = max(1, min(draws, _CHUNK_BYTES // (8 * images)))
    for at in range(0, draws, chunk):
        some = min(chunk, draws - at)
        weights = np.stack([np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(some)])
        for column, method in enumerate(methods):
            seeds = method.shape[0]
            taken = rng.integers(0, seeds, (some, seeds))
            scores = method.score(weights.astype(np.float64))
            out[at : at + some, column] = np.take_along_axis(scores, taken, axis=1).mean(1)
    return out


def interval(sample: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of a (draws,) sample. For the interval of a difference, pass the difference of
    two columns."""
    tail = (1 - level) / 2
    low, high = np.quantile(sample, [tail, 1 - tail])
    return float(low), float(high)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto set of (cost, accuracy), by rising cost.

    A point is in the set if no other point is better in one of the two and at least equal in the other.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    front: list[int] = []
    for i in order:
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


@dataclass(frozen=True)
class Reach:
    """The cheapest of several runs that is at least as accurate as a reference.

    Attributes:
        index: index of the run.
        times: the reference's cost divided by this run's cost.
        low, high: interval of ``times`` over the bootstrap. In draws in which no run reached the reference, ``times``
            is 0.
    """

    index: int
    times: float
    low: float
    high: float


def reach(
    accuracy: Sequence[float], cost: Sequence[float], sample: np.ndarray, reference: int, runs: Sequence[int]
) -> Reach | None:
    """Find the cheapest of ``runs`` that is at least as accurate as ``reference``; None if there is none.

    Nothing is interpolated between runs. The cheapest run is determined again in each bootstrap draw, so the interval
    also shows how certain it is that the accuracy is reached at all.

    Args:
        accuracy, cost: mean accuracy and mean cost of each method.
        sample: (draws, methods), see `resample`.
        reference: index of the method to reach.
        runs: indices of the candidate runs.
    """
    costs = np.array([cost[i] for i in runs], dtype=np.float64)

    def cheapest(reached: np.ndarray) -> np.ndarray:
        return np.where(reached, costs, np.inf).min(axis=-1)

    able = np.array([accuracy[i] >= accuracy[reference] for i in runs], dtype=bool)
    if not able.any():
        return None
    best = cheapest(able)
    times = cost[reference] / cheapest(sample[:, list(runs)] >= sample[:, [reference]])
    # The sample has few distinct values, so the quantile must not interpolate between two of them.
    tail = (1 - LEVEL) / 2
    low = float(np.quantile(times, tail, method="lower"))
    high = float(np.quantile(times, 1 - tail, method="higher"))
    index = next(i for i, c, ok in zip(runs, costs, able, strict=True) if ok and c == best)
    return Reach(index, cost[reference] / float(best), low, high)
