"""HEIC images that pillow-heif itself has written; skipped where the extra ``heic`` is not installed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ktray.data.decode import decode_rgb
from ktray.data.labelled.read import read_labelled
from ktray.data.magic import decodable, image_kind
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import BadImage

pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")


def drawn(height: int = 120, width: int = 200) -> np.ndarray:
    """Smooth colours, of which the left upper quarter is dark."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([90 + 160 * x / width, 90 + 160 * y / height, np.full((height, width), 200.0)], -1)
    image[: height // 2, : width // 2] *= 0.2
    return image.astype(np.uint8)


def heic(image: np.ndarray, **more: object) -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(image)).save(out, quality=90, **more)
    return out.getvalue()


def test_it_is_decoded_as_what_it_is():
    data = heic(drawn())
    assert (image_kind(data[:64]), decodable(data[:64])) == ("HEIC", True)
    found = decode_rgb(data)
    assert (found.shape, found.dtype) == ((120, 200, 3), np.uint8)
    assert np.abs(found.astype(int) - drawn()).mean() < 4


def test_a_turned_photo_is_turned_back():
    """As phones store it: the pixels turned to the left, and orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode_rgb(heic(np.ascontiguousarray(np.rot90(drawn())), exif=exif.tobytes()))
    assert found.shape == (120, 200, 3)
    assert np.abs(found.astype(int) - drawn()).mean() < 4


def test_bad_ones_are_refused():
    data = heic(drawn())
    with pytest.raises(BadImage, match="too large: 200 x 120"):
        decode_rgb(data, max_pixels=1000)
    for cut in (40, 200, len(data) // 2):
        with pytest.raises(BadImage):
            decode_rgb(data[:cut])


def test_folders_of_them_are_labelled_images_and_galleries(tmp_path: Path):
    for number in range(12):
        place = tmp_path / "photos" / "ab"[number % 2] / f"IMG_{number}.HEIC"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        place.write_bytes(heic(np.kron(noise, np.ones((8, 8, 1), np.uint8))))
    read = read_labelled(str(tmp_path / "photos"), seed=0)
    assert sum(map(len, (read.train, read.val, read.test))) == 12
    assert not any("HEIC" in note for note in read.notes)
    (shard,) = gallery_shards(str(tmp_path / "photos"), "auto", None)
    assert [decode_rgb(record.data).shape for record in read_shard(shard)] == [(64, 64, 3)] * 12
