"""Near-duplicates of held-out images, which must not enter a transfer set.

The rule. A gallery image is dropped if

- its pixels are identical to those of a held-out image (``identical``), or
- the cosine similarity of its embedding to that of a held-out image or its mirror image reaches a threshold, AND its
  perceptual hash differs in at most ``distance`` bits from a hash of the same held-out image, its mirror image, or one
  of several slight crops of either (``near_duplicate``).

Neither condition is sufficient alone. Embeddings of one class in one style can have a cosine similarity of 0.99
although the images differ, so that the cosine similarity alone would drop all images of such a class. These images are
counted (``similar``) and kept. A hash of 64 bits ignores colour, and in a large gallery some hashes agree by chance.
Therefore hashes are compared only for pairs with similar embeddings.

With the default of 6 bits and without the condition on the embeddings, 200 miniverse letters matched 4 of 1,500
unrelated gallery images. Modified copies of the letters were found in 97% of cases after JPEG at quality 60, 88% at
quality 30, 99% at half size, 97% after a central crop of 10% of the sides, 96% after a crop of 8% towards a corner, and
always after mirroring. Images of 8 x 8 pixels give worse results: of 600 scanned digits, 24% matched another digit of
the set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ktray.data.fingerprints import Fingerprints, bit_counts
from ktray.models.device import device
from ktray.retrieval.products import above

SIMILARITY = 0.85
DISTANCE = 6

IDENTICAL = "identical"
NEAR_DUPLICATE = "near_duplicate"

# Number of similarities (float32) and of pairs in memory at a time: 64 MB and about 16 MB.
_VALUES_AT_ONCE = 16_000_000
_PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class GalleryBlock:
    """Consecutive gallery images: index of the first image, (n, D) unit embeddings, fingerprints with (n,) hashes."""

    offset: int
    embedding: np.ndarray
    fingerprints: Fingerprints


@dataclass(frozen=True)
class DuplicateTable:
    """The gallery images to drop, in ascending order of gallery index, each with its closest held-out image.

    Attributes:
        gallery: (n,) int64 gallery index.
        heldout: (n,) int64 row of the held-out image.
        similarity: (n,) float32 cosine similarity of the embeddings.
        distance: (n,) int64 number of bits in which the hashes differ.
        reason: n times ``identical`` or ``near_duplicate``.
        similar: number of gallery images that reach the cosine similarity but have other hashes, and are kept.
    """

    gallery: np.ndarray
    heldout: np.ndarray
    similarity: np.ndarray
    distance: np.ndarray
    reason: list[str]
    similar: int

    def __len__(self) -> int:
        return len(self.gallery)

    @classmethod
    def joined(cls, tables: Iterable[DuplicateTable]) -> DuplicateTable:
        """Concatenate the tables of several parts of a gallery."""
        parts = list(tables)

        def column(name: str, kind: type) -> np.ndarray:
            return np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])

        gallery = column("gallery", np.int64)
        order = np.argsort(gallery, kind="stable")
        reason = [text for part in parts for text in part.reason]
        return cls(
            gallery[order],
            column("heldout", np.int64)[order],
            column("similarity", np.float32)[order],
            column("distance", np.int64)[order],
            [reason[i] for i in order.tolist()],
            sum(part.similar for part in parts),
        )

    def counts(self) -> dict[str, int]:
        """Number of dropped images by reason; every reason is a key, also if its number is 0."""
        number = Counter(self.reason)
        return {reason: number[reason] for reason in (IDENTICAL, NEAR_DUPLICATE)}


def near_duplicates(
    gallery: Iterable[GalleryBlock],
    heldout_embedding: np.ndarray,
    heldout: Fingerprints,
    *,
    similarity: float = SIMILARITY,
    distance: int = DISTANCE,
) -> DuplicateTable:
    """The gallery images that are near-duplicates of held-out images, by the rule at the top of this file.

    Args:
        gallery: the gallery in blocks; it is read once.
        heldout_embedding: (M, D) float unit embeddings of the held-out images, from the encoder of the gallery.
        heldout: fingerprints of the held-out images, from `fingerprint_heldout`.
        similarity: cosine similarity from which the hashes are compared.
        distance: maximum number of bits, of 64, in which the hashes of near-duplicates differ.
    """
    reference = np.ascontiguousarray(heldout_embedding, dtype=np.float32)
    digests, first_with = np.unique(heldout.digest, return_index=True)
    rows: list[tuple[int, int, float, int, str]] = []
    similar = 0
    step = max(1, _VALUES_AT_ONCE // max(1, len(reference)))
    for block in gallery:
        for first in range(0, len(block.embedding) if len(reference) else 0, step):
            part = slice(first, first + step)
            embedding = np.asarray(block.embedding[part], dtype=np.float32)
            digest, hash_ = block.fingerprints.digest[part], block.fingerprints.hash[part]
            positions = np.searchsorted(digests, digest).clip(max=len(digests) - 1)
            identical = digests[positions] == digest
            g, h, cosine = similar_rows(embedding, reference, similarity)
            other = ~identical[g]
            g, h, cosine = g[other], h[other], cosine[other]
            bits = _distances(hash_[g], heldout.hash, h)
            close = bits <= distance
            similar += len(np.unique(g)) - len(np.unique(g[close]))
            best: dict[int, tuple[int, float, int]] = {}
            found = (values[close].tolist() for values in (g, h, bits, cosine))
            for i, j, b, value in zip(*found, strict=True):
                best[i] = min(best.get(i, (b, -value, j)), (b, -value, j))
            start = block.offset + first
            rows += [(start + i, j, -negative, b, NEAR_DUPLICATE) for i, (b, negative, j) in best.items()]
            for i in np.flatnonzero(identical).tolist():
                j = int(first_with[positions[i]])
                rows.append((start + i, j, float(embedding[i] @ reference[j]), 0, IDENTICAL))
    rows.sort()
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return DuplicateTable(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        np.array(columns[2], dtype=np.float32),
        np.array(columns[3], dtype=np.int64),
        list(columns[4]),
        similar,
    )


def similar_rows(a: np.ndarray, b: np.ndarray, similarity: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of rows with at least this similarity: rows of ``a``, rows of ``b``, similarities."""
    if (place := device()).type == "cuda":
        return above(a, b, similarity, place)
    cosine = a @ b.T
    # NumPy finds the values of a row 9 to 14 times as fast as those of a table (16 million values: 4 to 7 ms for 60).
    flat = np.flatnonzero(cosine >= similarity)
    g, h = np.divmod(flat, len(b))
    return g, h, cosine.reshape(-1)[flat]


