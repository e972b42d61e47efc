"""A similarity floor: how similar an image must be to a query to count as an image of the task.

The labelled images show which similarities images of the task have. Each of them is left out once, and its highest
similarity to the queries of its own class that were made from other images is taken. An image of the task in the
gallery is drawn like the labelled images, so its highest similarity to the queries of its class has the same
distribution, up to the one image more that these queries have. With the n values in ascending order, a new value falls
below the k-th with a probability of at most k / (n + 1). The floor is the value for k = `LOST` (n + 1), rounded down:
at most 10 of 100 images of the task are lost, whatever the distribution is (the one-sided jackknife; Barber et al.,
arXiv 1905.02928, section 1, and Vovk et al., Algorithmic Learning in a Random World, section 2, for the exact rank).

Nothing limits the share of other images that pass: no labelled image shows what is not part of the task.
"""

from __future__ import annotations

import numpy as np

from ktray.retrieval.search import Hits

# The share of images of the task that a floor may lose. With 10 labelled photographs of each of 101 classes, equal
# shares of 6,000 images and a share of 0.1, 72% of the images that were not of the query's class were below the floor,
# and 4% of those that were; with 0.05, 54% and 1%; with 0.2, 85% and 10%.
LOST = 0.1
# Labelled images of a class from which the values are computed; more do not change a quantile noticeably.
_MOST_PER_CLASS = 2_000


def leave_one_out(
    images: np.ndarray, labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, origin: np.ndarray
) -> np.ndarray:
    """The highest similarity of each labelled image to the queries of its class that were not made from it.

    Args:
        images: (N, D) float32 unit embeddings of the labelled images.
        labels: (N,) int64 their classes; all 0 for a task without classes of images.
        queries: (Q, D) float32 unit embeddings.
        query_labels: (Q,) int64.
        origin: (Q,) int64 row in ``images`` from which a query was made; -1: from none, such as a class name.

    Returns:
        (n,) float32, n <= N: images without such a query have no value.
    """
    values = []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)[:_MOST_PER_CLASS]
        own = np.flatnonzero(query_labels == label)
        if not len(own):
            continue
        similarity = images[rows] @ queries[own].T
        similarity[origin[own][None] == rows[:, None]] = -np.inf
        values.append(similarity.max(1))
    every = np.concatenate(values) if values else np.zeros(0, np.float32)
    kept: np.ndarray = every[np.isfinite(every)].astype(np.float32)
    return kept


def leave_one_out_of_mean(
    images: np.ndarray, labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, origin: np.ndarray
) -> np.ndarray:
    """The similarity of each labelled image to the mean of the queries of its class that were not made from it.

    It is for queries that are means of classes. The arguments and the result are as in `leave_one_out`.
    """
    values = []
    for label in np.unique(labels).tolist():
        rows = np.flatnonzero(labels == label)[:_MOST_PER_CLASS]
        own = np.flatnonzero(query_labels == label)
        total = queries[own].sum(0)
        for row in rows.tolist():
            rest = total - queries[own[origin[own] == row]].sum(0)
            length = float(np.linalg.norm(rest))
            if length > 1e-6:
                values.append(float(images[row] @ rest) / length)
    return np.array(values, dtype=np.float32)


def calibrated(values: np.ndarray, lost: float = LOST) -> float | None:
    """The floor for the values (n,) of `leave_one_out`; None if there are no values.

    It is the k-th lowest value, with k = lost (n + 1) rounded down. With fewer than 1 / lost - 1 values, it is the
    lowest one.
    """
    if not len(values):
        return None
    k = max(1, int(np.floor(lost * (len(values) + 1) + 1e-9)))
    return float(np.sort(values)[k - 1])


def above(hits: Hits, floor: np.ndarray) -> Hits:
    """The hits (Q, k) without those below the floor (Q,) of their query, which become -inf and -1.

    The hits of a query are in descending order, so those that remain are its first ones.
    """
    similarity, index = hits
    near = similarity >= floor[:, None]
    return np.where(near, similarity, -np.inf).astype(np.float32), np.where(near, index, -1)
