"""How much of a transfer set belongs to the task: figures for one set, and for other sets of the same size beside it.

Two signs are independent of each other. The similarity to the query says that an image looks like a labelled image; the
agreement says that the adapted teacher gives it the class of that query. Neither is a proof: an image of a class that
the task does not have can pass both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

RANDOM = "random"
_POINTS = 60
# Images of a set of which the teacher's predictions are computed; a share has a standard error below 0.7 points then.
SEEN = 5_000


@dataclass(frozen=True)
class Judged:
    """The judged images of one set: all, or `SEEN` of them in equal steps.

    Attributes:
        similarity: (n,) float32 to the query of each image, in descending order where a curve is drawn.
        near: (n,) bool, whether it reaches the calibrated floor of its query; None without a floor.
        agrees: (n,) bool, whether the teacher predicts the class of its query; None without classes of images.
        confidence: (n,) float32, `confidence` of its prediction; None without classes of images.
        images: number of images in the whole set.
    """

    similarity: np.ndarray
    near: np.ndarray | None
    agrees: np.ndarray | None
    confidence: np.ndarray | None
    images: int

    def figures(self, name: str, shared: float | None) -> dict[str, Any]:
        """One row of the table. ``shared``: share of the chosen set that this set also has."""
        return {
            "name": name,
            "images": self.images,
            "similarity": float(np.median(self.similarity)) if len(self.similarity) else None,
            "near": _mean(self.near),
            "agree": _mean(self.agrees),
            "confidence": _mean(self.confidence),
            "shared": shared,
        }

    def curve(self) -> dict[str, Any]:
        """Points of the curve of the similarity.

        ``rank``: numbers of images, ascending; ``similarity``: that of the image at this rank; ``agree``: share of the
        images between this rank and the one before it whose prediction agrees, None without classes of images.
        """
        n = len(self.similarity)
        ends = np.unique(np.linspace(0, n, min(n, _POINTS) + 1).round().astype(int))[1:]
        starts = np.concatenate([[0], ends[:-1]])
        agree = None
        if self.agrees is not None:
            agree = [float(self.agrees[a:b].mean()) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        return {
            "rank": [round(int(end) * self.images / n) for end in ends],
            "similarity": [float(self.similarity[end - 1]) for end in ends],
            "agree": agree,
        }


def seen(key: np.ndarray, most: int = SEEN) -> np.ndarray:
    """Positions of at most ``most`` values of (n,) ``key``, in ascending order of the values and in equal steps that
    include the first and the last."""
    order = np.argsort(key, kind="stable")
    if len(order) <= most:
        return order
    kept: np.ndarray = order[np.linspace(0, len(order) - 1, most).round().astype(int)]
    return kept


def confidence(probability: np.ndarray) -> np.ndarray:
    """1 minus the entropy of class probabilities (N, C), as a share of the largest possible entropy log C: 1 for a
    certain prediction, 0 for a uniform one; (N,) float32."""
    p = np.asarray(probability, dtype=np.float64)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    value: np.ndarray = (1 - entropy / np.log(max(2, p.shape[1]))).astype(np.float32)
    return value


def _mean(values: np.ndarray | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None
