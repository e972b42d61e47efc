"""Near-duplicates of held-out images, which must not enter a transfer set.

The rule. A gallery image is dropped when

- its pixels are those of a held-out image (``identical``), or
- its embedding has at least the given cosine to that of a held-out image or its mirror image AND its perceptual
  hash lies within ``distance`` bits of a hash of that same image, its mirror image, or one of a few slight crops of
  either (``near_duplicate``).

Neither test would do alone. Embeddings of one class in one style can have a cosine of 0.99 without showing the
same picture, so the cosine alone would drop such a class wholesale; these are counted (``similar``) and kept.
A hash of 64 bits does not see colour and agrees by chance somewhere in a large gallery, so it is asked only
about pairs that the embedding takes for alike.

With the default of 6 bits, and before the cosine is asked, 200 miniverse letters matched 4 of 1,500 unrelated
gallery images. They were found again from copies in 97% of cases after JPEG at quality 60, 88% at quality 30,
99% at half size, 97% after a central crop of 10% of the sides, 96% after one of 8% to a corner, and always when
mirrored. Images of 8 x 8 pixels are another matter: of 600 scanned digits, 24% matched another digit of the set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIMILARITY = 0.85
DISTANCE = 6

IDENTICAL = "identical"
NEAR_DUPLICATE = "near_duplicate"

_GRID = 32
_LOW = 8
# Crops (left, top, right, bottom as shares of the sides) under which a held-out image is looked for.
_CROPS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.025, 0.025, 0.975, 0.975),
    (0.05, 0.05, 0.95, 0.95),
    (0.0, 0.0, 0.96, 0.96),
    (0.04, 0.0, 1.0, 0.96),
    (0.0, 0.04, 0.96, 1.0),
    (0.04, 0.04, 1.0, 1.0),
    (0.0, 0.0, 0.92, 0.92),
    (0.08, 0.0, 1.0, 0.92),
    (0.0, 0.08, 0.92, 1.0),
    (0.08, 0.08, 1.0, 1.0),
)
# Similarities (float32) and pairs that are held at once: 64 MB and some 16 MB.
_VALUES_AT_ONCE = 16_000_000
_PAIRS_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Fingerprints:
    """What is kept of the pixels of n images: ``hash`` (n,) or (n, V) uint64, ``digest`` (n,) uint64."""

    hash: np.ndarray
    digest: np.ndarray


@dataclass(frozen=True)
class GalleryBlock:
    """Consecutive gallery images: index of the first, (n, D) unit embeddings, fingerprints with (n,) hashes."""

    offset: int
    embedding: np.ndarray
    fingerprints: Fingerprints


@dataclass(frozen=True)
class DuplicateTable:
    """The gallery images to drop, by rising gallery index; one row each, with the held-out image it copies best.

    Attributes:
        gallery: (n,) int64 gallery index.
        heldout: (n,) int64 row of the held-out image.
        similarity: (n,) float32 cosine of the embeddings.
        distance: (n,) int64 bits in which the hashes differ.
        reason: n times ``identical`` or ``near_duplicate``.
        similar: gallery images that reach the cosine but show another picture, and stay.
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
        """The tables of several parts of a gallery as one."""
        every = list(tables)

        def column(name: str, kind: type) -> np.ndarray:
            return np.concatenate([np.zeros(0, kind), *(getattr(table, name) for table in every)])

        gallery = column("gallery", np.int64)
        order = np.argsort(gallery, kind="stable")
        reason = [why for table in every for why in table.reason]
        return cls(
            gallery[order],
            column("heldout", np.int64)[order],
            column("similarity", np.float32)[order],
            column("distance", np.int64)[order],
            [reason[i] for i in order.tolist()],
            sum(table.similar for table in every),
        )

    def counts(self) -> dict[str, int]:
        """Dropped images by reason; every reason is there, also with 0."""
        found = Counter(self.reason)
        return {reason: found[reason] for reason in (IDENTICAL, NEAR_DUPLICATE)}


def _cosines(size: int) -> np.ndarray:
    """The first `_LOW` rows of the DCT-II matrix of ``size`` points, (8, size) float64."""
    frequency, point = np.arange(_LOW)[:, None], np.arange(size)[None]
    return np.asarray(np.cos(np.pi * (point + 0.5) * frequency / size))


_DCT = _cosines(_GRID)


