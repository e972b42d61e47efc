"""Labelled images that show the same: copies, also after being saved again, resized, cropped, mirrored or brightened.

Candidates are pairs whose perceptual hashes are close, where one of the two hashes may be that of a slight crop or of
the mirror image, and pairs that an encoder finds similar. Hashes ignore colour and detail, and embeddings of one class
in one style are alike, so that neither is sufficient (`ktray.retrieval.heldout_duplicates` explains this for the
gallery). Therefore the pixels of each candidate decide. One of two thumbnails is cropped and mirrored so that the two
fit best, which is measured by their correlation. Photographs of two garments on a light ground can have a correlation
of 0.98, so that the second measure compares details: the contrast and structure terms of SSIM (Wang et al., Image
Quality Assessment, IEEE Transactions on Image Processing 2004, equation 13 without the luminance term), averaged over
windows of 5 x 5 pixels. For photographs of clothing it is at most 0.79 for pairs of different ones, and at least 0.94
for copies (JPEG at quality 30, half the size, crops of 8%, mirrored, 25% brighter or darker).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from ktray.accounting.device import usable_cpus
from ktray.data.decode import MAX_PIXELS
from ktray.data.fingerprints import fingerprint_heldout
from ktray.data.labelled.hygiene_fit import THUMB, WHOLE, Box, fits
from ktray.data.labelled.memory import keep_copies, recall_copies
from ktray.data.labelled.rows import LabelledRow
from ktray.data.sources.fetch import fetch_images
from ktray.reporting.heartbeat import beat

logger = logging.getLogger("ktray")

DISTANCE = 10
CORRELATION = 0.93
STRUCTURE = 0.85
# Number of images up to which copies are looked for before a split is drawn: about a minute on a few cores.
MOST = 10_000
_MANY = 5_000
_FINE = 24
_WINDOW = 5
_C2 = (0.03 * 255) ** 2  # the constant of SSIM that makes plain windows equal
_SIDE = 128
# Nearest hashes per image; an image has 22 of them, so that this is at least 5 images.
_NEAREST = 110
# Pairs of hashes up to which each is compared, about 4 minutes of one core. An index of bands has far fewer candidates
# if hashes are spread evenly; for the looks that HYGIENE has in tests/scale/rehearse.py, it took 8 times as long.
_FLAT = 200_000_000_000
_PIECE = 512
_QUERIES = 2048  # images of one search, after which it says how far it is


@dataclass(frozen=True)
class Looks:
    """What is compared of n images: ``hash`` (n, V) uint64 of the image (first) and of crops and mirrored crops of it,
    and ``thumb`` (n, 32, 32, 3) uint8."""

    hash: np.ndarray
    thumb: np.ndarray

    def __len__(self) -> int:
        return len(self.hash)

    def take(self, rows: Sequence[int] | np.ndarray) -> Looks:
        return Looks(self.hash[rows], self.thumb[rows])


@dataclass(frozen=True)
class Copy:
    """A pair of images that show the same: their rows in the two sets, and how well their details agree (0..1)."""

    a: int
    b: int
    structure: float


def looks(images: Iterable[np.ndarray]) -> Looks:
    """The looks of images: uint8 (H, W, 3) each, of any sizes."""
    small = [_small(image) for image in images]
    thumbs = [np.asarray(Image.fromarray(image).resize((THUMB, THUMB), Image.Resampling.BILINEAR)) for image in small]
    return Looks(fingerprint_heldout(small).hash, np.array(thumbs, np.uint8).reshape(-1, THUMB, THUMB, 3))


def _small(image: np.ndarray) -> np.ndarray:
    """Many crops are hashed: those of a small image give the same hashes and take much less time."""
    factor = min(image.shape[:2]) // _SIDE
    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image


def copies(
    a: Looks,
    b: Looks | None = None,
    extra: Iterable[tuple[int, int]] = (),
    most: int | None = None,
    notes: list[str] | None = None,
) -> list[Copy]:
    """The pairs of images of ``a`` and ``b`` that show the same, in the order of their rows.

    Args:
        b: None: pairs within ``a``, each once, with ``Copy.a < Copy.b``.
        extra: further candidates (row of ``a``, row of ``b``), such as those that an encoder finds similar.
        most: number of candidates that are compared by their pixels, those with the nearest hashes; None: all.
        notes: gets a sentence if there are more.
    """
    other = a if b is None else b
    found: dict[tuple[int, int], int] = {}
    back = ((i, j, bits) for j, i, bits in _close(other.hash, a.hash))
    for i, j, bits in chain(_close(a.hash, other.hash), back, ((i, j, -1) for i, j in extra)):
        pair = (i, j) if b is not None else (min(i, j), max(i, j))
        if b is not None or i != j:
            found[pair] = min(bits, found.get(pair, bits))
    pairs = sorted(found)
    if most is not None and len(pairs) > most:
        pairs = sorted(sorted(pairs, key=found.__getitem__)[:most])
        if notes is not None:
            notes.append(
                f"{len(found):,} pairs of images have similar hashes; the nearest {most:,} of them are compared, "
                "so that some copies may not be found"
            )
    scored = _structures(pairs, a.thumb, other.thumb)
    return sorted((pair for pair in scored if pair.structure >= STRUCTURE), key=lambda pair: (pair.a, pair.b))


def _close(query: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row of ``query``, row of ``hashes``, bits) where the first hash of the one is close to a hash of the other, of
    which it differs in so many bits.

    Only the nearest `_NEAREST` hashes of each image are looked at, so that thousands of empty pages stay thousands of
    pairs.
    """
    import faiss

    n, variants = hashes.shape
    if not len(query) or not n:
        return
    # With 4 bands of 16 bits, two hashes that differ in at most 11 bits differ in at most 2 bits of one of the bands
    # (Norouzi et al., Fast Search in Hamming Space with Multi-Index Hashing, arXiv 1307.2982, section 3).
    index: Any = faiss.IndexBinaryFlat(64)
    if len(query) * n * variants > _FLAT:
        index = faiss.IndexBinaryMultiHash(64, 4, 16)
        index.nflip = 2
    index.add(_bytes(hashes))
    for first in range(0, len(query), _QUERIES):
        part = query[first : first + _QUERIES, 0]
        bits, rows = index.search(_bytes(part), min(_NEAREST, n * variants))
        i, k = np.nonzero((bits <= DISTANCE) & (rows >= 0))
        yield from zip((i + first).tolist(), (rows[i, k] // variants).tolist(), bits[i, k].tolist(), strict=True)
        beat(f"copies of {first + len(part):,} of {len(query):,} images are searched")


def _bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes.reshape(-1), dtype=np.uint64).view(np.uint8).reshape(-1, 8)


def _structures(pairs: list[tuple[int, int]], a: np.ndarray, b: np.ndarray) -> Iterator[Copy]:
    """How well the details of pairs of thumbnails agree after one is cropped and mirrored so that they fit best: the
    mean of the contrast and structure terms of SSIM. Pairs whose correlation is below `CORRELATION` are left out, which
    is also the case for a plain image, unless both are equal."""
    equal = {(i, j) for i, j in pairs if np.array_equal(a[i], b[j])}
    yield from (Copy(i, j, 1.0) for i, j in equal)
    for (i, j), fit in fits((pair for pair in pairs if pair not in equal), a, b):
        beat("pairs of images are compared")
        if fit.value >= CORRELATION:
            whole, other = (b[j], a[i]) if fit.swapped else (a[i], b[j])
            view = np.ascontiguousarray(other[:, ::-1] if fit.mirrored else other)
            yield Copy(i, j, _contrast_structure(_cut(whole, WHOLE), _cut(view, fit.box)))


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    picture = Image.fromarray(image)
    w, h = picture.size
    corners = (box[0] * w, box[1] * h, box[2] * w, box[3] * h)
    return np.asarray(picture.resize((_FINE, _FINE), Image.Resampling.BILINEAR, box=corners), np.float32)


def _contrast_structure(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.ndimage import uniform_filter  # slow to import

    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray(uniform_filter(x, (_WINDOW, _WINDOW, 0)))

    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return float(((2 * vxy + _C2) / (vx + vy + _C2)).mean())


def find_copies(rows: Sequence[LabelledRow], notes: list[str]) -> list[tuple[str, str]]:
    """Pairs of uris of training images that show the same, before a split is drawn from them.

    Images that cannot be decoded have no copies. The result for the same files is kept, in this process and in the
    place of `ktray.data.labelled.memory`.
    """
    train = [(r.uri, r.version) for r in rows if r.split == "train"]
    if len(train) > MOST:
        notes.append(
            f"{len(train):,} training images are too many to look for copies before the split is drawn (the limit is "
            f"{MOST:,}). Name a column of groups in task.group if images belong together."
        )
        return []
    if (known := recall_copies(train)) is not None:
        return known
    if len(train) > _MANY:
        logger.info(f"data      looking for copies among {len(train):,} training images before a split is drawn")
    pairs = _found(tuple(train))
    keep_copies(train, pairs)
    return pairs


@lru_cache(maxsize=4)
def _found(files: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    uris = [uri for uri, _ in files]
    pieces = [uris[i : i + _PIECE] for i in range(0, len(uris), _PIECE)]
    with ThreadPoolExecutor(usable_cpus()) as pool:
        parts = list(pool.map(partial(_read, max_pixels=MAX_PIXELS), pieces))
    named = [uri for names, _ in parts for uri in names]
    if not named:
        return []
    every = Looks(np.concatenate([p.hash for _, p in parts]), np.concatenate([p.thumb for _, p in parts]))
    return [(named[pair.a], named[pair.b]) for pair in copies(every)]


def _read(uris: list[str], max_pixels: int) -> tuple[list[str], Looks]:
    def enough(height: int, width: int) -> float:
        return min(height, width) / (2 * _SIDE)

    names: list[str] = []

    def usable() -> Iterator[np.ndarray]:
        for uri, image, _ in fetch_images(uris, max_pixels=max_pixels, enough=enough):
            if image is not None:
                names.append(uri)
                yield image

    found = looks(usable())
    return names, found
