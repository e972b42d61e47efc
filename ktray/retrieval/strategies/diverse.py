"""Select images for each query that differ from each other."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, reordered


@STRATEGIES.register("diverse")
class Diverse(StrategyConfig):
    """Every query has an equal share, which consists of the candidates that differ most from each other. Use it if the
    most similar images of a query are almost copies of one image."""

    name: Literal["diverse"] = "diverse"

    order: ClassVar[int] = 40
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return diverse(
            candidates.similarity,
            candidates.index,
            candidates.embedding,
            candidates.rows,
            size,
            exclude=exclude,
            share=candidates.share,
        )


def diverse(
    similarity: np.ndarray,
    index: np.ndarray,
    embeddings: np.ndarray,
    rows: np.ndarray,
    size: int,
    *,
    exclude: Excluded = (),
    share: np.ndarray | None = None,
) -> Selection:
    """`in_turn` with each query's candidates in the order of a farthest-point traversal (Gonzalez 1985).

    The most similar candidate is first. Each following candidate is the one with the lowest maximum similarity to the
    candidates before it. Every prefix of this order covers the candidates with a radius of at most twice the optimum
    for the same number of images. A query's share is selected from all its hits: ``index`` should have several times
    as many hits as the share.

    Args:
        embeddings: (M, D) float32 unit vectors of the candidates.
        rows: (Q, k) int64 row of each hit in ``embeddings``.
        share: as in `in_turn`.
    """
    order = np.tile(np.arange(index.shape[1]), (len(index), 1))
    for q in range(len(index)):
        hits = int((index[q] >= 0).sum())
        order[q, :hits] = farthest_points(embeddings[rows[q, :hits]])
    return reordered(similarity, index, order, size, exclude, share)


def farthest_points(vectors: np.ndarray) -> np.ndarray:
    """(n,) order in which a farthest-point traversal from the first of (n, D) unit vectors visits them."""
    n = len(vectors)
    order = np.zeros(n, dtype=np.int64)
    nearest = np.full(n, -np.inf)  # similarity to the most similar vector visited so far
    for place in range(1, n):
        np.maximum(nearest, vectors @ vectors[order[place - 1]], out=nearest)
        nearest[order[place - 1]] = np.inf
        order[place] = int(nearest.argmin())
    return order
