"""Each query's share is spread over what it finds."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, reordered


@STRATEGIES.register("diverse")
class Diverse(StrategyConfig):
    """Every query has an equal share, filled with those of its candidates that differ most from each other. Use it when
    the nearest images of a query are nearly the same image many times."""

    name: Literal["diverse"] = "diverse"

    order: ClassVar[int] = 40
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return diverse(
            candidates.similarity, candidates.index, candidates.embedding, candidates.rows, size, exclude=exclude
        )


def diverse(
    similarity: np.ndarray,
    index: np.ndarray,
    embeddings: np.ndarray,
    rows: np.ndarray,
    size: int,
    *,
    exclude: Excluded = (),
) -> Selection:
    """`in_turn` with each query's candidates in the order of a farthest-point traversal (Gonzalez 1985).

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
    return reordered(similarity, index, order, size, exclude)


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
