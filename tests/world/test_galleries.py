"""Galleries as they lie: what a folder, a list or an archive of strangers is read as."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import picture

from ktray.data.sources.listing import list_shards
from ktray.data.sources.lists import gallery_shards
from ktray.data.sources.records import MOST_CAPTION
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError


def read(place: Path | str) -> list[tuple[str, str | None, str | None]]:
    """Name, caption and error of each image."""
    records = (record for shard in list_shards(str(place)) for record in read_shard(shard))
    return [(re.split(r"[/=]", record.uri.partition("&")[0])[-1], record.caption, record.error) for record in records]


def tar(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            data = picture(name) if name.endswith("jpg") else f"text of {name}".encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_output_of_img2dataset_as_tars(tmp_path: Path) -> None:
    for i in range(2):
        tar(tmp_path / f"{i:05d}.tar", [f"{i}{k}.{end}" for k in range(3) for end in ("jpg", "json", "txt")])
        pq.write_table(pa.table({"url": ["http://x"], "caption": ["c"]}), tmp_path / f"{i:05d}.parquet")
        (tmp_path / f"{i:05d}_stats.json").write_text("{}")
    found = read(tmp_path)
    assert len(found) == 6
    assert found[0][1:] == ("text of 00.txt", None)


def test_output_of_img2dataset_as_files(tmp_path: Path, put: Callable[..., None]) -> None:
    for i in range(2):
        put(f"{i:05d}", 3)
        pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / f"{i:05d}.parquet")
        put(f"{i:05d}/000.json", b"{}")
        put(f"{i:05d}/000.txt", "ein Hund läuft".encode())
        put(f"{i:05d}/001.txt", b"0 0.51 0.5 0.2 3e-1\n")  # boxes, as for YOLO
    found = read(tmp_path)
    assert [caption for _, caption, _ in found] == ["ein Hund läuft", None, None] * 2


def test_tables_that_are_no_metadata_are_not_left_out(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a", 2)
    pq.write_table(pa.table({"image": [picture("t")]}), tmp_path / "more.parquet")
    with pytest.raises(KtrayError, match=r"2 image files and 1 Parquet files.*Select one type"):
        read(tmp_path)


def test_leftovers_stores_and_names_without_a_suffix(tmp_path: Path, put: Callable[..., None]) -> None:
    put("a", 2)
    put("a/@eaDir", 2)
    put("lost+found", 2)
    put("b/store/stages", 2)
    put("b/store/.ktray-store", b"")
    put("a/photo.HEIC", "JPEG")
    put("a/photo", "PNG")
    put("a/notes.txt", b"\xff\xd8\xff")
    assert sorted(name for name, _, _ in read(tmp_path)) == ["000.jpg", "001.jpg", "photo", "photo.HEIC"]


def test_a_store_can_be_listed_from_inside(tmp_path: Path, put: Callable[..., None]) -> None:
    """The built-in images are in a store."""
    put("store/.ktray-store", b"")
    put("store/miniverse/gallery", 3)
    assert len(read(tmp_path / "store/miniverse/gallery")) == 3
    with pytest.raises(KtrayError, match="no images"):
        read(tmp_path)


@pytest.mark.parametrize("form", ["parquet", "csv", "tar"])
def test_a_long_text_is_cut(tmp_path: Path, put: Callable[..., None], form: str) -> None:
    long = "word " * 5_000
    if form == "parquet":
        table = pa.table({"image": [picture("a"), picture("b")], "text": ["short", long]})
        pq.write_table(table, tmp_path / "g.parquet")
    elif form == "csv":
        put("x", 2)
        (tmp_path / "g.csv").write_text(f"path,caption\nx/000.jpg,short\nx/001.jpg,{long}\n")
    else:
        with tarfile.open(tmp_path / "g.tar", "w") as archive:
            for name, data in (
                ("a.jpg", picture("a")),
                ("a.txt", b"short"),
                ("b.jpg", picture("b")),
                ("b.txt", long.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    captions = [caption for _, caption, _ in read(tmp_path / f"g.{form}")]
    assert captions == ["short", long[:MOST_CAPTION]]


def test_a_long_list_of_a_transfer_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ktray.data import filesystem

    monkeypatch.setattr(filesystem, "MAX_FILE_BYTES", 1000)
    (tmp_path / "l.txt").write_text("".join(f"/x/{i}.jpg\n" for i in range(2000)))
    shards = gallery_shards(None, "auto", str(tmp_path / "l.txt"))
    assert sum(shard.count or 0 for shard in shards) == 2000


def test_a_store_beside_images_on_s3(tmp_path: Path, put: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.fs as pafs

    from ktray.data import filesystem

    put("bucket/d/a", 2)
    put("bucket/d/store/.ktray-store", b"")
    put("bucket/d/store/stages", 2)
    put("bucket/d/store-of-photos", 1)
    fake = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda name: {"s3://bucket": fake}[name])
    assert len(read("s3://bucket/d")) == 3
    assert len(read("s3://bucket/d/store/stages")) == 2
