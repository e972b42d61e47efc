"""Strategies: the rules that choose the transfer set among the images that the queries retrieve.

A file of this folder (or a module of another package that is listed in the entry point group ``ktray.strategies``)
contains a subclass of `StrategyConfig`, registered with ``@STRATEGIES.register(NAME)``. It defines the recipe keys of
the strategy, its requirements, and ``select``. The candidates are the hits of every query, as
`ktray.retrieval.search.search` returns them. Every selection records which query contributed an image, and the rank of
the image among that query's hits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ktray.recipe.registries import STRATEGIES
from ktray.recipe.strategy import StrategyConfig
from ktray.retrieval.select import Selection

__all__ = [
    "STRATEGIES",
    "Candidates",
    "Excluded",
    "Selection",
    "StrategyConfig",
    "as_table",
    "first_of_each",
    "in_turn",
    "reordered",
    "traced",
]

Excluded = Collection[int] | np.ndarray
Rows = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """The hits of the queries, with embeddings and predictions, which are read or computed once on first access.

    Attributes:
        similarity: (Q, k) float32, in descending order.
        index: (Q, k) int64 gallery rows; the first -1 ends the hits of a query.
        embeddings_of: takes gallery rows (n,) and returns their unit embeddings (n, D) float32.
        predict: takes unit embeddings and returns class probabilities; None if the teacher predicts no classes.
        share: (Q,) positive, the relative shares of the queries; None: equal shares.
    """

    similarity: np.ndarray
    index: np.ndarray
    embeddings_of: Rows
    predict: Rows | None = None
    share: np.ndarray | None = None

    @cached_property
    def embedding(self) -> np.ndarray:
        """(M, D) float32 unit embeddings of the distinct images among the hits."""
        return self.embeddings_of(self._images)

    @cached_property
    def rows(self) -> np.ndarray:
        """(Q, k) int64 row of each hit in `embedding`; the values where ``index`` is -1 have no meaning."""
        return np.searchsorted(self._images, self.index)

    @cached_property
    def probability(self) -> np.ndarray:
        """(M, C) class probabilities of the rows of `embedding`.

        Raises:
            ValueError: the teacher predicts no classes. A strategy with ``needs_predictions`` is not called then.
        """
        if self.predict is None:
            raise ValueError("these candidates have no predictions; set needs_predictions in the strategy")
        return self.predict(self.embedding)

    @cached_property
    def _images(self) -> np.ndarray:
        images = np.unique(self.index)
        valid: np.ndarray = images[images >= 0]
        return valid


def in_turn(
    similarity: np.ndarray,
    index: np.ndarray,
    size: int,
    *,
    exclude: Excluded = (),
    share: np.ndarray | None = None,
) -> Selection:
    """In each round, every query selects its most similar image that is available, until there are ``size`` images.

    Therefore every query has an equal share; if ``size`` is not a multiple of the number of queries, the first queries
    have one image more. With ``share``, a query has turns in proportion to its share: its j-th turn is at the time
    j / share (stride scheduling; Waldspurger and Weihl 1995). A query without remaining hits is skipped in later
    rounds. A smaller ``size`` gives a prefix of the selection, and hits beyond the necessary ones do not change it.

    Args:
        similarity: (Q, k) float32, as `ktray.retrieval.search.search` returns it.
        index: (Q, k) int64 gallery index, most similar first; the first -1 ends the hits of a query.
        size: number of images to select, without the queries themselves.
        exclude: gallery indices that must not be selected, such as near-duplicates of test images.
        share: (Q,) positive, the relative shares of the queries; None: equal shares.
    """
    if index.shape != similarity.shape or index.ndim != 2:
        raise ValueError(f"index has shape {index.shape} and similarity {similarity.shape}; both must be (Q, k)")
    if size < 0:
        raise ValueError(f"size is {size}, but it must be at least 0")
    queries, k = index.shape
    excluded = {int(i) for i in exclude}
    unavailable = set(excluded)
    hits = index.tolist()
    position = [0] * queries
    selected: list[tuple[int, int, int]] = []
    stride = np.ones(queries) if share is None else 1 / np.asarray(share, np.float64)
    turns = [(float(stride[q]), q) for q in range(queries)]
    heapq.heapify(turns)
    while turns and len(selected) < size:
        time, q = turns[0]
        row, at = hits[q], position[q]
        while at < k and row[at] in unavailable:
            at += 1
        position[q] = at + 1
        if at < k and row[at] >= 0:
            unavailable.add(row[at])
            selected.append((row[at], q, at))
            heapq.heapreplace(turns, (time + float(stride[q]), q))
        else:
            heapq.heappop(turns)
    columns = np.array(selected, dtype=np.int64).reshape(-1, 3)
    gallery, query, rank = columns[:, 0], columns[:, 1], columns[:, 2]
    quota = _quota(stride, size)
    contributed = np.bincount(query, minlength=queries)
    short = contributed < quota
    return Selection(
        gallery,
        query,
        rank,
        similarity[query, rank].astype(np.float32),
        missing=size - len(selected),
        shortfall=int((quota - contributed)[short].sum()),
        retry_k=_retry_k(index, quota, contributed, short, size + len(excluded), size > len(selected)),
    )


def _quota(stride: np.ndarray, size: int) -> np.ndarray:
    """(Q,) int64, the number of images that each query has if all have enough hits."""
    if not len(stride):
        return np.zeros(0, np.int64)
    exact = size / stride / (1 / stride).sum()
    quota = np.floor(exact + 1e-9).astype(np.int64)
    # The next turns are the earliest ones.
    quota[np.argsort((quota + 1) * stride, kind="stable")[: size - int(quota.sum())]] += 1
    return quota


def _retry_k(
    index: np.ndarray, quota: np.ndarray, contributed: np.ndarray, short: np.ndarray, bound: int, missing: bool
) -> int:
    """Number of hits per query for the next search: estimated from the query with the lowest yield, at least doubled.

    ``bound`` hits (the number of images that can be selected or excluded) are always sufficient.
    """
    k = index.shape[1]
    extendable = short & (index[:, -1] >= 0) if k else short
    if missing and not extendable.any() and k:
        # The queries that missed their shares have no more hits above the floor, but others may have more.
        extendable = index[:, -1] >= 0
    if not extendable.any() or k >= bound:
        return 0
    needed = np.ceil(k * quota[extendable] / np.maximum(1, contributed[extendable])).max()
    return int(min(bound, max(2 * k, needed, 1)))


def first_of_each(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Flat positions of the candidates, most similar first; each image once, at its highest similarity."""
    flat = np.flatnonzero(index.ravel() >= 0)
    images, similarities = index.ravel()[flat], similarity.ravel()[flat]
    flat = flat[np.lexsort((flat, images, -similarities))]
    _, first = np.unique(index.ravel()[flat], return_index=True)
    kept: np.ndarray = flat[np.sort(first)]
    return kept


