"""Tables of Lance, written by lance itself: images, labels, and vectors as embeddings."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import picture

from ktray.data.labelled.read import read_labelled
from ktray.data.sources.fetch import fetch
from ktray.data.sources.lists import embedded_only, gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


def columns(rows: int, vectors: bool = False) -> pa.Table:
    found = {
        "image": pa.array([picture(str(i)) for i in range(rows)]),
        "label": pa.array([("cat", "dog")[i % 2] for i in range(rows)]),
        "caption": pa.array([f"no. {i}" for i in range(rows)]),
    }
    if vectors:
        flat = pa.array(np.arange(rows * 3, dtype=np.float32))
        found["vector"] = pa.FixedSizeListArray.from_arrays(flat, 3)
    return pa.table(found)


def write(folder: Path, table: pa.Table, **options: object) -> str:
    lance = pytest.importorskip("lance")
    lance.write_dataset(table, str(folder), **options)
    return str(folder)


def test_a_gallery_of_the_newest_version(tmp_path: Path) -> None:
    place = write(tmp_path / "x.lance", columns(6))
    write(tmp_path / "x.lance", columns(4), mode="append")
    shards = gallery_shards(place, "auto", None)
    assert [shard.count for shard in shards] == [10]
    records = [record for shard in shards for record in read_shard(shard)]
    assert [r.data for r in records] == [picture(str(i)) for i in (*range(6), *range(4))]
    assert records[7].caption == "no. 1"
    assert records[7].uri == f"{place}@2#lance=7"
    assert list(fetch([records[7].uri, records[2].uri])) == [
        (records[7].uri, picture("1"), None),
        (records[2].uri, picture("2"), None),
    ]
    assert embedded_only(place, None) == []


def test_a_uri_names_the_same_image_after_rows_were_deleted(tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    place = write(tmp_path / "x.lance", columns(6))
    (before,) = gallery_shards(place, "auto", None)
    uri = list(read_shard(before))[3].uri
    lance.dataset(place).delete("caption = 'no. 1'")
    (after,) = gallery_shards(place, "auto", None)
    assert before.fingerprint != after.fingerprint
    assert [r.data for r in read_shard(after)] == [picture(str(i)) for i in (0, 2, 3, 4, 5)]
    assert list(fetch([uri])) == [(uri, picture("3"), None)]


def test_labels_are_read(tmp_path: Path) -> None:
    found = read_labelled(write(tmp_path / "x.lance", columns(10)), seed=0)
    everything = [*found.train, *found.val, *found.test]
    assert {(e.uri.rpartition("=")[2], found.classes[e.label]) for e in everything} == {
        (str(i), ("cat", "dog")[i % 2]) for i in range(10)
    }


def test_vectors_are_embeddings_unless_the_images_are_named(tmp_path: Path) -> None:
    place = write(tmp_path / "x.lance", columns(70, vectors=True))
    (shard,) = gallery_shards(place, "auto", None)
    assert shard.source.has_embeddings
    read = list(shard.source.read_embedded(shard))
    assert [record.data for record, _ in read] == [picture(str(i)) for i in range(70)]
    np.testing.assert_array_equal(np.stack([v for _, v in read]), np.arange(210, dtype=np.float32).reshape(70, 3))
    assert embedded_only(place, None) == [shard]
    (named,) = gallery_shards(place, "image", None)
    assert not named.source.has_embeddings
    assert named.fingerprint != shard.fingerprint
    assert embedded_only(place, None, "image") == []
    uri = next(read_shard(named)).uri
    assert list(fetch([uri])) == [(uri, picture("0"), None)]


def test_several_columns_of_vectors(tmp_path: Path) -> None:
    table = columns(4, vectors=True)
    two = table.append_column("other", table.column("vector"))
    (shard,) = gallery_shards(write(tmp_path / "a.lance", two), "auto", None)
    assert shard.source.has_embeddings
    with pytest.raises(KtrayError, match="several columns of vectors: one, two"):
        gallery_shards(
            write(tmp_path / "b.lance", two.rename_columns(["image", "label", "text", "one", "two"])), "auto", None
        )


def test_what_is_damaged_or_has_no_images(tmp_path: Path) -> None:
    place = write(tmp_path / "x.lance", columns(4))
    for file in (tmp_path / "x.lance" / "data").iterdir():
        file.unlink()
    ((_, data, error),) = fetch([f"{place}@1#lance=2"])
    assert data is None
    assert "broken table of Lance" in str(error)
    for file in (tmp_path / "x.lance" / "_versions").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(
        KtrayError, match=r"x\.lance' cannot be read as a table of Lance.*Write the table again"
    ) as raised:
        gallery_shards(place, "auto", None)
    assert ".rs:" not in str(raised.value)
    with pytest.raises(KtrayError, match="no column that is recognised as the image column"):
        gallery_shards(write(tmp_path / "y.lance", pa.table({"n": [1, 2]})), "auto", None)


def test_rows_that_do_not_exist(tmp_path: Path) -> None:
    place = write(tmp_path / "x.lance", columns(4))
    for uri, message in ((f"{place}@1#lance=9", "row 9 does not exist"), (f"{place}#lance=1", "has no version")):
        ((_, data, error),) = fetch([uri])
        assert data is None
        assert message in str(error)


def test_the_allowed_places_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write(tmp_path / "x.lance", columns(4))
    monkeypatch.setenv("KTRAY_DATA_ROOTS", "/nowhere")
    ((_, data, error),) = fetch([f"{place}@1#lance=0"])
    assert data is None
    assert "outside of KTRAY_DATA_ROOTS" in str(error)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.lance" / "_versions").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(KtrayError, match=r"needs the package lance, .*pip install 'ktray\[lance\]'"):
        gallery_shards(str(tmp_path / "x.lance"), "auto", None)
