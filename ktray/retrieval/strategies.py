"""Other choices among the same candidates: the hits of every query, as `ktray.retrieval.search.search` gives them.

``query_balanced`` (`ktray.retrieval.select`) is the paper's. These change one thing each, so that a comparison tells
what it is worth: ``best_first`` drops the equal share, ``class_balanced`` shares out among predicted classes instead of
queries, ``diverse`` and ``informative`` keep each query's share and change which of its candidates fill it. Every
selection says which query brought an image, and its place among that query's hits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from ktray.retrieval.select import Selection, query_balanced

Excluded = Collection[int] | np.ndarray


def best_first(similarity: np.ndarray, index: np.ndarray, size: int, *, exclude: Excluded = ()) -> Selection:
    """The ``size`` images most similar to any query, whichever that is.

    Args:
        similarity, index, size, exclude: as for `query_balanced`.
    """
    flat = _first_of_each(similarity, index)
    chosen = query_balanced(*_rows([flat], similarity, index), size, exclude=exclude)
    return _traced(chosen, [flat], index, size)


def class_balanced(
    similarity: np.ndarray, index: np.ndarray, classes: np.ndarray, size: int, *, exclude: Excluded = ()
) -> Selection:
    """Each predicted class in turn takes its most similar image, round after round, until ``size`` are taken.

    A class without candidates left is passed over, and the others go on.

    Args:
        classes: (Q, k) int64 predicted class of each hit; what it holds where ``index`` is -1 does not matter.
    """
    flat = _first_of_each(similarity, index)
    of_each = classes.ravel()[flat]
    groups = [flat[of_each == one] for one in np.unique(of_each).tolist()]
    chosen = query_balanced(*_rows(groups, similarity, index), size, exclude=exclude)
    return _traced(chosen, groups, index, size)


def diverse(
    similarity: np.ndarray,
    index: np.ndarray,
    embeddings: np.ndarray,
    rows: np.ndarray,
    size: int,
    *,
    exclude: Excluded = (),
) -> Selection:
    """`query_balanced` with each query's candidates in the order of a farthest-point traversal (Gonzalez 1985).

    The nearest comes first, then always the candidate that is least similar to its most similar one among those before
    it, so that any beginning of the order covers the candidates as well as few images can (within a factor of two of
    the best radius). A query's share is taken from as many hits as are given: give a few times the share.

    Args:
        embeddings: (M, D) float32 unit vectors of the candidates.
        rows: (Q, k) int64 row of each hit in ``embeddings``.
    """
    order = np.tile(np.arange(index.shape[1]), (len(index), 1))
    for q in range(len(index)):
        found = int((index[q] >= 0).sum())
        order[q, :found] = farthest_points(embeddings[rows[q, :found]])
    return _reordered(similarity, index, order, size, exclude)


def informative(
    similarity: np.ndarray, index: np.ndarray, margin: np.ndarray, size: int, *, exclude: Excluded = ()
) -> Selection:
    """`query_balanced` with each query's candidates by how undecided the teacher is about them.

    Args:
        margin: (Q, k) difference of the two largest predicted probabilities of each hit (margin sampling, Scheffer et
            al. 2001); smaller is nearer to the decision boundary. Equal margins keep the order of similarity.
    """
    order = np.argsort(np.where(index >= 0, margin, np.inf), axis=1, kind="stable")
    return _reordered(similarity, index, order, size, exclude)


def farthest_points(vectors: np.ndarray) -> np.ndarray:
    """(n,) order in which a farthest-point traversal from the first of (n, D) unit vectors visits them."""
    n = len(vectors)
    order = np.zeros(n, dtype=np.int64)
    nearest = np.full(n, -np.inf)  # similarity to the most similar one visited so far
    for place in range(1, n):
        np.maximum(nearest, vectors @ vectors[order[place - 1]], out=nearest)
        nearest[order[place - 1]] = np.inf
        order[place] = int(nearest.argmin())
    return order


def _first_of_each(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Flat positions of the candidates, each image once (where it is most similar), most similar first."""
    flat = np.flatnonzero(index.ravel() >= 0)
    images, alike = index.ravel()[flat], similarity.ravel()[flat]
    flat = flat[np.lexsort((flat, images, -alike))]
    _, first = np.unique(index.ravel()[flat], return_index=True)
    kept: np.ndarray = flat[np.sort(first)]
    return kept


def _rows(groups: list[np.ndarray], similarity: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of flat positions as a table of hits, a row a group, padded with -1."""
    longest = max((len(group) for group in groups), default=0)
    alike = np.full((len(groups), longest), -np.inf, dtype=np.float32)
    images = np.full((len(groups), longest), -1, dtype=np.int64)
    for row, group in enumerate(groups):
        alike[row, : len(group)] = similarity.ravel()[group]
        images[row, : len(group)] = index.ravel()[group]
    return alike, images


def _traced(chosen: Selection, groups: list[np.ndarray], index: np.ndarray, size: int) -> Selection:
    """The selection with queries and ranks of the hits that the groups were made of."""
    pairs = zip(chosen.query.tolist(), chosen.rank.tolist(), strict=True)
    flat = np.array([groups[row][at] for row, at in pairs], dtype=np.int64)
    k = max(1, index.shape[1])
    full = index.shape[1] > 0 and bool((index[:, -1] >= 0).any())
    more = 2 * k if chosen.missing and full else 0
    return replace(chosen, query=flat // k, rank=flat % k, retry_k=more)


def _reordered(similarity: np.ndarray, index: np.ndarray, order: np.ndarray, size: int, exclude: Excluded) -> Selection:
    chosen = query_balanced(
        np.take_along_axis(similarity, order, 1), np.take_along_axis(index, order, 1), size, exclude=exclude
    )
    return replace(chosen, rank=order[chosen.query, chosen.rank])


NEEDS_PREDICTIONS = ("class_balanced", "informative")


STRATEGIES = ("query_balanced", "class_balanced", "best_first", "diverse", "informative")


def choose(
    strategy: str,
    similarity: np.ndarray,
    found: np.ndarray,
    embeddings: Callable[[np.ndarray], np.ndarray],
    size: int,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
) -> Selection:
    """``size`` images among the candidates, by a strategy of `STRATEGIES`.

    Args:
        strategy: its name.
        similarity, found: (Q, k) hits of the queries, as `ktray.retrieval.search.search` gives them.
        embeddings: gallery rows (n,) to their unit embeddings (n, D) float32.
        size, exclude: as for `query_balanced`.
        predict: unit embeddings to class probabilities; not None for a strategy of `NEEDS_PREDICTIONS`.
    """
    if strategy == "query_balanced":
        return query_balanced(similarity, found, size, exclude=exclude)
    if strategy == "best_first":
        return best_first(similarity, found, size, exclude=exclude)
    images, where = np.unique(found, return_inverse=True)
    rows = where.reshape(found.shape)
    seen = images[images >= 0]
    embedding = embeddings(seen)
    if len(seen) < len(images):  # -1 comes first, and stands for no hit
        rows = np.maximum(rows - 1, 0)
    if strategy == "diverse":
        return diverse(similarity, found, embedding, rows, size, exclude=exclude)
    assert predict is not None
    probability = predict(embedding)
    if strategy == "class_balanced":
        return class_balanced(similarity, found, probability.argmax(1)[rows], size, exclude=exclude)
    best = np.sort(probability, axis=1)
    return informative(similarity, found, (best[:, -1] - best[:, -2])[rows], size, exclude=exclude)