def _small(grey: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    return np.asarray(grey.resize((_GRID, _GRID), Image.Resampling.BILINEAR, box=box))


def _hashes(small: Sequence[np.ndarray]) -> np.ndarray:
    """(n, `_GRID`, `_GRID`) grey pictures to (n,) uint64: 64 bits of what each looks like, few of which differ between
    similar pictures.

    The common "pHash" (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010): the
    8 x 8 lowest frequencies of the DCT of the 32 x 32 grey image, each compared with their median. The constant
    term is left out (its bit is 0), so brightness does not count.
    """
    # Rounded, so that a frequency that a plain image does not have is 0 and not the noise of the sum.
    grids = np.asarray(small, dtype=np.float64).reshape(-1, _GRID, _GRID)
    low = np.round(_DCT @ grids @ _DCT.T, 6).reshape(len(small), _LOW * _LOW)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()


def fingerprint(images: Iterable[np.ndarray]) -> Fingerprints:
    """Fingerprints with one hash an image, for the gallery. ``images``: uint8 (H, W, 3) each, any sizes."""
    return fingerprint_small([shrink(image) for image in images])


Small = tuple[np.ndarray, int]


def shrink(image: np.ndarray) -> Small:
    """All that `fingerprint_small` needs of an image, in a kilobyte: for those who cannot keep many images."""
    grey = Image.fromarray(image).convert("L")
    return _small(grey, (0, 0, *grey.size)), _digest(image)


def fingerprint_small(small: Sequence[Small]) -> Fingerprints:
    """`fingerprint` of what `shrink` gave."""
    return Fingerprints(_hashes([s[0] for s in small]), np.array([s[1] for s in small], dtype=np.uint64))


def fingerprint_heldout(images: Sequence[np.ndarray]) -> Fingerprints:
    """Fingerprints with several hashes an image (crops, mirrored crops), for what must be found again."""
    hashes = []
    for image in images:
        small = []
        for picture in (image, image[:, ::-1]):
            grey = Image.fromarray(np.ascontiguousarray(picture)).convert("L")
            w, h = grey.size
            small += [_small(grey, (x0 * w, y0 * h, x1 * w, y1 * h)) for x0, y0, x1, y1 in _CROPS]
        hashes.append(_hashes(small))
    return Fingerprints(
        np.array(hashes, dtype=np.uint64).reshape(-1, 2 * len(_CROPS)),
        np.array([_digest(i) for i in images], dtype=np.uint64),
    )


def _digest(image: np.ndarray) -> int:
    content = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    content.update(np.ascontiguousarray(image).tobytes())
    return int.from_bytes(content.digest(), "big")


def near_duplicates(
    gallery: Iterable[GalleryBlock],
    heldout_embedding: np.ndarray,
    heldout: Fingerprints,
    *,
    similarity: float = SIMILARITY,
    distance: int = DISTANCE,
) -> DuplicateTable:
    """The gallery images that copy a held-out image, by the rule at the top of this file.

    Args:
        gallery: the gallery, block by block, read once.
        heldout_embedding: (M, D) float unit embeddings of the held-out images, by the gallery's encoder.
        heldout: their fingerprints, from `fingerprint_heldout`.
        similarity: cosine from which the hashes are compared.
        distance: bits, of 64, by which the hashes of a copy may differ.
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
            at = np.searchsorted(digests, digest).clip(max=len(digests) - 1)
            same = digests[at] == digest
            cosine = embedding @ reference.T
            g, h = np.nonzero((cosine >= similarity) & ~same[:, None])
            bits = _distances(hash_[g], heldout.hash, h)
            close = bits <= distance
            similar += len(np.unique(g)) - len(np.unique(g[close]))
            best: dict[int, tuple[int, float, int]] = {}
            for i, j, b in zip(g[close].tolist(), h[close].tolist(), bits[close].tolist(), strict=True):
                best[i] = min(best.get(i, (b, -cosine[i, j], j)), (b, -cosine[i, j], j))
            start = block.offset + first
            rows += [(start + i, j, -minus, b, NEAR_DUPLICATE) for i, (b, minus, j) in best.items()]
            for i in np.flatnonzero(same).tolist():
                j = int(first_with[at[i]])
                rows.append((start + i, j, cosine[i, j], 0, IDENTICAL))
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


def hash_duplicates(
    gallery: Iterable[tuple[int, Fingerprints]], heldout: Fingerprints, *, distance: int = DISTANCE
) -> DuplicateTable:
    """The gallery images that copy a held-out image, where no encoder is at hand: by pixels or by hash alone.

    Every pair of hashes is compared, so that some images are dropped by chance (in the miniverse one in fifty): that
    costs a random draw nothing.

    Args:
        gallery: index of a block's first image, fingerprints with (n,) hashes.
        heldout, distance: as for `near_duplicates`; ``similarity`` of the result is not a number.
    """
    import faiss

    variants = heldout.hash.shape[1]
    tree = faiss.IndexBinaryFlat(64)
    tree.add(_bytes(heldout.hash.reshape(-1)))
    known = {digest: row for row, digest in reversed(list(enumerate(heldout.digest.tolist())))}
    rows: list[tuple[int, int, int, str]] = []
    for offset, prints in gallery:
        if not len(prints.hash) or not len(heldout.digest):
            continue
        # faiss counts a distance as found when it is below the radius.
        limits, bits, found = tree.range_search(_bytes(prints.hash), distance + 1)
        for i, digest in enumerate(prints.digest.tolist()):
            if digest in known:
                rows.append((offset + i, known[digest], 0, IDENTICAL))
            elif limits[i] < limits[i + 1]:
                span = slice(int(limits[i]), int(limits[i + 1]))
                best = min(zip(bits[span].tolist(), (found[span] // variants).tolist(), strict=True))
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
    """(P,) int64: for pair p, the fewest bits in which ``hash_[p]`` differs from one of ``hashes[rows[p]]``."""
    out = np.full(len(rows), 64, dtype=np.int64)
    for first in range(0, len(rows), _PAIRS_AT_ONCE):
        part = slice(first, first + _PAIRS_AT_ONCE)
        for variant in range(hashes.shape[1]):
            differing = hash_[part] ^ hashes[rows[part], variant]
            out[part] = np.minimum(out[part], bit_counts(differing))
    return out


_BITS_OF_BYTE = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


def bit_counts(values: np.ndarray) -> np.ndarray:
    """(P,) numbers of set bits of (P,) uint64; numpy's own ``bitwise_count`` came with 2.0 only."""
    return np.asarray(_BITS_OF_BYTE[values.view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.int64))
