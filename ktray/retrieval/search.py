"""Exact nearest-neighbour search by inner product, one gallery block at a time.

FAISS does the large product; what it finds is scored again in double precision and ordered by (similarity,
index). So the answer does not depend on how the gallery is cut into blocks, on the number of threads, or on
whether a GPU did the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ktray.errors import KtrayError

Block = tuple[int, np.ndarray]

# Hits beyond k that are fetched from each block: room for ties and for what rounding swaps around rank k.
_MARGIN = 8
# Relative error of a float32 inner product that is allowed for; far above what FAISS shows (below 1e-6).
_EPSILON = 1e-5
# FAISS on a GPU returns at most this many neighbours a query.
_GPU_MAX_K = 2048
# Rows that are scored again at once, in float64 values: 64 MB.
_RESCORE_VALUES = 8_000_000


def search(queries: np.ndarray, blocks: Iterable[Block], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows with the largest inner product, for each query.

    Args:
        queries: (Q, D) float; unit length where the similarity is meant to be the cosine.
        blocks: (offset, (n, D) float16 or float32) pairs; ``offset`` is the gallery index of the block's first
            row. Any order, read once; a block should have some 10,000 to 200,000 rows.
        k: hits wanted per query.

    Returns:
        Similarity (Q, k) float32, falling; gallery index (Q, k) int64. Ties stand in order of index. Where the
        gallery has fewer than k rows the rest is -inf and -1.

    Raises:
        KtrayError: FAISS is missing.
        ValueError: widths that differ, values that are not finite, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, not at least 1")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    _check(queries, "queries", queries.shape[-1])
    similarity = np.full((len(queries), k), -np.inf, dtype=np.float32)
    index = np.full((len(queries), k), -1, dtype=np.int64)
    if not len(queries):
        return similarity, index
    knn = _knn()
    for offset, block in blocks:
        block = np.ascontiguousarray(block, dtype=np.float32)
        _check(block, f"the gallery block at {offset}", queries.shape[1])
        if len(block):
            found_similarity, found_index = _search_block(knn, queries, block, k)
            found_index[found_index >= 0] += offset
            similarity, index = merge((similarity, index), (found_similarity, found_index))
    return similarity, index


Hits = tuple[np.ndarray, np.ndarray]


def merge(found: Hits, more: Hits) -> Hits:
    """The hits of two galleries as those of both: the first k of each row, ordered as `search` orders them."""
    similarity, index = (np.concatenate(pair, axis=1) for pair in zip(found, more, strict=True))
    return top(similarity, index, found[0].shape[1])


def _check(rows: np.ndarray, name: str, width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name} have shape {rows.shape}, not (rows, {width})")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} hold values that are not finite")


def _knn() -> Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """(queries, block, k) -> (similarity, row) by FAISS, on a GPU where it sees one."""
    try:
        import faiss
    except ImportError as error:
        raise KtrayError(
            f"FAISS cannot be imported ({error})",
            "Install faiss-cpu (faiss-gpu on Linux x86-64), or use transfer.source=target, which needs no search.",
        ) from error
    resources: Any = None
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()

    def knn(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if resources is not None and k <= _GPU_MAX_K:
            found = faiss.knn_gpu(resources, queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            found = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        return np.asarray(found[0]), np.asarray(found[1], dtype=np.int64)

    return knn


def _search_block(
    knn: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    queries: np.ndarray,
    block: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) similarity and row in the block, exactly ordered, -inf and -1 where the block has fewer rows."""
    fetch = min(len(block), k + _MARGIN)
    rough, rows = knn(queries, block, fetch)
    exact = _rescore(queries, block, rows)
    similarity, index = top(exact, rows, k)
    if fetch == len(block):
        return similarity, index
    # A query whose last fetched row is still as near as its k-th may have more such rows that FAISS left out.
    slack = 2 * _EPSILON * np.linalg.norm(queries, axis=1) * np.linalg.norm(block, axis=1).max()
    for q in np.flatnonzero(rough[:, -1] >= rough[:, k - 1] - slack):
        near = np.flatnonzero(block @ queries[q] >= rough[q, k - 1] - slack[q])
        scores = _rescore(queries[q : q + 1], block, near[None])
        similarity[q : q + 1], index[q : q + 1] = top(scores, near[None], k)
    return similarity, index


def _rescore(queries: np.ndarray, block: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, R) float32 inner products of each query with its rows, the same whatever the other rows are."""
    out = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _RESCORE_VALUES // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        # Products of two float32 are exact in float64 and the sum errs by 1e-16, so rounding to float32 gives
        # one value, in whatever order the sum was made.
        gathered = block[rows[part]].astype(np.float64)
        out[part] = np.einsum("qrd,qd->qr", gathered, queries[part].astype(np.float64))
    return out


def top(similarity: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k by (similarity falling, index rising) in each row; padded where there are fewer columns."""
    order = np.lexsort((index, -similarity), axis=1)[:, :k]
    similarity = np.take_along_axis(similarity, order, axis=1)
    index = np.take_along_axis(index, order, axis=1)
    missing = k - similarity.shape[1]
    if missing > 0:
        pad = ((0, 0), (0, missing))
        similarity = np.pad(similarity, pad, constant_values=-np.inf)
        index = np.pad(index, pad, constant_values=-1)
    return similarity, index
