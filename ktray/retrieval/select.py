"""A selection of gallery images, and the selections that ask no query; those that do are in `strategies/`."""

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
