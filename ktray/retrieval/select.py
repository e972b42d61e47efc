"""A selection of gallery images, and the selections without queries. Those with queries are in `strategies/`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Gallery images in the order of selection; row i of every column belongs to image i.

    Attributes:
        gallery: (n,) int64 gallery index, no value twice.
        query: (n,) int64 row of the query that contributed the image; -1 without a query.
        rank: (n,) int64 rank of the image among the query's hits, 0 for the most similar; -1 without a query.
        similarity: (n,) float32 similarity to the query; NaN without a query.
        missing: number of images by which the selection is smaller than the requested size.
        shortfall: number of images by which queries missed their own shares because their hits were exhausted. Other
            queries replaced them as far as possible; ``missing`` counts the rest.
        retry_k: number of hits per query with which a new search may remove the shortfall; 0 if there is no shortfall,
            or if more hits cannot help because those queries already had the whole gallery as hits.
    """

    gallery: np.ndarray
    query: np.ndarray
    rank: np.ndarray
    similarity: np.ndarray
    missing: int
    shortfall: int
    retry_k: int

    def __len__(self) -> int:
        return len(self.gallery)


def random_selection(n: int, size: int, seed: int, *, exclude: Collection[int] | np.ndarray = ()) -> Selection:
    """A uniform random draw of ``size`` of ``n`` gallery images, without queries.

    The same seed with a smaller ``size`` gives a prefix.
    """
    if size < 0:
        raise ValueError(f"size is {size}, but it must be at least 0")
    return _without_queries(np.random.default_rng(seed).permutation(n).astype(np.int64), size, exclude)


def listed_selection(n: int, size: int | None, *, exclude: Collection[int] | np.ndarray = ()) -> Selection:
    """The ``n`` images of a list in their order; only the first ``size`` if it is set."""
    return _without_queries(np.arange(n, dtype=np.int64), size, exclude)


def _without_queries(order: np.ndarray, size: int | None, exclude: Collection[int] | np.ndarray) -> Selection:
    """The first ``size`` images of ``order`` that are not excluded, as a selection without queries."""
    gallery = order[~np.isin(order, np.fromiter(exclude, dtype=np.int64))][:size]
    no_query = np.full(len(gallery), -1, dtype=np.int64)
    similarity = np.full(len(gallery), np.nan, dtype=np.float32)
    return Selection(
        gallery, no_query, no_query, similarity, missing=max(0, (size or 0) - len(gallery)), shortfall=0, retry_k=0
    )
