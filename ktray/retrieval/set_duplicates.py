"""Near-duplicates within a transfer set: the web contains many copies of an image, and one of each is enough.

Two images are near-duplicates if their pixels are identical, or if the cosine similarity of their embeddings reaches
a threshold and their perceptual hashes differ in at most `heldout_duplicates.DISTANCE` bits. That module explains why
both conditions are necessary. Without embeddings the hashes must be equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ktray.data.fingerprints import Fingerprints, bit_counts
from ktray.retrieval.heldout_duplicates import DISTANCE, similar_rows

# Number of cosine similarities in memory at a time: 64 MB.
_VALUES_AT_ONCE = 16_000_000
# Number of cosine similarities of a span: some seconds of one core.
_VALUES_OF_A_SPAN = 1_000_000_000

Look = Callable[[np.ndarray], tuple[np.ndarray | None, Fingerprints]]
Span = tuple[int, int]
Pairs = tuple[np.ndarray, np.ndarray]


class FindPairs(Protocol):
    """Finds the pairs of several spans (`similar_pairs`), and yields those of each span in the order of the spans."""

    def __call__(
        self, spans: Sequence[Span], embedding: np.ndarray, prints: Fingerprints, similarity: float, distance: int
    ) -> Iterable[Pairs]: ...


def similar_pairs(span: Span, embedding: np.ndarray, prints: Fingerprints, similarity: float, distance: int) -> Pairs:
    """The images of a span that are near-duplicates of earlier images, and these images: rows i (P,) and j < i (P,),
    int64, in ascending order.

    Args:
        span: the first row, and one past the last.
        embedding: (N, D) float32 unit embeddings of all images.
        prints: their fingerprints.
    """
    found = [_equal_pairs(span, prints.digest)]
    step = max(1, _VALUES_AT_ONCE // max(1, span[1]))
    for first in range(*span, step):
        last = min(span[1], first + step)
        i, j, _ = similar_rows(embedding[first:last], embedding[:last], similarity)
        i += first
        i, j = i[j < i], j[j < i]
        near = bit_counts(prints.hash[i] ^ prints.hash[j]) <= distance
        found.append((i[near], j[near]))
    i, j = (np.concatenate(rows) for rows in zip(*found, strict=True))
    pairs = np.unique(np.stack([i, j]), axis=1)
    return pairs[0], pairs[1]


def _equal_pairs(span: Span, values: np.ndarray) -> Pairs:
    """The rows i of a span and j < i with the same value."""
    values = values[: span[1]]
    order = np.argsort(values, kind="stable")  # rows with the same value are neighbours, in ascending order
    begins = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0]) if len(values) else np.zeros(0, np.int64)
    place, begin = np.empty(len(order), np.int64), np.repeat(begins, np.diff(np.r_[begins, len(order)]))
    place[order] = np.arange(len(order))
    first = begin[place[slice(*span)]]
    earlier = place[slice(*span)] - first  # number of rows before it with its value
    at = np.arange(earlier.sum()) - np.repeat(np.cumsum(earlier) - earlier, earlier)
    return np.repeat(np.arange(*span), earlier), order[np.repeat(first, earlier) + at]


def _one_after_the_other(
    spans: Sequence[Span], embedding: np.ndarray, prints: Fingerprints, similarity: float, distance: int
) -> Iterator[Pairs]:
    return (similar_pairs(span, embedding, prints, similarity, distance) for span in spans)


class SetDuplicates:
    """Finds the images of a growing selection that are near-duplicates of earlier ones. Keeps the accepted images."""

    def __init__(
        self,
        look: Look,
        similarity: float,
        distance: int = DISTANCE,
        find_pairs: FindPairs = _one_after_the_other,
    ) -> None:
        """
        Args:
            look: takes gallery rows; returns their (n, D) float32 unit embeddings, or None if there are none, and their
                fingerprints.
            similarity: cosine similarity from which two images may be near-duplicates.
            distance: maximum number of bits in which the hashes may differ.
            find_pairs: finds the pairs; by default in this process.
        """
        self.look, self.similarity, self.distance, self.find_pairs = look, similarity, distance, find_pairs
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
        prints = _concatenate(self.prints, prints)
        rows = np.concatenate([self.passed, new])
        repeated = np.full(n, -1, dtype=np.int64)
        if embedding is None:  # equal hashes; equal pixels have them, too
            _, first, group = np.unique(prints.hash, return_index=True, return_inverse=True)
            earliest = first[group][before:]
            again = earliest < np.arange(before, before + n)
            repeated[again] = rows[earliest[again]]
            return repeated
        whole = embedding if self.embedding is None else np.concatenate([self.embedding, embedding])
        kept = np.ones(before + n, dtype=bool)
        spans = _spans(before, before + n)
        for i, j in self.find_pairs(spans, whole, prints, self.similarity, self.distance):
            for a, b in zip(i.tolist(), j.tolist(), strict=True):
                # Only a kept image can be repeated. In a chain of slight changes, every second image may be kept.
                if kept[b] and kept[a]:
                    kept[a] = False
                    repeated[a - before] = rows[b]
        return repeated


def _spans(first: int, last: int) -> list[Span]:
    """The rows in spans with about the same number of pairs with earlier rows."""
    count = max(1, math.ceil((last**2 - first**2) / 2 / _VALUES_OF_A_SPAN))
    ends = [round(math.sqrt(first**2 + (last**2 - first**2) * part / count)) for part in range(count + 1)]
    return [(a, b) for a, b in itertools.pairwise(ends) if a < b]


def _take(prints: Fingerprints, rows: np.ndarray) -> Fingerprints:
    return Fingerprints(prints.hash[rows], prints.digest[rows])


def _concatenate(a: Fingerprints, b: Fingerprints) -> Fingerprints:
    return Fingerprints(np.concatenate([a.hash, b.hash]), np.concatenate([a.digest, b.digest]))
