"""Near-duplicates within a transfer set: the web shows the same picture many times, and one of each is enough.

Two images show the same when their pixels are the same, or when their embeddings have at least the given cosine and
their perceptual hashes lie within `heldout_duplicates.DISTANCE` bits (both, for the reason that is given there).
Without embeddings the hashes must be equal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ktray.retrieval.heldout_duplicates import DISTANCE, Fingerprints, bit_counts

# Cosines that are held at once: 64 MB.
_VALUES_AT_ONCE = 16_000_000

Look = Callable[[np.ndarray], tuple[np.ndarray | None, Fingerprints]]


class SetDuplicates:
    """Tells which images of a growing selection show what an earlier one shows. Remembers what it let pass."""

    def __init__(self, look: Look, similarity: float, distance: int = DISTANCE) -> None:
        """``look``: gallery rows to (n, D) float32 unit embeddings (None where there are none) and fingerprints."""
        self.look, self.similarity, self.distance = look, similarity, distance
        self.passed = np.zeros(0, np.int64)
        self.embedding: np.ndarray | None = None
        self.prints = Fingerprints(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        self.repeats: dict[int, int] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Of these gallery rows, in their order, those that repeat another; ``repeats`` then names which.

        Rows that passed before are taken to come before all others.
        """
        new = rows[~np.isin(rows, self.passed)]
        if not len(new):
            return new
        embedding, prints = self.look(new)
        dropped = self._repeated(new, embedding, prints)
        kept = np.flatnonzero(dropped < 0)
        self.repeats.update(zip(new[dropped >= 0].tolist(), dropped[dropped >= 0].tolist(), strict=True))
        self.passed = np.concatenate([self.passed, new[kept]])
        self.prints = _joined(self.prints, _some(prints, kept))
        if embedding is not None:
            before = self.embedding
            self.embedding = embedding[kept] if before is None else np.concatenate([before, embedding[kept]])
        return new[dropped >= 0]

    def _repeated(self, new: np.ndarray, embedding: np.ndarray | None, prints: Fingerprints) -> np.ndarray:
        """(n,) the gallery row that each new one repeats, -1 for none."""
        n, before = len(new), len(self.passed)
        every = _joined(self.prints, prints)
        named = np.concatenate([self.passed, new])
        kept = np.ones(before + n, dtype=bool)
        of = np.full(n, -1, dtype=np.int64)
        if embedding is not None:
            table = embedding if self.embedding is None else np.concatenate([self.embedding, embedding])
        step = max(1, _VALUES_AT_ONCE // (before + n))
        for first in range(0, n, step):
            last = min(n, first + step)
            at = np.arange(before + first, before + last)[:, None]
            earlier = np.arange(before + last)[None] < at
            same = every.digest[at] == every.digest[None, : before + last]
            if embedding is None:
                alike = every.hash[at] == every.hash[None, : before + last]
            else:
                alike = embedding[first:last] @ table[: before + last].T >= self.similarity
            pairs = np.argwhere(earlier & (same | alike))
            i, j = pairs[:, 0] + before + first, pairs[:, 1]
            close = bit_counts(every.hash[i] ^ every.hash[j]) <= self.distance
            for a, b in zip(i[close].tolist(), j[close].tolist(), strict=True):
                # Only what stays can be repeated: a chain of slight changes may leave every second picture.
                if kept[b] and kept[a]:
                    kept[a] = False
                    of[a - before] = named[b]
        return of


def _some(prints: Fingerprints, rows: np.ndarray) -> Fingerprints:
    return Fingerprints(prints.hash[rows], prints.digest[rows])


def _joined(a: Fingerprints, b: Fingerprints) -> Fingerprints:
    return Fingerprints(np.concatenate([a.hash, b.hash]), np.concatenate([a.digest, b.digest]))
