"""The gallery as INDEX left it, and what the queries find in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ktray.errors import KtrayError
from ktray.retrieval.dedup import Fingerprints, GalleryBlock
from ktray.retrieval.search import search
from ktray.retrieval.select import Selection, query_balanced
from ktray.retrieval.strategies import best_first, class_balanced, diverse, informative
from ktray.stages.base import Done
from ktray.streaming import read_rows

# Hits a query, for each image of its share: those that others have taken first, and what a strategy may choose among.
CANDIDATES = 4
NEEDS_PREDICTIONS = ("class_balanced", "informative")


class Gallery:
    """The index's shards as one long table."""

    def __init__(self, index: Done) -> None:
        self.stage = index.stage
        self.names = [name for name, rows in index.manifest["shards"] if rows]
        counts = [rows for _, rows in index.manifest["shards"] if rows]
        if not self.names:
            raise KtrayError("The gallery has no usable image", "Check gallery.data and the quarantine list.")
        self.offsets: list[int] = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self.total = self.offsets[-1]

    def columns(self, column: str) -> list[np.ndarray]:
        return [read_rows(self.stage, name, [column])[column] for name in self.names]

    def embeddings(self) -> Iterator[tuple[int, np.ndarray]]:
        for name, offset in zip(self.names, self.offsets, strict=False):
            yield offset, read_rows(self.stage, name, ["embedding"])["embedding"]

    def prints(self) -> Iterator[tuple[int, Fingerprints]]:
        for name, offset in zip(self.names, self.offsets, strict=False):
            rows = read_rows(self.stage, name, ["hash", "digest"])
            yield offset, Fingerprints(rows["hash"].astype(np.uint64), rows["digest"].astype(np.uint64))

    def blocks(self) -> Iterator[GalleryBlock]:
        for (offset, prints), (_, embedding) in zip(self.prints(), self.embeddings(), strict=True):
            yield GalleryBlock(offset, embedding, prints)

    def take(self, column: str, rows: np.ndarray) -> list[Any]:
        """A column's values of some rows, in their order."""
        out: dict[int, Any] = {}
        shard = np.searchsorted(self.offsets, rows, side="right") - 1
        for number in np.unique(shard).tolist():
            values = read_rows(self.stage, self.names[number], [column])[column]
            for row in rows[shard == number].tolist():
                out[row] = values[row - self.offsets[number]]
        return [out[row] for row in rows.tolist()]


def retrieve(
    strategy: str,
    queries: np.ndarray,
    gallery: Gallery,
    size: int,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
    spent: Callable[[float], None],
) -> Selection:
    """``size`` gallery images for the queries.

    Args:
        strategy: ``transfer.strategy``.
        queries: (Q, D) float32 unit embeddings.
        exclude: gallery rows that must not be taken.
        predict: unit embeddings to class probabilities, for the strategies that ask (`NEEDS_PREDICTIONS`).
        spent: is told the FLOPs of each search.
    """
    total = gallery.total
    k = min(total, CANDIDATES * -(-size // len(queries)) + 8)
    while True:
        similarity, found = search(queries, gallery.embeddings(), k)
        spent(2.0 * total * len(queries) * queries.shape[1])
        chosen = _choose(strategy, similarity, found, gallery, size, exclude, predict)
        # Searching on is only worth it while images are missing: a shortfall that other queries filled is told
        # by coverage, and chasing it would search the whole gallery for the odd query.
        if not chosen.missing or not chosen.retry_k or k >= total:
            return chosen
        k = min(total, chosen.retry_k)


def _choose(
    strategy: str,
    similarity: np.ndarray,
    found: np.ndarray,
    gallery: Gallery,
    size: int,
    exclude: np.ndarray,
    predict: Callable[[np.ndarray], np.ndarray] | None,
) -> Selection:
    if strategy == "query_balanced":
        return query_balanced(similarity, found, size, exclude=exclude)
    if strategy == "best_first":
        return best_first(similarity, found, size, exclude=exclude)
    images, where = np.unique(found, return_inverse=True)
    rows = where.reshape(found.shape)
    seen = images[images >= 0]
    embedding = np.stack(gallery.take("embedding", seen)).astype(np.float32)
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
