"""The figures about a retrieved transfer set: how much of it belongs to the task, and other sets of the same size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ktray.retrieval.on_task import RANDOM, Judged, confidence, seen
from ktray.retrieval.select import Selection
from ktray.stages.curate.queries import Queries
from ktray.stages.index.gallery import Gallery

_AT_ONCE = 256  # images whose similarities to all queries are in memory
Predict = Callable[[np.ndarray], np.ndarray]
# Images of a random draw that are judged, and the size of a gallery up to which the draw is made: its images lie in all
# parts of the index, which are read in this process.
DRAWN, LARGEST_GALLERY = 20_000, 1_000_000


class Judge:
    """Judges sets of gallery images by the queries and by the teacher's predictions.

    Args:
        predict: a function from unit embeddings to class probabilities; None for a task without classes of images.
    """

    def __init__(self, gallery: Gallery, query_set: Queries, predict: Predict | None) -> None:
        self.gallery, self.queries, self.predict = gallery, query_set, predict

    def by_query(self, chosen: Selection) -> Judged:
        """Judge each image by the query that contributed it."""
        at = seen(-chosen.similarity)
        embedding = self.gallery.embeddings(chosen.gallery[at]) if self.predict else None
        return self._judged(chosen.similarity[at], chosen.query[at], embedding, len(chosen))

    def by_nearest(self, rows: np.ndarray) -> Judged:
        """Judge gallery images (n,) by the query that is most similar to each, however they were chosen: so sets that
        were made with queries and without can be compared."""
        embedding = self.gallery.embeddings(rows[seen(np.arange(len(rows)))])
        parts = [embedding[at : at + _AT_ONCE] @ self.queries.embedding.T for at in range(0, len(embedding), _AT_ONCE)]
        best = np.concatenate([part.max(1) for part in parts])
        query = np.concatenate([part.argmax(1) for part in parts])
        return self._judged(best, query, embedding, len(rows))

    def _judged(self, similarity: np.ndarray, query: np.ndarray, embedding: np.ndarray | None, images: int) -> Judged:
        floor = self.queries.floor[query]
        near = None if np.isnan(self.queries.floor).any() else similarity >= floor
        if self.predict is None or embedding is None:
            return Judged(similarity, near, None, None, images)
        probability = self.predict(embedding)
        agrees = probability.argmax(1) == self.queries.labels[query]
        return Judged(similarity, near, agrees, confidence(probability), images)


def table(
    judge: Judge, chosen: Selection, own: str, others: Mapping[str, Selection], drawn: np.ndarray | None
) -> list[dict[str, Any]]:
    """The rows of the table of transfer sets: the chosen set, sets of the same size by other strategies, and a random
    draw of the same size.

    Args:
        own: name of the strategy that chose the set.
        drawn: gallery rows of the random draw; None: it was not made.
    """
    sets = {own: chosen.gallery, **{name: other.gallery for name, other in others.items() if name != own}}
    if drawn is not None:
        sets[RANDOM] = drawn
    return [
        judge.by_nearest(rows).figures(name, float(np.isin(chosen.gallery, rows).mean()))
        for name, rows in sets.items()
        if len(rows)
    ]
