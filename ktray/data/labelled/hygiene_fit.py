"""The crop of one thumbnail that fits another one best, for many pairs of thumbnails together.

One of the two is compared as a whole with a crop of the other one, which may also be mirrored. From the best of the
fixed crops, each side of the crop is moved while this improves the correlation of the two. All pairs make the same move
together: it is a product of small matrices for each pair, where resizing each crop by itself took a millisecond for
each of them, and minutes for a few thousand photographs on a light ground.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from ktray.data.fingerprints import CROPS

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the sides

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
THUMB = 32
GRID = 16
# Correlation of the best of the fixed crops from which the crop is searched for more exactly, and the steps of this.
PROMISING = 0.8
_STEPS = (0.03, 0.015, 0.0075)
_SIDES = (0, 1, 2, 3, 0, 1, 2, 3)
_KEPT = 4_096  # images of the second set whose crops are kept in memory: 280 MB
_KEPT_FIRST = 512  # of the first set, by which pairs are usually sorted; more than are searched together
_TOGETHER = 256  # pairs whose crops are searched together: 10 MB


@dataclass(frozen=True)
class Fit:
    """How two thumbnails fit best: ``value`` is their correlation, ``box`` the crop of the first one, or of the second
    one if not ``swapped``, which is ``mirrored`` before."""

    value: float
    box: Box
    swapped: bool
    mirrored: bool


@dataclass(frozen=True)
class _Start:
    """A pair, which of the two is cropped and whether it is mirrored, and the fixed crop to start from."""

    pair: tuple[int, int]
    swapped: bool
    mirrored: bool
    box: Box


def fits(pairs: Iterable[tuple[int, int]], a: np.ndarray, b: np.ndarray) -> Iterator[tuple[tuple[int, int], Fit]]:
    """The best fit of each pair, without the pairs of which no fixed crop has a correlation of `PROMISING`.

    Args:
        pairs: (row of ``a``, row of ``b``) each; computed values of an image are kept for its next pairs.
        a, b: (n, 32, 32, 3) uint8 thumbnails.
    """
    crops_a = lru_cache(maxsize=_KEPT_FIRST)(partial(fixed_crops, a))
    crops_b = lru_cache(maxsize=_KEPT)(partial(fixed_crops, b))

    def starts(pair: tuple[int, int]) -> Iterator[_Start]:
        one, other = crops_a(pair[0]), crops_b(pair[1])
        for swapped, scores in ((False, other @ one[0]), (True, one @ other[0])):
            for mirrored in (False, True):
                of_view = scores[len(CROPS) * mirrored :][: len(CROPS)]
                best = int(of_view.argmax())
                if of_view[best] >= PROMISING:
                    yield _Start(pair, swapped, mirrored, CROPS[best])

    def best(waiting: Sequence[_Start]) -> Iterator[tuple[tuple[int, int], Fit]]:
        whole = np.stack([crops_b(s.pair[1])[0] if s.swapped else crops_a(s.pair[0])[0] for s in waiting])
        cropped = np.stack([a[s.pair[0]] if s.swapped else b[s.pair[1]] for s in waiting])
        flip = np.array([s.mirrored for s in waiting])
        cropped[flip] = cropped[flip, :, ::-1]
        values, boxes = search(whole, cropped, np.array([s.box for s in waiting]))
        found: dict[tuple[int, int], Fit] = {}
        for start, value, box in zip(waiting, values.tolist(), boxes.tolist(), strict=True):
            if start.pair not in found or value > found[start.pair].value:
                found[start.pair] = Fit(value, (box[0], box[1], box[2], box[3]), start.swapped, start.mirrored)
        yield from found.items()

    waiting: list[_Start] = []
    for pair in pairs:
        waiting += starts(pair)
        if len(waiting) >= _TOGETHER:
            yield from best(waiting)
            waiting = []
    if waiting:
        yield from best(waiting)


def search(whole: np.ndarray, thumbs: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the sides of crops so that what they show correlates best with ``whole``.

    Args:
        whole: (n, 768) float32, the first rows of `fixed_crops`.
        thumbs: (n, 32, 32, 3) uint8, the images that are cropped.
        boxes: (n, 4), the crops to start from.

    Returns:
        The correlations (n,) float32, and the crops (n, 4) float64.
    """
    n = len(thumbs)
    colours = thumbs.transpose(0, 3, 1, 2).astype(np.float32)  # (n, 3, 32, 32): colour, row, column
    rows = np.ascontiguousarray(colours.transpose(0, 2, 1, 3)).reshape(n, THUMB, 3 * THUMB)  # products from the left
    columns = colours.reshape(n, 3 * THUMB, THUMB)  # products from the right
    boxes = boxes.astype(np.float64)
    down, across = _matrices(boxes, 1), _matrices(boxes, 0)
    values = _correlation(whole, _grid_across(down @ rows, across))
    for step in _STEPS:
        for side in _SIDES:
            vertical = side % 2 == 1
            # What the move of this side leaves as it is.
            kept = columns @ across.swapaxes(1, 2) if vertical else down @ rows
            for move in (-step, step):
                moved = boxes.copy()
                moved[:, side] = (moved[:, side] + move).clip(0.0, 1.0)
                matrices = _matrices(moved, side % 2)
                grid = _grid_down(matrices, kept) if vertical else _grid_across(kept, matrices)
                new = _correlation(whole, grid)
                better = new > values
                values = np.where(better, new, values)
                boxes[better] = moved[better]
                current = down if vertical else across
                current[better] = matrices[better]
    return values, boxes


