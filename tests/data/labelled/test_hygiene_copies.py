"""Copies are found in every form and nothing else is: against planted ones, and on pictures that only look alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ktray.data.fingerprints import fingerprint_heldout
from ktray.data.labelled import hygiene_copies as module
from ktray.data.labelled.hygiene import (
    NEAR_COPY,
    SAME_FILE,
    SAME_PIXELS,
    TWO_LABELS,
    Checked,
    copies_between,
    two_labels,
)
from ktray.data.labelled.hygiene_copies import MOST, copies, find_copies, looks
from ktray.data.labelled.memory import kept_in
from ktray.data.labelled.rows import LabelledRow
from ktray.miniverse.world import sample
from ktray.storage.store import Dir


def photo(seed: int, height: int = 120, width: int = 90) -> np.ndarray:
    """A few soft shapes and some texture: about as smooth as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 6, 3)).astype(np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    fine = Image.fromarray(rng.integers(0, 256, (24, 18, 3)).astype(np.uint8))
    image = 0.7 * image + 0.3 * np.asarray(fine.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return image.clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int = 40) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(image: np.ndarray, factor: float = 0.6) -> np.ndarray:
    h, w = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((round(w * factor), round(h * factor)), Image.Resampling.LANCZOS))


def cropped(image: np.ndarray) -> np.ndarray:
    h, w = image.shape[:2]
    return np.ascontiguousarray(image[round(0.06 * h) : round(0.97 * h), round(0.02 * w) : round(0.95 * w)])


def mirrored(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, ::-1])


def brighter(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(1.2))


def darker(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(0.75))


def everything(image: np.ndarray) -> np.ndarray:
    return jpeg(resized(brighter(mirrored(cropped(image))), 0.8), 70)


CHANGES = [jpeg, resized, cropped, mirrored, brighter, darker, everything]
PHOTOS = [photo(seed) for seed in range(40)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("swap", [False, True], ids=["copy first", "copy second"])
def test_all_planted_copies_are_found_and_nothing_else(change: Callable[..., np.ndarray], swap: bool) -> None:
    """The changed image is in the one set or in the other, because a crop can be the training or the test image."""
    others = [photo(seed) for seed in range(100, 130)]
    first, second = looks([*others, *(change(p) for p in PHOTOS[:12])]), looks(PHOTOS)
    found = copies(second, first) if swap else copies(first, second)
    pairs = {(pair.b, pair.a) if swap else (pair.a, pair.b) for pair in found}
    assert pairs == {(len(others) + i, i) for i in range(12)}


def test_copies_within_a_set_are_named_once() -> None:
    found = copies(looks([*PHOTOS[:10], jpeg(PHOTOS[3]), mirrored(PHOTOS[7])]))
    assert [(pair.a, pair.b) for pair in found] == [(3, 10), (7, 11)]


def test_drawn_letters_are_no_copies_although_their_hashes_are_close() -> None:
    test, train = ([sample(f"letters-{name}", i, size=32).image for i in range(260)] for name in ("test", "train"))
    hashes = fingerprint_heldout(train).hash[:, 0], fingerprint_heldout(test).hash
    bits = np.bitwise_xor(hashes[0][:, None, None], hashes[1][None])
    close = sum(bin(int(value)).count("1") <= module.DISTANCE for value in bits.ravel())
    assert close > 10  # there is something to be confused by
    assert copies(looks(train), looks(test)) == []


def test_other_colours_are_another_image() -> None:
    other = PHOTOS[0][:, :, [1, 2, 0]]
    assert copies(looks([PHOTOS[0]]), looks([other]), extra=[(0, 0)]) == []


def test_candidates_of_an_encoder_are_decided_by_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_close", lambda query, hashes: iter(()))
    a, b = looks(PHOTOS[:4]), looks([jpeg(PHOTOS[2]), PHOTOS[9]])
    assert [(pair.a, pair.b) for pair in copies(a, b, [(2, 0), (0, 1), (1, 1)])] == [(2, 0)]


def test_many_hashes_are_searched_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of a large set against the comparison of each pair, up to the largest distance that counts."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, (300, 22), dtype=np.int64).astype(np.uint64)
    query = hashes[:60, [5]].copy()
    for i in range(60):
        flipped = rng.permutation(64)[: i % 14]
        query[i, 0] ^= np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64)) if len(flipped) else np.uint64(0)
    exact = set(module._close(query, hashes))
    assert {(i, i, i % 14) for i in range(60) if i % 14 <= module.DISTANCE} <= exact
    monkeypatch.setattr(module, "_FLAT", 10)
    assert set(module._close(query, hashes)) == exact


