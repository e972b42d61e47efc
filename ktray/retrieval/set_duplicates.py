"""Near-duplicates within a transfer set: the web contains many copies of an image, and one of each is enough.

Two images are near-duplicates if their pixels are identical, or if the cosine similarity of their embeddings reaches
a threshold and their perceptual hashes differ in at most `heldout_duplicates.DISTANCE` bits. That module explains why
both conditions are necessary. Without embeddings the hashes must be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ktray.data.fingerprints import Fingerprints, bit_counts
from ktray.retrieval.heldout_duplicates import DISTANCE

# Number of cosine similarities in memory at a time: 64 MB.
_VALUES_AT_ONCE = 16_000_000

Look = Callable[[np.ndarray], tuple[np.ndarray | None, Fingerprints]]


class SetDuplicates:
    """Finds the images of a growing selection that are near-duplicates of earlier ones. Keeps the accepted images."""

    def __init__(self, look: Look, similarity: float, distance: int = DISTANCE) -> None:
        """
        Args:
            look: takes gallery rows; returns their (n, D) float32 unit embeddings, or None if there are none, and their
                fingerprints.
            similarity: cosine similarity from which two images may be near-duplicates.
            distance: maximum number of bits in which the hashes may differ.
        """
        self.look, self.similarity, self.distance = look, similarity, distance
        self.passed = np.zeros(0, np.int64)
        self.embedding: np.ndarray | None = None
        self.prints = Fingerprints(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        self.repeats: dict[int, int] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Return the gallery rows that are near-duplicates of an earlier row, in the order of ``rows``.

        ``repeats`` then maps each of them to the row that it repeats. Rows that were accepted in an earlier call count
        as earlier than all others.
        """
        new = rows[~np.isin(rows, self.passed)]
        if not len(new):
            return new
        embedding, prints = self.look(new)
        dropped = self._repeated(new, embedding, prints)
        kept = np.flatnonzero(dropped < 0)
        self.repeats.update(zip(new[dropped >= 0].tolist(), dropped[dropped >= 0].tolist(), strict=True))
        self.passed = np.concatenate([self.passed, new[kept]])
        self.prints = _concatenate(self.prints, _take(prints, kept))
        if embedding is not None:
            earlier = self.embedding
            self.embedding = embedding[kept] if earlier is None else np.concatenate([earlier, embedding[kept]])
        return new[dropped >= 0]

    def _repeated(self, new: np.ndarray, embedding: np.ndarray | None, prints: Fingerprints) -> np.ndarray:
        """(n,) int64 for each new row the gallery row that it repeats; -1 for none."""
        n, before = len(new), len(self.passed)
        all_prints = _concatenate(self.prints, prints)
        rows = np.concatenate([self.passed, new])
        kept = np.ones(before + n, dtype=bool)
        repeated = np.full(n, -1, dtype=np.int64)
        if embedding is not None:
            embeddings = embedding if self.embedding is None else np.concatenate([self.embedding, embedding])
        step = max(1, _VALUES_AT_ONCE // (before + n))
        for first in range(0, n, step):
            last = min(n, first + step)
            at = np.arange(before + first, before + last)[:, None]
            earlier = np.arange(before + last)[None] < at
            identical = all_prints.digest[at] == all_prints.digest[None, : before + last]
            if embedding is None:
                similar = all_prints.hash[at] == all_prints.hash[None, : before + last]
            else:
                similar = embedding[first:last] @ embeddings[: before + last].T >= self.similarity
            pairs = np.argwhere(earlier & (identical | similar))
            i, j = pairs[:, 0] + before + first, pairs[:, 1]
            close = bit_counts(all_prints.hash[i] ^ all_prints.hash[j]) <= self.distance
            for a, b in zip(i[close].tolist(), j[close].tolist(), strict=True):
                # Only a kept image can be repeated. In a chain of slight changes, every second image may be kept.
                if kept[b] and kept[a]:
                    kept[a] = False
                    repeated[a - before] = rows[b]
        return repeated


def _take(prints: Fingerprints, rows: np.ndarray) -> Fingerprints:
    return Fingerprints(prints.hash[rows], prints.digest[rows])


def _concatenate(a: Fingerprints, b: Fingerprints) -> Fingerprints:
    return Fingerprints(np.concatenate([a.hash, b.hash]), np.concatenate([a.digest, b.digest]))
