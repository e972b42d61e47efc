"""Large photos in INDEX: decoded at a reduced size, and still recognised as what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from photo import make_photo
from PIL import Image

from ktray.data.decode import MAX_PIXELS, decode_rgb
from ktray.data.fingerprints import bit_counts, fingerprint
from ktray.data.preprocess import AMPLE, Ample, Preprocess
from ktray.retrieval.crops import Crops
from ktray.stages.curate.heldout import _Heldout
from ktray.stages.hygiene import _Look
from ktray.stages.index.decode import DecodeGallery

HEIGHT, WIDTH = 2100, 2900
INPUT = Preprocess((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A large photo as JPEG, the same pixels as PNG, and a small photo."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (21, 29, 3), np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )
    grain = rng.integers(-12, 13, (HEIGHT, WIDTH, 1), np.int16)
    whole = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    data = simplejpeg.encode_jpeg(whole, quality=92)
    (folder / "large.jpg").write_bytes(data)
    Image.fromarray(decode_rgb(data)).save(folder / "large.png", compress_level=1)
    Image.fromarray(make_photo(300, 400)).save(folder / "small.jpg", quality=95)
    return {path.name: path for path in folder.iterdir()}


def indexed(path: Path, crops: Crops | None = None):
    decode = DecodeGallery([], INPUT, crops or Crops(), MAX_PIXELS)
    (piece,) = decode({"name": "x", "uris": [str(path)]})
    return piece


def test_the_factor_leaves_what_a_teacher_looks_at():
    assert decode_rgb(make_jpeg(3000, 4000), enough=Ample()).shape == (750, 1000, 3)
    assert decode_rgb(make_jpeg(1500, 1400), enough=Ample()).shape == (750, 700, 3)
    assert decode_rgb(make_jpeg(1399, 3000), enough=Ample()).shape == (1399, 3000, 3)
    assert Ample()(2 * AMPLE, 5000) == 2
    assert Ample()(2 * AMPLE, 40 * AMPLE) == 1  # of a strip, only the centre is looked at


def make_jpeg(height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8))


def test_a_large_photo_gives_the_teacher_nearly_the_same_pixels(photos):
    rows = indexed(photos["large.jpg"])
    whole = decode_rgb(photos["large.jpg"].read_bytes())
    exact = INPUT.eval_transform(whole).astype(float)
    difference = rows["pixels"][0] - exact
    assert 0 < np.abs(difference).mean() < 1.0  # of 255; 0 would mean that the image was not reduced
    assert np.abs(difference).max() < 8
    assert int(bit_counts(rows["hash"] ^ fingerprint([whole]).hash)[0]) <= 2


@pytest.mark.parametrize("size", [(2100, 3093), (2492, 2100), (1499, 1401)])
def test_the_crop_of_a_reduced_photo_is_that_of_the_whole(size):
    """A steep gradient shows a shift: here more than one of 255 for each pixel of the input."""
    height, width = size
    corners = np.array([[[0, 0, 0], [255, 0, 128]], [[0, 255, 128], [255, 255, 255]]], np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    data = simplejpeg.encode_jpeg(np.asarray(image), quality=98, colorsubsampling="444")
    enough = Ample()
    reduced, whole = decode_rgb(data, enough=enough), decode_rgb(data)
    assert reduced.shape[:2] != enough.whole == size
    for mode in ("shortest", "squash", "longest"):
        for crop_pct in (1.0, 0.875):
            expects = dataclasses.replace(INPUT, resize_mode=mode, crop_pct=crop_pct)
            difference = expects.eval_transform(reduced, enough.whole).astype(float) - expects.eval_transform(whole)
            assert np.abs(difference.mean((1, 2))).max() < 0.4
            assert np.abs(difference).max() < 4


def test_a_copy_of_a_large_photo_has_the_same_digest_wherever_it_is_compared(photos):
    item = {"uris": [str(photos["large.jpg"])]}
    digest = int(indexed(photos["large.jpg"])["digest"][0])
    assert set(_Heldout(INPUT, MAX_PIXELS)(item)["digest"].tolist()) == {digest}
    assert set(_Heldout(None, MAX_PIXELS)(item)["digest"].tolist()) == {digest}
    assert _Look(None, MAX_PIXELS)(item)["pixels_digest"].tolist() == [digest]


def test_a_copy_in_another_format_has_the_same_hash(photos):
    held_out = _Heldout(INPUT, MAX_PIXELS)({"uris": [str(photos["large.png"])]})
    gallery = indexed(photos["large.jpg"])
    bits = bit_counts(np.repeat(gallery["hash"], held_out["hash"].size) ^ held_out["hash"].ravel())
    assert int(bits.min()) <= 2


def test_small_images_and_crops_come_from_the_whole_image(photos):
    small = decode_rgb(photos["small.jpg"].read_bytes())
    np.testing.assert_array_equal(indexed(photos["small.jpg"])["pixels"][0], INPUT.eval_transform(small))
    rows = indexed(photos["large.jpg"], Crops("grid", 4))
    whole = decode_rgb(photos["large.jpg"].read_bytes())
    assert rows["uri"][1].endswith(f"xywh=0,0,{WIDTH // 2},{HEIGHT // 2}")
    np.testing.assert_array_equal(rows["pixels"][0], INPUT.eval_transform(whole))
    first = np.ascontiguousarray(whole[: HEIGHT // 2, : WIDTH // 2])
    np.testing.assert_array_equal(rows["pixels"][1], INPUT.eval_transform(first))
