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
from typing import Any

import numpy as np
from PIL import Image

from ktray.accounting.device import usable_cpus
from ktray.data.decode import MAX_PIXELS
from ktray.data.fingerprints import CROPS, fingerprint_heldout
from ktray.data.labelled.memory import keep_copies, recall_copies
from ktray.data.labelled.rows import LabelledRow
from ktray.data.sources.fetch import fetch_images

logger = logging.getLogger("ktray")

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the sides

DISTANCE = 10
CORRELATION = 0.93
STRUCTURE = 0.85
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Number of images up to which copies are looked for before a split is drawn: about a minute on a few cores.
MOST = 10_000
_MANY = 5_000
_THUMB = 32
_GRID, _FINE = 16, 24
_WINDOW = 5
_C2 = (0.03 * 255) ** 2  # the constant of SSIM that makes plain windows equal
_SIDE = 128
# Nearest hashes per image; an image has 22 of them, so that this is at least 5 images.
_NEAREST = 110
_FLAT = 20_000  # images up to which each pair of hashes is compared
_PIECE = 512
_KEPT = 4_096  # images whose crops are kept in memory: 280 MB
# Correlation of the best of the fixed crops from which the crop is searched for more exactly, and the steps of this.
_PROMISING = 0.8
_STEPS = (0.03, 0.015, 0.0075)


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
    thumbs = [np.asarray(Image.fromarray(image).resize((_THUMB, _THUMB), Image.Resampling.BILINEAR)) for image in small]
    return Looks(fingerprint_heldout(small).hash, np.array(thumbs, np.uint8).reshape(-1, _THUMB, _THUMB, 3))


def _small(image: np.ndarray) -> np.ndarray:
    """Many crops are hashed: those of a small image give the same hashes and take much less time."""
    factor = min(image.shape[:2]) // _SIDE
    return np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image


def copies(a: Looks, b: Looks | None = None, extra: Iterable[tuple[int, int]] = ()) -> list[Copy]:
    """The pairs of images of ``a`` and ``b`` that show the same, in the order of their rows.

    Args:
        b: None: pairs within ``a``, each once, with ``Copy.a < Copy.b``.
        extra: further candidates (row of ``a``, row of ``b``), such as those that an encoder finds similar.
    """
    other = a if b is None else b
    found = [*_close(a.hash, other.hash), *((i, j) for j, i in _close(other.hash, a.hash)), *extra]
    if b is None:
        found = [(min(pair), max(pair)) for pair in found if pair[0] != pair[1]]
    promising = _promising(sorted(set(found)), a.thumb, other.thumb)
    scored = (Copy(i, j, structure(a.thumb[i], other.thumb[j])) for i, j in promising)
    return [pair for pair in scored if pair.structure >= STRUCTURE]