def _grid_across(kept: np.ndarray, across: np.ndarray) -> np.ndarray:
    """(n, 16, 96) of rows that are resized, and (n, 16, 32): (n, 3, 16, 16)."""
    n = len(kept)
    by_colour = kept.reshape(n, GRID, 3, THUMB).swapaxes(1, 2).reshape(n, 3 * GRID, THUMB)
    return (by_colour @ across.swapaxes(1, 2)).reshape(n, 3, GRID, GRID)


def _grid_down(down: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(n, 16, 32), and (n, 96, 16) of columns that are resized: (n, 3, 16, 16)."""
    return down[:, None] @ kept.reshape(len(kept), 3, THUMB, GRID)


def _correlation(whole: np.ndarray, grids: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", whole, units(grids)))


def units(grids: np.ndarray) -> np.ndarray:
    """(n, 3, 16, 16) to (n, 768): without the mean of each colour, and all colours together at unit length.

    Brightness and contrast have no influence, other colours have. A plain image becomes 0, so that it correlates with
    nothing.
    """
    centred = (grids - grids.mean((2, 3), keepdims=True)).reshape(len(grids), -1)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 1.0, centred / np.maximum(length, 1.0), 0.0)


def fixed_crops(thumbs: np.ndarray, row: int) -> np.ndarray:
    """(22, 768) float32 as by `units`: the fixed crops of a thumbnail and of its mirror image, first of all the whole
    thumbnail. Each row has one colour after the other."""
    down, across = _fixed()
    found = []
    for view in (thumbs[row], thumbs[row][:, ::-1]):
        colours = np.ascontiguousarray(view.transpose(2, 0, 1), dtype=np.float32)
        found.append(units((down[:, None] @ colours) @ across[:, None].swapaxes(2, 3)))
    return np.concatenate(found)


@lru_cache(maxsize=1)
def _fixed() -> tuple[np.ndarray, np.ndarray]:
    boxes = np.array(CROPS)
    return _matrices(boxes, 1), _matrices(boxes, 0)


def _matrices(boxes: np.ndarray, side: int) -> np.ndarray:
    """(n, 16, 32) float32 for the crops' widths (side 0) or heights (side 1)."""
    # Sums of steps that differ in their last bit are the same crop.
    return np.stack([_matrix(round(low, 6), round(high, 6)) for low, high in boxes[:, [side, side + 2]].tolist()])


@lru_cache(maxsize=8_192)
def _matrix(low: float, high: float) -> np.ndarray:
    """(16, 32) float32: Pillow's resizing of one side of a thumbnail, from ``low`` to ``high``, as a matrix."""
    identity = Image.fromarray(np.eye(THUMB, dtype=np.float32))
    box = (0.0, low * THUMB, float(THUMB), high * THUMB)
    return np.asarray(identity.resize((THUMB, GRID), Image.Resampling.BILINEAR, box=box))
