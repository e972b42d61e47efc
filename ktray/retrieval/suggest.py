"""Rank unlabelled images for labelling, by what their labels would add to those that exist.

The first criterion is coverage in the teacher's probability space (PCoreSet: "Effective Active Learning through
Knowledge Distillation from Vision-Language Models", arXiv 2506.00910): the next image is the one whose class
probabilities are farthest from those of all labelled images and of the images before it, which is a farthest-first
traversal (Gonzalez, Clustering to Minimize the Maximum Intercluster Distance, 1985) that starts from the labelled
images. The second is the disagreement of student and teacher, the Jensen-Shannon divergence of their predictions (Lin,
Divergence Measures Based on the Shannon Entropy, 1991): where they differ, one of them is wrong. With the distance d
and the disagreement j, both of one image, the next image is the one with the largest

    d (1 + j),    0 <= d <= sqrt(2),    0 <= j <= 1,

so that disagreement at most doubles the weight of a distance, and an image whose prediction is already covered is not
suggested only because the student does not know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_VALUES_AT_ONCE = 16_000_000  # float64 values in memory at a time: 128 MB


@dataclass(frozen=True)
class Ranked:
    """Suggested images, the most valuable first.

    Attributes:
        rows: (n,) int64 rows of the candidates, no value twice.
        distance: (n,) float64 Euclidean distance of each image's class probabilities to the nearest ones of the
            labelled images and of the images before it.
        repeated: number of candidates that were passed over because they show the same as a suggested one.
    """

    rows: np.ndarray
    distance: np.ndarray
    repeated: int


def farthest_first(
    probabilities: np.ndarray,
    labelled: np.ndarray,
    count: int,
    disagreement: np.ndarray | None = None,
    repeats: Callable[[int], bool] = lambda row: False,
) -> Ranked:
    """Rank ``count`` candidates, or all of them if there are fewer. Of equal ones, the first is taken.

    Args:
        probabilities: (N, C) float class probabilities of the candidates by the teacher.
        labelled: (L, C) float those of the labelled images, L >= 1.
        disagreement: (N,) float of student and teacher, 0..1; None: only the distance ranks.
        repeats: a function that takes the row of the next image, and returns whether it shows the same as one that was
            accepted before. Such an image is passed over.
    """
    distance = nearest_distance(probabilities, labelled)
    weight = np.ones(len(distance)) if disagreement is None else 1.0 + disagreement.astype(np.float64)
    open_ = np.ones(len(distance), dtype=bool)
    rows: list[int] = []
    distances: list[float] = []
    repeated = 0
    while len(rows) < count and open_.any():
        best = int(np.where(open_, distance * weight, -1.0).argmax())
        open_[best] = False
        if repeats(best):
            repeated += 1
            continue
        rows.append(best)
        distances.append(float(distance[best]))
        np.minimum(distance, nearest_distance(probabilities, probabilities[best : best + 1]), out=distance)
    return Ranked(np.array(rows, dtype=np.int64), np.array(distances), repeated)


def nearest_distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) float64 Euclidean distance of each of (N, C) points to the nearest of (L, C) others."""
    other = others.astype(np.float64)
    out = np.empty(len(points))
    step = max(1, _VALUES_AT_ONCE // max(points.shape[1], len(other)))
    for at in range(0, len(points), step):
        part = points[at : at + step].astype(np.float64)
        squares = (part**2).sum(1)[:, None] - 2 * part @ other.T + (other**2).sum(1)[None]
        out[at : at + step] = np.sqrt(squares.min(1).clip(min=0.0))
    return out


def disagreement(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """(N,) float64 Jensen-Shannon divergence of two predictions in bits, 0 (equal) to 1 (no class in common).

    Args:
        teacher, student: (N, C) float class probabilities.
    """
    p, q = teacher.astype(np.float64), student.astype(np.float64)
    mean = (p + q) / 2
    return np.asarray(((_relative_entropy(p, mean) + _relative_entropy(q, mean)) / 2).clip(0.0, 1.0))


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(N,) relative entropy of (N, C) ``p`` to ``q`` in bits; a class of probability 0 in ``p`` adds nothing."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0)
    return np.asarray((p * np.log2(ratio)).sum(1))
