"""Views as JPEG and back, through a stored shard."""

import io

import numpy as np
import pytest
from image_zoo import photo
from PIL import Image

from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Dir
from ktray.targets.jpeg import decode_views, encode_views, view_bytes


@pytest.fixture
def rows():
    pixels = np.stack([photo(i, 48, 48).transpose(2, 0, 1) for i in range(5)])
    return {"pixels": pixels, "view_id": np.arange(5)}


def test_a_stored_shard_comes_back_as_pillow_reads_it(rows, tmp_path):
    folder = Dir(str(tmp_path))
    small = write_rows(folder, "squeezed.parquet", encode_views(rows, 90))
    assert small < write_rows(folder, "whole.parquet", rows) / 2
    stored = read_rows(folder, "squeezed.parquet", ["view_id", "jpeg"])
    again = decode_views({name: value[1::2] for name, value in stored.items()})
    assert again.keys() == rows.keys()
    assert again["view_id"].tolist() == [1, 3]
    assert again["pixels"].dtype == np.uint8
    assert np.abs(again["pixels"].astype(int) - rows["pixels"][1::2]).mean() < 3
    expected = np.asarray(Image.open(io.BytesIO(stored["jpeg"][1])))
    np.testing.assert_array_equal(again["pixels"][0], expected.transpose(2, 0, 1))


def test_a_better_quality_loses_less_and_takes_more(rows):
    sizes, losses = [], []
    for quality in (60, 80, 95):
        found = encode_views(rows, quality)
        sizes.append(sum(map(len, found["jpeg"])))
        losses.append(np.abs(decode_views(found)["pixels"].astype(int) - rows["pixels"]).mean())
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)


def test_rows_that_are_not_asked_to_be_small_stay_as_they_are(rows):
    assert encode_views(rows, None) is rows
    assert decode_views(rows) is rows
    assert view_bytes(32, None) == 3 * 32 * 32
    assert view_bytes(224, 90) < view_bytes(224, None) / 5
