"""Lists, tables and archives of strangers: they name no device, no foreign server, nothing outside of their place."""

import os
import tarfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from archives import tar_bytes, write_parquet
from image_zoo import jpeg, png_header_bomb

from ktray import recipe as recipes
from ktray.data import filesystem
from ktray.data.sources import parquet_tables, tars
from ktray.data.sources.clip_retrieval import _placed
from ktray.data.sources.fetch import decode_image, fetch
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.data.sources.tars import TarMember, read_tar
from ktray.data.sources.uris import ImageRef, resolve
from ktray.errors import BadImage, KtrayError
from ktray.pipeline.plan_gallery import gallery_images


def errors(spec):
    return {r.uri: r.error for shard in list_shards(str(spec)) for r in read_shard(shard)}


def test_pipes_sockets_and_devices_are_not_waited_for(tmp_path):
    """Opened as a file, a pipe would wait for ever (the test would hang) and a device never end."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jpg").write_bytes(jpeg())
    os.mkfifo(tmp_path / "d" / "pipe.jpg")
    (tmp_path / "d" / "zero.jpg").symlink_to("/dev/zero")
    found = {uri.rpartition("/")[2]: error for uri, error in errors(tmp_path / "d").items()}
    assert found["a.jpg"] is None
    assert "not a regular file" in found["pipe.jpg"]
    assert "not a regular file" in found["zero.jpg"]
    (tmp_path / "l.csv").write_text(f"path\n/dev/zero\n/dev/tty\n{tmp_path}/d/pipe.jpg\n{tmp_path}/d\n")
    assert all(errors(tmp_path / "l.csv").values())
    os.mkfifo(tmp_path / "x.tar")
    ((_, error),) = [(r.data, r.error) for r in read_tar(str(tmp_path / "x.tar"))]
    assert "not a regular file" in error


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket?endpoint_override=127.0.0.1:9&scheme=http/a.jpg",
        "s3://AKIAABCDEFGHIJKLMNOP:hunter22@bucket/a.jpg",
        "hdfs://somewhere:8020/a.jpg",
        "s3:///a.jpg",
    ],
)
def test_an_address_in_a_list_is_a_bucket_and_nothing_else(tmp_path, monkeypatch, uri):
    asked = []
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda root: asked.append(root))
    (tmp_path / "l.csv").write_text(f"path\n{uri}\n")
    ((_, error),) = errors(tmp_path / "l.csv").items()
    assert "not the name of a bucket" in error
    assert "hunter22" not in error
    assert not asked


def test_a_list_in_a_bucket_names_no_file_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "bucket").mkdir()
    fake = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda root: {"s3://bucket": fake}[root])
    names = [f"{tmp_path}/secret.jpg", f"file://{tmp_path}/secret.jpg", "~/secret.jpg"]
    (tmp_path / "bucket" / "l.csv").write_text("\n".join(["path", *names, ""]))
    write_parquet(tmp_path / "bucket" / "p.parquet", {"path": names})
    for name in ("l.csv", "p.parquet"):
        found = errors(f"s3://bucket/{name}")
        assert len(found) == 3
        assert all(uri.startswith("s3://bucket/") and error for uri, error in found.items())
        for _, data, _ in fetch(list(found)):
            assert data is None
    assert _placed("/etc/x.jpg", "s3://bucket/metadata/metadata_0.parquet", []) == "s3://bucket//etc/x.jpg"
    assert resolve(f"file://{tmp_path}/a.jpg", "/lists/l.csv") == f"{tmp_path}/a.jpg"  # a list of one's own may


def test_where_roots_are_said_nothing_outside_is_read(tmp_path, monkeypatch):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside, tmp_path / "in-between"):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(jpeg())
        (folder / "a.tar").write_bytes(tar_bytes([("a.jpg", jpeg())]))
    (inside / "link.jpg").symlink_to(outside / "a.jpg")
    names = ["a.jpg", "link.jpg", "../out/a.jpg", f"{outside}/a.jpg", f"file://{outside}/a.jpg", "../in-between/a.jpg"]
    names += ["s3://other/a.jpg", f"{outside}/a.tar#member=a.jpg&offset=512&size={len(jpeg())}"]
    (inside / "l.csv").write_text("\n".join(["path", *names, ""]))
    wrong = {"s3://other/a.jpg"}  # there is no such bucket
    asked = []
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda root: asked.append(root))
    monkeypatch.setenv(filesystem.ROOTS, f"{inside},s3://mine/prefix")
    found = errors(inside / "l.csv")
    good = f"{inside}/a.jpg"
    assert found.pop(good) is None
    assert len(found) == 5  # three of the names are one file
    assert all(filesystem.ROOTS in str(error) for error in found.values())
    assert not asked
    monkeypatch.delenv(filesystem.ROOTS)
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda root: pafs.LocalFileSystem())
    assert {uri for uri, error in errors(inside / "l.csv").items() if error} == wrong


def test_devices_and_links_in_tars_are_no_images(tmp_path):
    members = [("ok.jpg", jpeg())]
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
        info = tarfile.TarInfo()
        info.type, info.linkname, info.devmajor, info.devminor = kind, "../../etc/hostname", 1, 5
        members.append((f"{len(members)}.jpg", info))
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    got = list(read_tar(str(tmp_path / "x.tar")))
    assert [r.error is None for r in got] == [True, *[False] * 5]
    assert all("not a regular file" in r.error for r in got[1:])
    # Asked for by a made-up uri, a link has no content either.
    uri = str(TarMember(str(tmp_path / "x.tar"), member="4.jpg", offset=ImageRef.parse(got[4].uri).offset, size=0))
    ((_, data, _),) = fetch([uri])
    assert not data


def test_a_member_beyond_what_an_archive_may_unpack_to_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_UNPACKED_FLOOR", 1 << 16)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(tar_bytes([("1.jpg", jpeg()), ("2.jpg", bytes(4 << 20)), ("3.jpg", jpeg())], "w:gz"))
    near = str(TarMember(str(path), member="1.jpg", offset=512, size=len(jpeg())))
    far = str(TarMember(str(path), member="3.jpg", offset=(4 << 20) + 4096, size=len(jpeg())))
    (_, data, _), (_, none, error) = fetch([near, far])
    assert data == jpeg()
    assert none is None
    assert "bomb" in error


def test_a_plan_unpacks_no_bomb_either(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_UNPACKED_FLOOR", 1 << 16)
    path = tmp_path / "x.tar.gz"
    path.write_bytes(tar_bytes([("1.jpg", jpeg()), ("2.jpg", bytes(4 << 20)), ("3.jpg", jpeg())], "w:gz"))
    recipe = recipes.load(None, ["task.data=photos", f"gallery.data={path}"])
    images, _ = gallery_images(SimpleNamespace(gallery_images=None, recipe=recipe))
    assert images == 1


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_tables, "MAX_UNPACKED_FLOOR", 1 << 16)
    bomb = str(tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [bytes(4 << 20)] * 2}), bomb, compression="zstd")
    assert os.path.getsize(bomb) < (8 << 20) // 100
    assert all("bomb" in error for error in errors(bomb).values())
    assert len(errors(bomb)) == 2
    good = write_parquet(tmp_path / "g.parquet", {"image": [jpeg(i) for i in range(5)], "caption": ["a" * 500] * 5})
    assert not any(errors(good).values())


def test_what_a_dictionary_repeats_is_read_in_small_batches(tmp_path, monkeypatch):
    """64 rows of one value of 64 MiB take its size in the file, and 4 GiB in a batch of them all."""
    sizes = []
    real = parquet_tables.pq.ParquetFile.iter_batches

    def iter_batches(self, size, **options):
        sizes.append(size)
        return real(self, size, **options)

    monkeypatch.setattr(parquet_tables.pq.ParquetFile, "iter_batches", iter_batches)
    monkeypatch.setattr(parquet_tables, "_BATCH_BYTES", 1 << 20)
    value = os.urandom(1 << 18)
    path = write_parquet(tmp_path / "d.parquet", {"image": pa.array([value] * 64, pa.binary())})
    assert os.path.getsize(path) < 2 << 18
    assert [r.data for shard in list_shards(path) for r in read_shard(shard)] == [value] * 64
    assert sizes == [3]


def test_image_bombs_are_refused_wherever_images_are_looked_at(tmp_path):
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "b.png").write_bytes(png_header_bomb())
    uri = str(tmp_path / "d" / "a" / "b.png")
    ((_, data, error),) = fetch([uri])
    with pytest.raises(BadImage, match="too large"):
        decode_image(uri, data, error, max_pixels=10**7)
    crop = f"{uri}#xywh=0,0,4,4"
    with pytest.raises(BadImage, match="too large"):
        decode_image(crop, data, error, max_pixels=10**7)


def test_a_users_own_wrong_address_is_told(monkeypatch):
    with pytest.raises(KtrayError, match="are set in the environment"):
        list_shards("s3://user:hunter22@bucket/folder")
