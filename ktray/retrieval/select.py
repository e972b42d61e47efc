"""Which gallery images enter the transfer set.

``query_balanced`` is the paper's choice (arXiv 2311.18237, section on retrieval): every query brings the same
number of images, none twice. The released lists show the arithmetic: 1,200 queries that count themselves among
their 128 bring 127 x 1,200 = 152,400 retrieved images.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """Gallery images in the order in which they were taken; row i of every column is image i.

    Attributes:
        gallery: (n,) int64 gallery index, no value twice.
        query: (n,) int64 row of the query that brought it; -1 where there was none.
        rank: (n,) int64 its place among the query's hits, 0 is the nearest; -1 without a query.
        similarity: (n,) float32; NaN without a query.
        missing: images short of the size that was asked for.
        shortfall: places that queries could not fill from their own hits before their hits ran out. Other
            queries took those over as far as they could (``missing`` is what nobody could).
        retry_k: hits per query worth searching for to mend the shortfall; 0 if there is none, or if more hits
            cannot help because those queries have seen the whole gallery.
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


def query_balanced(
    similarity: np.ndarray,
    index: np.ndarray,
    size: int,
    *,
    exclude: Collection[int] | np.ndarray = (),
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


def random_selection(n: int, size: int, seed: int, *, exclude: Collection[int] | np.ndarray = ()) -> Selection:
    """``size`` of ``n`` gallery images without looking at any query, each equally likely.

    The same seed with a smaller ``size`` gives a prefix.
    """
    if size < 0:
        raise ValueError(f"size is {size}, not at least 0")
    return _unasked(np.random.default_rng(seed).permutation(n).astype(np.int64), size, exclude)


def listed_selection(n: int, size: int | None, *, exclude: Collection[int] | np.ndarray = ()) -> Selection:
    """All of ``n`` images that somebody has chosen already, in their order; the first ``size`` where it is given."""
    return _unasked(np.arange(n, dtype=np.int64), size, exclude)


def _unasked(order: np.ndarray, size: int | None, exclude: Collection[int] | np.ndarray) -> Selection:
    """The first ``size`` of ``order`` that are not excluded; no query brought them."""
    gallery = order[~np.isin(order, np.fromiter(exclude, dtype=np.int64))][:size]
    none = np.full(len(gallery), -1, dtype=np.int64)
    alike = np.full(len(gallery), np.nan, dtype=np.float32)
    return Selection(gallery, none, none, alike, missing=max(0, (size or 0) - len(gallery)), shortfall=0, retry_k=0)


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
