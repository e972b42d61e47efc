"""Crops of gallery images: inside, the same everywhere, and none that is the whole."""

import pytest

from ktray.retrieval.crops import Crops


def test_a_grid_covers_every_pixel_once():
    boxes = Crops("grid", 9).boxes("a", 50, 64)
    covered = {(x, y) for left, top, w, h in boxes for x in range(left, left + w) for y in range(top, top + h)}
    assert len(boxes) == 9
    assert sum(w * h for _, _, w, h in boxes) == len(covered) == 50 * 64


def test_random_crops_lie_inside_and_depend_on_the_uri_alone():
    crops = Crops("random", 16)
    boxes = crops.boxes("a", 60, 90)
    assert boxes == crops.boxes("a", 60, 90) != crops.boxes("b", 60, 90)
    for left, top, width, height in boxes:
        assert 0 <= left < left + width <= 90
        assert 0 <= top < top + height <= 60
        assert 0.05 < width * height / (60 * 90) < 0.7


@pytest.mark.parametrize("kind", ["grid", "random"])
def test_an_image_of_one_pixel_has_no_crops(kind):
    assert Crops(kind, 4).boxes("a", 1, 1) == []


def test_no_crops():
    assert Crops().boxes("a", 10, 10) == []
    assert Crops().most == 1
    assert Crops("grid", 4).most == 5