def hash_duplicates(
    gallery: Iterable[tuple[int, Fingerprints]], heldout: Fingerprints, *, distance: int = DISTANCE
) -> DuplicateTable:
    """The gallery images that are near-duplicates of held-out images, by pixels or hash alone, without an encoder.

    Every pair of hashes is compared, so that some images are dropped by chance (in the miniverse one in fifty). This
    is no disadvantage for a random draw.

    Args:
        gallery: for each block the index of its first image, and fingerprints with (n,) hashes.
        heldout, distance: see `near_duplicates`.

    Returns:
        The table; its ``similarity`` is NaN.
    """
    import faiss

    variants = heldout.hash.shape[1]
    tree = faiss.IndexBinaryFlat(64)
    tree.add(_bytes(heldout.hash.reshape(-1)))
    row_by_digest = {digest: row for row, digest in reversed(list(enumerate(heldout.digest.tolist())))}
    rows: list[tuple[int, int, int, str]] = []
    for offset, prints in gallery:
        if not len(prints.hash) or not len(heldout.digest):
            continue
        # FAISS returns the distances that are below the radius, without the radius itself.
        bounds, bits, variant_rows = tree.range_search(_bytes(prints.hash), distance + 1)
        for i, digest in enumerate(prints.digest.tolist()):
            if digest in row_by_digest:
                rows.append((offset + i, row_by_digest[digest], 0, IDENTICAL))
            elif bounds[i] < bounds[i + 1]:
                span = slice(int(bounds[i]), int(bounds[i + 1]))
                best = min(zip(bits[span].tolist(), (variant_rows[span] // variants).tolist(), strict=True))
                rows.append((offset + i, int(best[1]), int(best[0]), NEAR_DUPLICATE))
    columns = list(zip(*rows, strict=True)) or [()] * 4
    return DuplicateTable(
        np.array(columns[0], dtype=np.int64),
        np.array(columns[1], dtype=np.int64),
        np.full(len(rows), np.nan, dtype=np.float32),
        np.array(columns[2], dtype=np.int64),
        list(columns[3]),
        0,
    )


def _bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes, dtype=np.uint64).view(np.uint8).reshape(-1, 8)


def _distances(hash_: np.ndarray, hashes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(P,) int64: for pair p, the minimum of bits in which ``hash_[p]`` differs from one of ``hashes[rows[p]]``."""
    out = np.full(len(rows), 64, dtype=np.uint8)
    variants = np.ascontiguousarray(hashes.T)
    for first in range(0, len(rows), _PAIRS_AT_ONCE):
        part = slice(first, first + _PAIRS_AT_ONCE)
        for variant in variants:
            np.minimum(out[part], bit_counts(hash_[part] ^ variant[rows[part]]), out=out[part])
    return out.astype(np.int64)