def test_of_too_many_candidates_the_nearest_are_compared() -> None:
    """Three exact copies and, farther by their hashes, one that is cropped; another is named by an encoder."""
    a, b = looks(PHOTOS[:5]), looks([*PHOTOS[:3], PHOTOS[3][3:-3, 3:-3], jpeg(PHOTOS[4])])
    far = {(i, j): bits for i, j, bits in sorted(module._close(a.hash, b.hash), reverse=True)}
    assert far[0, 0] == far[1, 1] == far[2, 2] == 0
    notes: list[str] = []
    assert [(pair.a, pair.b) for pair in copies(a, b, notes=notes)] == [(i, i) for i in range(5)]
    assert notes == []
    found = copies(a, b, extra=[(4, 4)], most=4, notes=notes)
    assert {(0, 0), (1, 1), (2, 2), (4, 4)} == {(pair.a, pair.b) for pair in found}
    assert "the nearest 4 of them are compared" in notes[0]


def test_plain_images_are_copies_only_if_they_are_equal() -> None:
    plain = [np.full((20, 20, 3), value, np.uint8) for value in (10, 200)]
    assert copies(looks(plain)) == []
    assert [(p.a, p.b, p.structure) for p in copies(looks([*plain, plain[1]]))] == [(1, 2, 1.0)]


def checked(split: str, images: list[np.ndarray], files: list[int], pixels: list[int], labels: list[str]) -> Checked:
    uris = [f"{split}{i}" for i in range(len(images))]
    return Checked(split, uris, labels, np.array(files, np.uint64), np.array(pixels, np.uint64), looks(images))


def test_findings_say_in_what_two_images_agree() -> None:
    a, b, c, d = PHOTOS[:4]
    train = checked("train", [a, b, c], [1, 2, 3], [11, 12, 13], ["x", "x", "y"])
    val = checked("val", [b, d], [2, 5], [12, 15], ["x", "y"])
    test = checked("test", [jpeg(a), c], [6, 7], [16, 13], ["x", "x"])
    found = copies_between([train, val, test])
    assert [(f.kind, f.uri, f.other_uri) for f in found] == [
        (SAME_FILE, "train1", "val0"),
        (SAME_PIXELS, "train2", "test1"),
        (NEAR_COPY, "train0", "test0"),
    ]
    assert found[0].value == found[1].value == 1.0 > found[2].value >= module.STRUCTURE
    contradicting = two_labels([train, val, test])
    assert [(f.kind, f.uri, f.label, f.other_uri, f.other_label) for f in contradicting] == [
        (TWO_LABELS, "train2", "y", "test1", "x")
    ]


def test_hundreds_of_equal_images_stay_hundreds_of_pairs() -> None:
    n = 200
    plain = [np.zeros((8, 8, 3), np.uint8)] * n
    parts = [checked(s, plain, [1] * n, [1] * n, ["x"] * n) for s in ("train", "test")]
    found = copies_between(parts)
    assert {f.other_uri for f in found} == {f"test{i}" for i in range(n)}
    assert len(found) <= 12 * n


def test_files_are_read_and_broken_ones_have_no_copies(tmp_path) -> None:
    for i, image in enumerate([PHOTOS[0], PHOTOS[1], mirrored(PHOTOS[0])]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for name in ("3.png", "4.png"):
        (tmp_path / name).write_bytes(b"no image")
    rows = [LabelledRow(str(tmp_path / f"{i}.png"), str(i), "x", "train") for i in range(5)]
    held = LabelledRow(str(tmp_path / "0.png"), "again", "x", "test")
    assert find_copies([*rows, held], []) == [(rows[0].uri, rows[2].uri)]


def test_copies_are_kept_in_the_store_for_the_same_files_only(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, image in enumerate([PHOTOS[0], mirrored(PHOTOS[0]), PHOTOS[1]]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    rows = [LabelledRow(str(tmp_path / f"{i}.png"), str(i), "x", "train", f"version {i}") for i in range(3)]
    pairs = [(rows[0].uri, rows[1].uri)]
    place = Dir(str(tmp_path / "copies"))
    with kept_in(place):
        assert find_copies(rows, []) == pairs
    assert len(place.names(".json")) == 1

    def read_again(files) -> list:
        raise AssertionError("the images are decoded again")

    monkeypatch.setattr(module, "_found", read_again)
    with kept_in(place):
        assert find_copies(rows, []) == pairs
        assert find_copies(rows[::-1], []) == pairs
        for changed in (
            rows[:2],
            [*rows[:2], replace(rows[2], version="another")],
            [replace(r, version="") for r in rows],
        ):
            with pytest.raises(AssertionError):
                find_copies(changed, [])
    with pytest.raises(AssertionError):
        find_copies(rows, [])  # nothing is kept outside of the block


def test_too_many_images_are_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    notes: list[str] = []
    assert find_copies([LabelledRow(f"/nowhere/{i}", str(i), "x", "train") for i in range(4)], notes) == []
    assert len(notes) == 1
    assert "task.group" in notes[0]
    assert MOST > 3
