"""Fits of many pairs together against resizing each crop by itself with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ktray.data.fingerprints import CROPS
from ktray.data.labelled import hygiene_fit as module
from ktray.data.labelled.hygiene_fit import GRID, THUMB, WHOLE, Box, fits, fixed_crops

SIZE = 128


def photo(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 6, 3)).astype(np.uint8))
    return coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def thumb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BILINEAR))


def crop(image: Image.Image, box: Box, mirrored: bool = False) -> Image.Image:
    cut = image.crop(tuple(round(SIZE * side) for side in box))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else cut


def unit(pixels: np.ndarray) -> np.ndarray:
    centred = pixels - pixels.mean((0, 1))
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1.0 else np.zeros_like(centred)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    corners = tuple(THUMB * side for side in box)
    return np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BILINEAR, box=corners), np.float32)


def slowly(whole: np.ndarray, view: np.ndarray) -> tuple[float, Box]:
    """The search of one pair, one crop after the other, with Pillow's own crops, which are rounded to whole grey
    values."""
    fixed = unit(cut(whole, WHOLE))

    def score(box: Box) -> float:
        return float((fixed * unit(cut(view, box))).sum())

    best, box = max((score(box), box) for box in CROPS)
    for step in (0.03, 0.015, 0.0075):
        for side in (0, 1, 2, 3, 0, 1, 2, 3):
            for move in (-step, step):
                sides = list(box)
                sides[side] = min(1.0, max(0.0, sides[side] + move))
                moved = (sides[0], sides[1], sides[2], sides[3])
                if (value := score(moved)) > best:
                    best, box = value, moved
    return best, box


BOXES: list[Box] = [(0.0, 0.05, 0.93, 1.0), (0.07, 0.0, 1.0, 0.9), (0.04, 0.06, 0.97, 0.95), WHOLE]


def test_fits_are_those_of_a_search_for_each_pair() -> None:
    photos = [photo(seed) for seed in range(12)]
    changed = [crop(p, BOXES[k % 4], mirrored=k % 3 == 0) for k, p in enumerate(photos)]
    a, b = np.stack([thumb(p) for p in photos]), np.stack([thumb(c) for c in changed])
    # The copy is the crop in the one order, and the original in the other one.
    for first, second in ((a, b), (b, a)):
        pairs = [(i, j) for i in range(12) for j in range(12)]
        found = dict(fits(pairs, first, second))
        assert {(i, i) for i in range(12)} <= set(found)
        for i, j in pairs:
            each = {
                (swapped, mirrored): slowly(whole, np.ascontiguousarray(view[:, ::-1] if mirrored else view))
                for swapped, whole, view in ((False, first[i], second[j]), (True, second[j], first[i]))
                for mirrored in (False, True)
            }
            best = max(value for value, _ in each.values())
            if (i, j) not in found:
                assert best < 0.93
                continue
            fit = found[i, j]
            # Fits of little use may end at another crop.
            if best >= 0.93:
                assert fit.value == pytest.approx(best, abs=0.01)
                value, box = each[fit.swapped, fit.mirrored]
                assert value == pytest.approx(fit.value, abs=0.01)
                assert fit.box == pytest.approx(box, abs=0.05)


def test_pieces_of_pairs_give_what_all_together_give(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = [photo(seed) for seed in range(6)]
    a = np.stack([thumb(p) for p in photos])
    b = np.stack([thumb(ImageEnhance.Brightness(crop(p, BOXES[2])).enhance(1.1)) for p in photos])
    pairs = [(i, j) for i in range(6) for j in range(6)]
    together = dict(fits(pairs, a, b))
    monkeypatch.setattr(module, "_TOGETHER", 1)
    apart = dict(fits(pairs, a, b))
    assert apart.keys() == together.keys()
    for pair, fit in together.items():
        assert apart[pair].value == pytest.approx(fit.value, abs=1e-5)
        assert apart[pair].box == pytest.approx(fit.box, abs=1e-6)
    assert all(together[i, i].value > 0.97 for i in range(6))


def test_plain_images_fit_nothing() -> None:
    plain = np.full((2, THUMB, THUMB, 3), 200, np.uint8)
    assert not fixed_crops(plain, 0).any()
    assert list(fits([(0, 1)], plain, plain)) == []


def test_fixed_crops_are_those_of_pillow() -> None:
    thumbs = np.stack([thumb(photo(seed)) for seed in range(2)])
    for row in range(2):
        views = thumbs[row], np.ascontiguousarray(thumbs[row][:, ::-1])
        each = [unit(cut(view, box)).transpose(2, 0, 1).ravel() for view in views for box in CROPS]
        np.testing.assert_allclose(fixed_crops(thumbs, row), np.stack(each), atol=1e-3)


def test_a_search_never_loses_what_it_starts_with() -> None:
    thumbs = np.stack([thumb(photo(seed)) for seed in range(4)])
    units = np.stack([fixed_crops(thumbs, row)[0] for row in range(4)])
    starts = np.array([CROPS[k] for k in (0, 3, 7, 10)])
    at_start = np.array([(units[k] * fixed_crops(thumbs, k)[(0, 3, 7, 10)[k]]).sum() for k in range(4)])
    values, boxes = module.search(units, thumbs, starts)
    assert (values >= at_start - 1e-5).all()
    assert ((boxes >= 0) & (boxes <= 1)).all()
    assert module.search(units, thumbs, np.array([WHOLE] * 4))[0] == pytest.approx(np.ones(4), abs=1e-5)
