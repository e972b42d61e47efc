"""Views of an item, all or some: the same rows however they are asked for."""

import numpy as np
import pytest
from image_zoo import encode, photo
from PIL import Image

from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy, render, view_from_ints
from ktray.errors import KtrayError
from ktray.targets.make_views import MakeViews

POLICY = ViewPolicy(scale=(0.3, 1.0), brightness=0.3, contrast=0.3, saturation=0.3)
CUT = MakeViews(POLICY, views=3, seed=4, size=24, max_pixels=10**6, canvas=None)


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    uris = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        uris.append(str(path))
    return {"uris": uris, "beside": {"label": [5, 6, 7, 8, 9], "text": [[i, i + 1] for i in range(5)]}}


def broken(item, tmp_path, *numbers):
    uris = list(item["uris"])
    for number in numbers:
        uris[number] = str(tmp_path / f"broken {number}.png")
        (tmp_path / f"broken {number}.png").write_bytes(b"\x89PNG and no more")
    return {**item, "uris": uris}


def test_pixels_are_those_of_the_records(item):
    rows = CUT(item)
    assert rows["pixels"].shape == (15, 3, 24, 24)
    assert rows["view_index"].tolist() == [0, 1, 2] * 5
    assert rows["label"].tolist() == [label for label in item["beside"]["label"] for _ in range(3)]
    assert rows["text"].dtype == np.int32
    assert len(set(rows["view_id"].tolist())) == 15
    for row in range(15):
        image = np.asarray(Image.open(rows["uri"][row]))
        again = render(image, view_from_ints(rows["view"][row]), 24)
        np.testing.assert_array_equal(rows["pixels"][row], again)


def test_large_jpegs_are_decoded_as_small_as_all_their_views_bear(item, tmp_path):
    size, large = 24, photo(3, 640, 480)
    path = tmp_path / "large.jpg"
    path.write_bytes(encode(large, "JPEG", quality=95))
    item = {"uris": [str(path)], "beside": {}}
    rows = CUT(item)
    shortest = rows["view"][:, 2:4].min()
    assert shortest >= 4 * size
    exact = np.stack([render(large, view_from_ints(v), size) for v in rows["view"]])
    assert np.abs(rows["pixels"].astype(int) - exact.astype(int)).mean() < 4
    full = np.asarray(Image.open(path))
    fully = np.stack([render(full, view_from_ints(v), size) for v in rows["view"]])
    assert not np.array_equal(rows["pixels"], fully)  # it was decoded smaller indeed


@pytest.mark.parametrize(("start", "step"), [(0, 1), (0, 2), (1, 2), (2, 4), (4, 5)])
def test_the_rows_of_some_images_are_those_of_all(item, start, step):
    every, some = CUT(item), CUT.some(item, start, step)
    assert len(some["bad"]) == 0
    for name in every.keys() - {"bad"}:
        of_images = every[name].reshape(5, 3, *every[name].shape[1:])[start::step]
        np.testing.assert_array_equal(some[name], of_images.reshape(-1, *every[name].shape[1:]), err_msg=name)


def test_a_broken_image_is_told_and_where_rows_are_promised_others_stand_in(item, tmp_path):
    hurt = broken(item, tmp_path, 1, 4)
    rows = CUT(hurt)
    assert len(rows["pixels"]) == 9
    assert [uri for uri, _ in rows["bad"].tolist()] == [hurt["uris"][1], hurt["uris"][4]]
    some = CUT.some(hurt, 0, 1)
    assert {len(some[name]) for name in some.keys() - {"bad"}} == {15}
    assert set(some["uri"].tolist()) == set(rows["uri"].tolist())
    assert [uri for uri, _ in some["bad"].tolist()] == [hurt["uris"][1], hurt["uris"][4]]
    # A row's parts stay together.
    by_id = {int(v): row for row, v in enumerate(rows["view_id"])}
    for row, view in enumerate(some["view_id"].tolist()):
        np.testing.assert_array_equal(some["pixels"][row], rows["pixels"][by_id[view]])
        assert some["label"][row] == rows["label"][by_id[view]]


def test_images_that_are_all_gone_end_with_the_reason(item, tmp_path):
    with pytest.raises(KtrayError, match=r"None of 5 images can be used; the first one is '.*broken 0.png'"):
        CUT.some(broken(item, tmp_path, 0, 1, 2, 3, 4), 0, 1)


def test_a_canvas_is_the_whole_image_once(item):
    canvas = Preprocess((20, 20), (0.5,) * 3, (0.5,) * 3)
    cut = MakeViews(POLICY, views=3, seed=4, size=24, max_pixels=10**6, canvas=canvas)
    rows = cut(item)
    assert cut.per_image == 1
    assert rows["pixels"].shape == (5, 3, 20, 20)
    np.testing.assert_array_equal(rows["pixels"][2], canvas.eval_transform(Image.open(item["uris"][2])))
