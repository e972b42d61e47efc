"""What a strategy is: which of the images that the queries find are taken.

A file of this folder (or a module of another package, named by the entry point group ``ktray.strategies``) holds a
subclass of `StrategyConfig`, registered by ``@STRATEGIES.register(NAME)``: the recipe keys of the strategy, what it
needs, and ``select``. The candidates are the hits of every query, as `ktray.retrieval.search.search` gives them. Every
selection says which query brought an image, and its place among that query's hits.
"""

from __future__ import annotations

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
    """The queries' hits, and what can be asked about them; it is read or computed once, when it is first asked for.

    Attributes:
        similarity: (Q, k) float32, largest first.
        index: (Q, k) int64 gallery rows; -1 ends a row.
        embeddings_of: gallery rows (n,) to their unit embeddings (n, D) float32.
        predict: unit embeddings to class probabilities; None where the teacher predicts none.
    """

    similarity: np.ndarray
    index: np.ndarray
    embeddings_of: Rows
    predict: Rows | None = None

    @cached_property
    def embedding(self) -> np.ndarray:
        """(M, D) float32 unit embeddings of the different images among the hits."""
        return self.embeddings_of(self._images)

    @cached_property
    def rows(self) -> np.ndarray:
        """(Q, k) int64 row of each hit in `embedding`; what it holds where ``index`` is -1 does not matter."""
        return np.searchsorted(self._images, self.index)

    @cached_property
    def probability(self) -> np.ndarray:
        """(M, C) class probabilities of the rows of `embedding`.

        Raises:
            ValueError: the teacher predicts none. A strategy with ``needs_predictions`` is never called then.
        """
        if self.predict is None:
            raise ValueError("these candidates have no predictions; the strategy has to set needs_predictions")
        return self.predict(self.embedding)

    @cached_property
    def _images(self) -> np.ndarray:
        images = np.unique(self.index)
        found: np.ndarray = images[images >= 0]
        return found


def in_turn(
    similarity: np.ndarray,
    index: np.ndarray,
    size: int,
    *,
    exclude: Excluded = (),
) -> Selection:
    """Each query in turn takes its nearest image that nobody has, round after round, until ``size`` are taken.

    So every query has an equal share; where ``size`` is no multiple of the number of queries, the first ones
    have one more. A query without hits left is passed over and the others go on. A smaller ``size`` gives a
    prefix, and hits beyond those that were needed change nothing.

    Args:
        similarity: (Q, k) float32, as `ktray.retrieval.search.search` returns it.
        index: (Q, k) int64 gallery index, nearest first; -1 ends a row.
        size: images wanted, without the queries themselves.
        exclude: gallery indices that must not be taken, such as near-duplicates of test images.
    """
    if index.shape != similarity.shape or index.ndim != 2:
        raise ValueError(f"index has shape {index.shape} and similarity {similarity.shape}, not both (Q, k)")
    if size < 0:
        raise ValueError(f"size is {size}, not at least 0")
    queries, k = index.shape
    excluded = {int(i) for i in exclude}
    unavailable = set(excluded)
    hits = index.tolist()
    position = [0] * queries
    taken: list[tuple[int, int, int]] = []
    active = list(range(queries))
    while active and len(taken) < size:
        going_on = []
        for q in active:
            if len(taken) == size:
                break
            row, at = hits[q], position[q]
            while at < k and row[at] in unavailable:
                at += 1
            position[q] = at + 1
            if at < k and row[at] >= 0:
                unavailable.add(row[at])
                taken.append((row[at], q, at))
                going_on.append(q)
        active = going_on
    columns = np.array(taken, dtype=np.int64).reshape(-1, 3)
    gallery, query, rank = columns[:, 0], columns[:, 1], columns[:, 2]
    quota = np.full(queries, size // max(1, queries))
    quota[: size % max(1, queries)] += 1
    got = np.bincount(query, minlength=queries)
    short = got < quota
    return Selection(
        gallery,
        query,
        rank,
        similarity[query, rank].astype(np.float32),
        missing=size - len(taken),
        shortfall=int((quota - got)[short].sum()),
        retry_k=_retry_k(index, quota, got, short, size + len(excluded)),
    )


def _retry_k(index: np.ndarray, quota: np.ndarray, got: np.ndarray, short: np.ndarray, bound: int) -> int:
    """Hits per query for the next search: as many more as the worst query's yield suggests, at least double.

    ``bound`` (all that can be taken or excluded) hits always suffice.
    """
    k = index.shape[1]
    mendable = short & (index[:, -1] >= 0) if k else short
    if not mendable.any() or k >= bound:
        return 0
    needed = np.ceil(k * quota[mendable] / np.maximum(1, got[mendable])).max()
    return int(min(bound, max(2 * k, needed, 1)))


def first_of_each(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Flat positions of the candidates, each image once (where it is most similar), most similar first."""
    flat = np.flatnonzero(index.ravel() >= 0)
    images, alike = index.ravel()[flat], similarity.ravel()[flat]
    flat = flat[np.lexsort((flat, images, -alike))]
    _, first = np.unique(index.ravel()[flat], return_index=True)
    kept: np.ndarray = flat[np.sort(first)]
    return kept


def as_table(groups: list[np.ndarray], similarity: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of flat positions as a table of hits, a row a group, padded with -1."""
    longest = max((len(group) for group in groups), default=0)
    alike = np.full((len(groups), longest), -np.inf, dtype=np.float32)
    images = np.full((len(groups), longest), -1, dtype=np.int64)
    for row, group in enumerate(groups):
        alike[row, : len(group)] = similarity.ravel()[group]
        images[row, : len(group)] = index.ravel()[group]
    return alike, images


def traced(chosen: Selection, groups: list[np.ndarray], index: np.ndarray, size: int) -> Selection:
    """The selection with queries and ranks of the hits that the groups were made of."""
    pairs = zip(chosen.query.tolist(), chosen.rank.tolist(), strict=True)
    flat = np.array([groups[row][at] for row, at in pairs], dtype=np.int64)
    k = max(1, index.shape[1])
    full = index.shape[1] > 0 and bool((index[:, -1] >= 0).any())
    more = 2 * k if chosen.missing and full else 0
    return replace(chosen, query=flat // k, rank=flat % k, retry_k=more)


def reordered(similarity: np.ndarray, index: np.ndarray, order: np.ndarray, size: int, exclude: Excluded) -> Selection:
    """`in_turn` with each query's hits in another order; ``order`` (Q, k) holds their places by similarity."""
    chosen = in_turn(
        np.take_along_axis(similarity, order, 1), np.take_along_axis(index, order, 1), size, exclude=exclude
    )
    return replace(chosen, rank=order[chosen.query, chosen.rank])