def _close(query: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row of ``query``, row of ``hashes``) where the first hash of the one is close to a hash of the other.

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
    if n > _FLAT:
        index = faiss.IndexBinaryMultiHash(64, 4, 16)
        index.nflip = 2
    index.add(_bytes(hashes))
    bits, rows = index.search(_bytes(query[:, 0]), min(_NEAREST, n * variants))
    i, k = np.nonzero((bits <= DISTANCE) & (rows >= 0))
    yield from set(zip(i.tolist(), (rows[i, k] // variants).tolist(), strict=True))


def _bytes(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes.reshape(-1), dtype=np.uint64).view(np.uint8).reshape(-1, 8)


def _promising(pairs: list[tuple[int, int]], a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pairs of thumbnails that are equal, or of which a fixed crop of one correlates with the other. What is
    computed for an image is kept for its next pairs."""
    crops_a, crops_b = (lru_cache(maxsize=_KEPT)(partial(_crops, thumbs)) for thumbs in (a, b))
    for i, j in pairs:
        one, other = crops_a(i), crops_b(j)
        if max((other @ one[0]).max(), (one @ other[0]).max()) >= _PROMISING or np.array_equal(a[i], b[j]):
            yield i, j


def _crops(thumbs: np.ndarray, row: int) -> np.ndarray:
    """(22, 768) float32 as by `_unit`: the fixed crops of a thumbnail and of its mirror image, first of all the whole
    thumbnail. Each row has one colour after the other."""
    down, across = _matrices()
    units = []
    for view in (thumbs[row], thumbs[row][:, ::-1]):
        colours = np.ascontiguousarray(view.transpose(2, 0, 1), dtype=np.float32)
        cut = (down[:, None] @ colours) @ across[:, None].swapaxes(2, 3)  # (11, 3, 16, 16)
        centred = (cut - cut.mean((2, 3), keepdims=True)).reshape(len(cut), -1)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        units.append(np.where(length > 1.0, centred / np.maximum(length, 1.0), 0.0))
    return np.concatenate(units)


@lru_cache(maxsize=1)
def _matrices() -> tuple[np.ndarray, np.ndarray]:
    """(11, 16, 32) float32 each: Pillow's resizing of a thumbnail to each fixed crop, down and across, as matrices,
    which save most of the time of thousands of small resizings."""
    identity = Image.fromarray(np.eye(_THUMB, dtype=np.float32))

    def matrix(low: float, high: float) -> np.ndarray:
        box = (0.0, low * _THUMB, float(_THUMB), high * _THUMB)
        return np.asarray(identity.resize((_THUMB, _GRID), Image.Resampling.BILINEAR, box=box))

    return np.stack([matrix(b[1], b[3]) for b in CROPS]), np.stack([matrix(b[0], b[2]) for b in CROPS])


def structure(a: np.ndarray, b: np.ndarray) -> float:
    """How well the details of two images agree (0..1) after one is cropped and mirrored so that they fit best.

    Args:
        a, b: (32, 32, 3) uint8 thumbnails.

    Returns:
        The mean of the contrast and structure terms of SSIM; 0 if the correlation is below `CORRELATION`, which is also
        the case for a plain image.
    """
    if np.array_equal(a, b):
        return 1.0
    best = max(
        (
            (*_fit(whole, np.ascontiguousarray(view)), i, m)
            for i, (whole, other) in enumerate(((a, b), (b, a)))
            for m, view in enumerate((other, other[:, ::-1]))
        ),
    )
    value, box, swapped, mirrored = best
    if value < CORRELATION:
        return 0.0
    whole, other = (b, a) if swapped else (a, b)
    view = np.ascontiguousarray(other[:, ::-1] if mirrored else other)
    return _contrast_structure(_cut(whole, _WHOLE, _FINE), _cut(view, box, _FINE))


def _fit(whole: np.ndarray, view: np.ndarray) -> tuple[float, Box]:
    """The crop of ``view`` that fits ``whole`` best, and their correlation. From the best fixed crop, each side is
    moved while this helps."""
    fixed = _unit(_cut(whole, _WHOLE, _GRID))

    def score(box: Box) -> float:
        return float((fixed * _unit(_cut(view, box, _GRID))).sum())

    best, box = max((score(box), box) for box in CROPS)
    for step in _STEPS if best >= _PROMISING else ():
        for side in (0, 1, 2, 3, 0, 1, 2, 3):
            for move in (-step, step):
                sides = list(box)
                sides[side] = min(1.0, max(0.0, sides[side] + move))
                moved: Box = (sides[0], sides[1], sides[2], sides[3])
                if (value := score(moved)) > best:
                    best, box = value, moved
    return best, box


def _cut(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    picture = Image.fromarray(image)
    w, h = picture.size
    corners = (box[0] * w, box[1] * h, box[2] * w, box[3] * h)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=corners), np.float32)


def _unit(pixels: np.ndarray) -> np.ndarray:
    """Without the mean of each colour, and all colours together at unit length: brightness and contrast have no
    influence, other colours have. A plain image becomes 0, so that it correlates with nothing."""
    centred = pixels - pixels.mean((0, 1))
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1.0 else np.zeros_like(centred)


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
