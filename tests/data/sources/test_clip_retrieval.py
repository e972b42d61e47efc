"""Folders of embeddings as clip-retrieval writes them."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ktray.data.sources.clip_retrieval import embedded_shards, is_embedded, read_records, read_vectors
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


def jpeg(value):
    stream = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 0, 255 - value)).save(stream, "JPEG")
    return stream.getvalue()


def write(folder, number, names, vectors=None, **more):
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if vectors is None:
        vectors = np.arange(len(names))[:, None] + np.linspace(0, 0.5, 8)[None] + 100 * number
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors.astype(np.float16))
    pq.write_table(pa.table({"image_path": names, **more}), folder / "metadata" / f"metadata_{number}.parquet")


def write_tar(path, keys):
    with tarfile.open(path, "w") as tar:
        for value, key in enumerate(keys):
            for suffix, content in (("jpg", jpeg(value)), ("txt", f"no {value}".encode())):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def test_rows_keep_their_embedding_and_caption_over_partitions_and_shards(files):
    paths = [str(files / "images" / f"{i}.jpg") for i in range(5)]
    write(files / "out", 0, paths[:3], caption=["a", "b", None])
    write(files / "out", 1, paths[3:], caption=["d", "e"])
    assert is_embedded(str(files / "out"))
    assert not is_embedded(str(files / "images"))
    shards = embedded_shards(str(files / "out"), None, rows_per_shard=2)
    assert [s.count for s in shards] == [2, 1, 2]
    assert len({s.fingerprint for s in shards}) == 3
    found = {}
    for shard in shards:
        vectors = read_vectors(shard)
        assert vectors.shape == (shard.count, 8)
        for row, record in read_records(shard):
            found[record.uri] = (float(vectors[row][0]), record.caption, record.data)
    assert found == {
        path: (value, caption, jpeg(i))
        for i, (path, value, caption) in enumerate(
            zip(paths, [0, 1, 2, 100, 101], ["a", "b", None, "d", "e"], strict=True)
        )
    }


@pytest.mark.parametrize("images", [None, "images"])
def test_relative_paths_start_at_the_folder_or_where_the_images_lie(files, images):
    names = ["images/1.jpg", "images/9.jpg"] if images is None else ["1.jpg", "9.jpg"]
    place = files if images is None else files / "out"
    write(place, 0, names)
    (shard,) = gallery_shards(str(place), "auto", None, None if images is None else str(files / images))
    good, bad = read_shard(shard)
    assert (good.uri, good.data) == (str(files / "images/1.jpg"), jpeg(1))
    assert bad.data is None
    assert bad.error


def test_keys_are_looked_up_in_the_tars(tmp_path):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "00000.tar", ["000000000", "000000001"])
    write_tar(tmp_path / "tars" / "00001.tar", ["000010000", "deep/000010001"])
    write_tar(tmp_path / "tars" / "other.tar", ["free"])
    keys = ["000010000", "free", "deep/000010001", "000000001", "000099999"]
    write(tmp_path / "out", 0, keys)
    (shard,) = embedded_shards(str(tmp_path / "out"), str(tmp_path / "tars"))
    found = dict(read_records(shard))
    assert [found[i].data for i in range(4)] == [jpeg(0), jpeg(0), jpeg(1), jpeg(1)]
    assert "00001.tar#member=000010000.jpg" in found[0].uri
    assert [found[i].caption for i in range(4)] == ["no 0", "no 0", "no 1", "no 1"]
    assert found[4].error == "no tar of gallery.images has a sample with this key"


def test_what_does_not_fit_together_is_named(files):
    write(files / "a", 0, ["x.jpg", "y.jpg"], np.zeros((3, 4)))
    with pytest.raises(KtrayError, match=r"img_emb_0\.npy' has 3 rows and .*metadata_0\.parquet' 2"):
        embedded_shards(str(files / "a"), None)
    write(files / "b", 0, ["x.jpg"])
    (files / "b" / "metadata" / "metadata_0.parquet").unlink()
    with pytest.raises(
        KtrayError, match=r"Partition 0 has only '.*img_emb_0\.npy'; it needs one file in img_emb/ and one in metadata/"
    ):
        embedded_shards(str(files / "b"), None)
    write(files / "c", 0, ["x.jpg"])
    pq.write_table(pa.table({"url": ["x"]}), files / "c" / "metadata" / "metadata_0.parquet")
    with pytest.raises(KtrayError, match="has no column image_path, only url"):
        embedded_shards(str(files / "c"), None)
    write(files / "d", 0, ["x.jpg"], np.zeros(4))
    with pytest.raises(KtrayError, match="but embeddings are 2-dimensional"):
        embedded_shards(str(files / "d"), None)
    (files / "e" / "img_emb").mkdir(parents=True)
    (files / "e" / "metadata").mkdir()
    with pytest.raises(KtrayError, match="has no embeddings"):
        embedded_shards(str(files / "e"), None)
    write(files / "f", 0, ["x.jpg"])
    (files / "f" / "img_emb" / "img_emb_0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(KtrayError, match="cannot be read"):
        embedded_shards(str(files / "f"), None)
