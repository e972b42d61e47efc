"""Exact nearest-neighbour search by inner product, one gallery block at a time.

FAISS computes the large matrix product, or torch on a GPU for which FAISS is not built. The hits are scored again in
double precision and ordered by (similarity, index). Therefore the result does not depend on how the gallery is divided
into blocks, on the number of threads, or on whether a GPU computed the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ktray.errors import KtrayError
from ktray.models.device import device
from ktray.retrieval.products import exact, nearest

Block = tuple[int, np.ndarray]

# Additional hits that are fetched from each block beyond k, because of ties and of rounding errors around rank k.
_MARGIN = 8
# Assumed bound of the relative error of a float32 inner product; the error of FAISS is far smaller (below 1e-6).
_EPSILON = 1e-5
# FAISS on a GPU returns at most this many neighbours a query.
_GPU_MAX_K = 2048
# Rows that are scored again at a time, counted in float64 values: 64 MB.
_RESCORE_VALUES = 8_000_000


def search(queries: np.ndarray, blocks: Iterable[Block], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows with the largest inner product, for each query.

    Args:
        queries: (Q, D) float; of unit length if the similarity is to be the cosine similarity.
        blocks: (offset, (n, D) float16 or float32) pairs; ``offset`` is the gallery index of the block's first
            row. Blocks may come in any order and are read once; a block should have about 10,000 to 200,000 rows.
        k: number of hits per query.

    Returns:
        Similarity (Q, k) float32 in descending order, and gallery index (Q, k) int64. Ties are in ascending order of
        the index. If the gallery has fewer than k rows, the rest is filled with -inf and -1.

    Raises:
        KtrayError: FAISS is missing.
        ValueError: the widths differ, values are not finite, or k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, but it must be at least 1")
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
            block_similarity, block_index = _search_block(knn, queries, block, k)
            block_index[block_index >= 0] += offset
            similarity, index = merge((similarity, index), (block_similarity, block_index))
    return similarity, index


Hits = tuple[np.ndarray, np.ndarray]


def merge(first: Hits, second: Hits) -> Hits:
    """Merge the hits of two galleries: the first k of each row, in the same order as `search` returns them."""
    similarity, index = (np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    return top(similarity, index, first[0].shape[1])


def _check(rows: np.ndarray, name: str, width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ValueError(f"{name} have shape {rows.shape} instead of (rows, {width})")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name} contain values that are not finite")


def _knn() -> Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """(queries, block, k) -> (similarity, row), computed by FAISS, or on this process's GPU."""
    place = device()
    try:
        import faiss
    except ImportError as error:
        raise KtrayError(
            f"FAISS cannot be imported ({error})",
            "Install faiss-cpu (on Linux x86-64 also faiss-gpu), or set transfer.source=target, which needs no search.",
        ) from error
    resources: Any = None
    if place.type == "cuda" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0:
        resources = faiss.StandardGpuResources()

    def knn(queries: np.ndarray, block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if place.type == "cuda" and not (resources and k <= _GPU_MAX_K):
            return nearest(queries, block, k, place)
        if resources is not None:
            hits = faiss.knn_gpu(resources, queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            hits = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        return np.asarray(hits[0]), np.asarray(hits[1], dtype=np.int64)

    return knn


def _search_block(
    knn: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]],
    queries: np.ndarray,
    block: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(Q, k) similarity and row in the block, in exact order; filled with -inf and -1 if the block has fewer rows."""
    fetch = min(len(block), k + _MARGIN)
    rough, rows = knn(queries, block, fetch)
    scored = _rescore(queries, block, rows)
    similarity, index = top(scored, rows, k)
    if fetch == len(block):
        return similarity, index
    # If the last fetched row of a query is as similar as its k-th row, FAISS may have omitted further such rows.
    slack = 2 * _EPSILON * np.linalg.norm(queries, axis=1) * np.linalg.norm(block, axis=1).max()
    for q in np.flatnonzero(rough[:, -1] >= rough[:, k - 1] - slack):
        near = np.flatnonzero(block @ queries[q] >= rough[q, k - 1] - slack[q])
        scores = _rescore(queries[q : q + 1], block, near[None])
        similarity[q : q + 1], index[q : q + 1] = top(scores, near[None], k)
    return similarity, index


def _rescore(queries: np.ndarray, block: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, R) float32 inner products of each query with its rows. Each value is independent of the other rows."""
    if (place := device()).type == "cuda":
        return exact(queries, block, rows, place)
    out = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _RESCORE_VALUES // max(1, rows.shape[1] * queries.shape[1]))
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        # Products of two float32 are exact in float64 and the sum has an error of 1e-16. Rounding to float32 therefore
        # gives the same value for every order of summation.
        gathered = block[rows[part]].astype(np.float64)
        out[part] = np.einsum("qrd,qd->qr", gathered, queries[part].astype(np.float64))
    return out


def top(similarity: np.ndarray, index: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row by descending similarity and then ascending index; padded if there are fewer columns."""
    order = np.lexsort((index, -similarity), axis=1)[:, :k]
    similarity = np.take_along_axis(similarity, order, axis=1)
    index = np.take_along_axis(index, order, axis=1)
    missing = k - similarity.shape[1]
    if missing > 0:
        pad = ((0, 0), (0, missing))
        similarity = np.pad(similarity, pad, constant_values=-np.inf)
        index = np.pad(index, pad, constant_values=-1)
    return similarity, index
