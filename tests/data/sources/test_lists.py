"""Transfer sets of one's own: paths, names of gallery images, and what is wrong with a list."""

import pytest
from image_zoo import jpeg

from ktray.data.sources.lists import gallery_shards, listed_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/2.png"]):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(jpeg(i))
    return tmp_path / "photos"


def paths(shards):
    return [path for shard in shards for path in shard.paths]


def write(photos, text, name="list.txt"):
    (photos.parent / name).write_text(text)
    return str(photos.parent / name)


def test_names_with_and_without_suffix_are_looked_up_in_the_gallery(photos):
    found = listed_shards(write(photos, "3\n1.jpg\n\n2.png\n"), str(photos))
    assert paths(found) == [str(photos / "b/3.jpg"), str(photos / "a/1.jpg"), str(photos / "b/2.png")]
    assert [r.data for s in found for r in read_shard(s)] == [jpeg(2), jpeg(0), jpeg(3)]


def test_paths_start_at_the_lists_folder_and_may_name_crops(photos):
    found = listed_shards(write(photos, f"photos/a/1.jpg\n{photos}/b/3.jpg#xywh=1,2,30,40\n"), None)
    assert paths(found) == [str(photos / "a/1.jpg"), f"{photos}/b/3.jpg#xywh=1,2,30,40"]
    assert [r.data for s in found for r in read_shard(s)] == [jpeg(0), jpeg(2)]


def test_a_csv_list_is_a_gallery(photos):
    found = gallery_shards(None, "auto", write(photos, "path\nphotos/a/2.jpg\n", "list.csv"))
    assert paths(found) == [str(photos / "a/2.jpg")]


def test_neither_list_nor_gallery_is_no_gallery():
    assert gallery_shards(None, "auto", None) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("1\n1\n", "repeats 1 images, 1 among them"),
        ("1\n9\n8\n7\n6\n", "4 of the 5 images .* are not in the gallery: 9, 8, 7"),
        ("2\n", "1 names .* match several gallery images: 2"),
    ],
)
def test_what_is_wrong_with_a_list_is_counted_and_shown(photos, text, message):
    with pytest.raises(KtrayError, match=message):
        listed_shards(write(photos, text), str(photos))


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(KtrayError, match=r"cannot be read: no such file"):
        listed_shards(str(tmp_path / "no.txt"), None)
