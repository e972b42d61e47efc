"""Planted copies are found, look-alikes stay, and the hash agrees with an independent DCT."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ktray.data.fingerprints import fingerprint, fingerprint_heldout
from ktray.miniverse.world import sample
from ktray.retrieval.heldout_duplicates import (
    IDENTICAL,
    NEAR_DUPLICATE,
    GalleryBlock,
    near_duplicates,
)

HELDOUT = [sample("letters-test", i, size=48).image for i in range(52)]
OTHERS = [sample("gallery", i, size=48).image for i in range(150)]
# The same 26 letters in other pictures: what a careless rule would drop.
SAME_CLASSES = [sample("letters-train", i, size=48).image for i in range(52)]


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer).convert("RGB"))


def resized(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((31, 35), Image.Resampling.LANCZOS))


def cropped(image: np.ndarray) -> np.ndarray:
    return image[1:-2, 2:-1]


def mirrored(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, ::-1])


def embed(images: list[np.ndarray]) -> np.ndarray:
    """A stand-in for an encoder: 12 x 12 colour thumbnails without their mean, at unit length."""
    small = np.stack([np.asarray(Image.fromarray(i).resize((12, 12)), dtype=np.float32).ravel() for i in images])
    small -= small.mean(1, keepdims=True)
    return small / np.linalg.norm(small, axis=1, keepdims=True)


def alike(count: int) -> np.ndarray:
    """Embeddings of an encoder that sees no difference: every cosine is above 0.99."""
    rng = np.random.default_rng(0)
    x = np.ones((count, 32)) + 0.05 * rng.normal(size=(count, 32))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def block(images: list[np.ndarray], embedding: np.ndarray, offset: int = 0) -> GalleryBlock:
    return GalleryBlock(offset, embedding, fingerprint(images))


@pytest.mark.parametrize("change", [jpeg, resized, cropped])
def test_planted_copies_are_found_and_named(change: object) -> None:
    copies = [change(i) for i in HELDOUT[:20]]  # type: ignore[operator]
    images = OTHERS[:75] + copies + OTHERS[75:]
    table = near_duplicates(
        [block(images, embed(images))], embed(HELDOUT), fingerprint_heldout(HELDOUT), similarity=0.9
    )
    planted = {75 + i: i for i in range(20)}
    found = dict(zip(table.gallery.tolist(), table.heldout.tolist(), strict=True))
    assert len(found.items() & planted.items()) >= 18
    assert set(found) <= set(planted)
    assert table.counts() == {IDENTICAL: 0, NEAR_DUPLICATE: len(table)}
    assert (table.similarity >= 0.9).all()
    assert (table.distance <= 6).all()


def test_mirrored_copies_are_found_where_the_encoder_takes_them_for_alike() -> None:
    images = [mirrored(i) for i in HELDOUT] + OTHERS
    embedding = alike(len(images) + len(HELDOUT))
    table = near_duplicates(
        [block(images, embedding[: len(images)])], embedding[len(images) :], fingerprint_heldout(HELDOUT)
    )
    assert np.isin(np.arange(52), table.gallery).mean() > 0.9


def test_look_alikes_stay_even_when_every_cosine_is_high() -> None:
    images = SAME_CLASSES + OTHERS
    embedding = alike(len(images) + len(HELDOUT))
    table = near_duplicates(
        [block(images, embedding[: len(images)])], embedding[len(images) :], fingerprint_heldout(HELDOUT)
    )
    assert len(table) <= 2
    assert table.similar == len(images) - len(table)


def test_pixels_alone_do_not_drop_an_image() -> None:
    images = [jpeg(i) for i in HELDOUT[:4]]
    hashes = fingerprint([*images, *HELDOUT[:4]]).hash.tolist()
    assert all(bin(a ^ b).count("1") <= 6 for a, b in zip(hashes[:4], hashes[4:], strict=True))
    # An encoder that tells them apart all the same, as it would the same drawing in other colours.
    table = near_duplicates(
        [block(images, np.eye(8, dtype=np.float32)[:4])],
        np.eye(8, dtype=np.float32)[4:],
        fingerprint_heldout(HELDOUT[:4]),
    )
    assert len(table) == 0
    assert table.similar == 0


def test_identical_pixels_are_dropped_whatever_the_cosine() -> None:
    images = [OTHERS[0], HELDOUT[3], OTHERS[1]]
    table = near_duplicates(
        [block(images, np.eye(8, dtype=np.float16)[:3], offset=40)],
        np.eye(8, dtype=np.float32)[[3, 4, 5, 6]],
        fingerprint_heldout(HELDOUT[:4]),
    )
    assert table.gallery.tolist() == [41]
    assert table.heldout.tolist() == [3]
    assert table.counts() == {IDENTICAL: 1, NEAR_DUPLICATE: 0}


def test_blocks_do_not_matter_and_an_empty_side_drops_nothing() -> None:
    images = OTHERS[:20] + [jpeg(i) for i in HELDOUT[:10]] + [HELDOUT[11]]
    embedding, reference, prints = embed(images), embed(HELDOUT), fingerprint_heldout(HELDOUT)
    whole = near_duplicates([block(images, embedding)], reference, prints, similarity=0.8)
    parts = [block(images[i : i + 4], embedding[i : i + 4], i) for i in range(0, len(images), 4)]
    cut = near_duplicates(parts, reference, prints, similarity=0.8)
    assert len(whole) >= 10
    assert whole.gallery.tolist() == cut.gallery.tolist()
    assert whole.heldout.tolist() == cut.heldout.tolist()
    assert (whole.reason, whole.similar) == (cut.reason, cut.similar)
    assert len(near_duplicates([], reference, prints)) == 0
    assert len(near_duplicates(parts, reference[:0], fingerprint_heldout([]))) == 0


def test_hash_is_that_of_scipys_dct() -> None:
    from scipy.fft import dctn

    for image in HELDOUT[:5]:
        grey = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
        low = dctn(np.asarray(grey, dtype=float), norm=None)[:8, :8].ravel()
        bits = (low > np.median(low[1:])).tolist()
        expected = int("".join("1" if b else "0" for b in [False, *bits[1:]]), 2)
        assert fingerprint([image]).hash.tolist() == [expected]


def test_plain_images_hash_alike_whatever_their_brightness() -> None:
    plain = [np.full((30, 40, 3), value, np.uint8) for value in (0, 10, 200, 255)]
    assert fingerprint(plain).hash.tolist() == [0, 0, 0, 0]