def as_table(groups: list[np.ndarray], similarity: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of flat positions as a table of hits: one row per group, padded with -1."""
    longest = max((len(group) for group in groups), default=0)
    similarities = np.full((len(groups), longest), -np.inf, dtype=np.float32)
    images = np.full((len(groups), longest), -1, dtype=np.int64)
    for row, group in enumerate(groups):
        similarities[row, : len(group)] = similarity.ravel()[group]
        images[row, : len(group)] = index.ravel()[group]
    return similarities, images


def traced(chosen: Selection, groups: list[np.ndarray], index: np.ndarray, size: int) -> Selection:
    """A selection from the table of `as_table`, with its queries and ranks replaced by those of the original hits."""
    pairs = zip(chosen.query.tolist(), chosen.rank.tolist(), strict=True)
    flat = np.array([groups[row][at] for row, at in pairs], dtype=np.int64)
    k = max(1, index.shape[1])
    full = index.shape[1] > 0 and bool((index[:, -1] >= 0).any())
    more = 2 * k if chosen.missing and full else 0
    return replace(chosen, query=flat // k, rank=flat % k, retry_k=more)


def reordered(
    similarity: np.ndarray,
    index: np.ndarray,
    order: np.ndarray,
    size: int,
    exclude: Excluded,
    share: np.ndarray | None = None,
) -> Selection:
    """`in_turn` with the hits of each query in another order. ``order`` (Q, k) contains their ranks by similarity."""
    hits = np.take_along_axis(similarity, order, 1), np.take_along_axis(index, order, 1)
    chosen = in_turn(*hits, size, exclude=exclude, share=share)
    return replace(chosen, rank=order[chosen.query, chosen.rank])
