"""Labels that are probably wrong: confident learning (Northcutt et al., arXiv 1911.00068).

The probabilities are those of models that have not seen the label of the image (cross-validation). The threshold of a
class is the mean probability of this class over the images with its label (section 3.1, equation 2). An image is
confidently of another class if its probability of that class reaches the threshold of the class, and no other class
that does so is more probable; such an image is listed (the off-diagonal of the confident joint, equation 1). The
listed images are ordered by the margin between the probability of their label and that of the most probable other
class (section 3.2), most certain errors first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Doubts:
    """Labels that are contradicted, most certain first.

    Attributes:
        row: (n,) int64 rows of the images.
        suggested: (n,) int64 the class that the model predicts.
        margin: (n,) float64 probability of the label minus that of the suggested class, -1..0.
    """

    row: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def doubts(probabilities: np.ndarray, labels: np.ndarray) -> Doubts:
    """Labels that the probabilities contradict.

    Args:
        probabilities: (N, C) out-of-fold probabilities; a row with NaN is not judged.
        labels: (N,) int, 0..C-1.
    """
    judged = np.flatnonzero(np.isfinite(probabilities).all(1))
    p, y = probabilities[judged], labels[judged]
    n, classes = p.shape
    sums = np.bincount(y, weights=p[np.arange(n), y], minlength=classes)
    counts = np.bincount(y, minlength=classes)
    threshold = np.divide(sums, counts, out=np.full(classes, np.inf), where=counts > 0)
    confident = np.where(p >= threshold, p, -1.0)
    own = p[np.arange(n), y]
    suggested = confident.argmax(1) if n else np.zeros(0, np.int64)
    listed = np.flatnonzero((confident[np.arange(n), suggested] > own) & (suggested != y))
    margin = own[listed] - p[listed, suggested[listed]]
    order = np.argsort(margin, kind="stable")
    return Doubts(judged[listed][order], suggested[listed][order], margin[order])
