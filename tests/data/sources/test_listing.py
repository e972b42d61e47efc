import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from archives import tar_bytes, write_parquet
from image_zoo import jpeg, write_zoo

from ktray.data import filesystem
from ktray.data.sources.base import fingerprint, spans
from ktray.data.sources.fetch import fetch
from ktray.data.sources.listing import list_shards
from ktray.data.sources.shards import read_shard
from ktray.errors import KtrayError
from ktray.storage import s3 as s3_module


@pytest.fixture
def photos(tmp_path):
    """Nine images at two depths, with clutter between them."""
    root = tmp_path / "photos"
    for i in range(9):
        file = root / ("deep er/ü" if i % 2 else ".") / f"{i}.{'JPG' if i == 4 else 'jpeg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(i))
    (root / "notes.txt").write_text("no image")
    (root / "list.csv").write_text("a\n1\n")
    (root / "._0.jpeg").write_bytes(b"finder")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.jpg").write_bytes(jpeg())
    return root


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """``s3://bucket`` served from a folder."""
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    fake = pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "bucket_filesystem", lambda name: {"s3://bucket": fake}[name])
    return root / "bucket"


def records(spec, **options):
    return [record for shard in list_shards(spec, **options) for record in read_shard(shard)]


def test_folder_is_searched_at_any_depth_sorted_and_without_clutter(photos):
    shards = list_shards(str(photos), rows_per_shard=4)
    assert sum(s.count for s in shards) == 9
    assert all(2 <= s.count <= 8 for s in shards[:-1])
    paths = [p for s in shards for p in s.paths]
    assert paths == sorted(paths)
    expected = {str(p) for p in photos.rglob("*") if p.name[0].isdigit()}
    assert set(paths) == expected
    assert len(paths) == 9
    got = records(str(photos))
    assert {r.uri: r.data for r in got} == {p: Path(p).read_bytes() for p in expected}
    assert not any(r.error for r in got)


def test_shards_are_picklable_and_reproducible(photos):
    first, second = list_shards(str(photos)), list_shards(str(photos) + "/")
    assert first == second == pickle.loads(pickle.dumps(first))
    assert hash(first[0]) == hash(second[0])


def test_fingerprint_follows_names_sizes_and_times_of_that_shard(photos):
    before = list_shards(str(photos), rows_per_shard=4)
    os.utime(photos / "0.jpeg", ns=(5, 5))
    after = list_shards(str(photos), rows_per_shard=4)
    changed = [a.fingerprint != b.fingerprint for a, b in zip(before, after, strict=True)]
    assert changed == [str(photos / "0.jpeg") in s.paths for s in before]
    assert sum(changed) == 1
    (photos / "0.jpeg").rename(photos / "00.jpeg")
    renamed = list_shards(str(photos), rows_per_shard=4)
    assert renamed[0].fingerprint != after[0].fingerprint


def test_a_key_that_comes_or_goes_changes_its_own_group_and_perhaps_a_neighbour():
    keys = [f"/gallery/{i:06d}.jpg" for i in range(20_000)]

    def groups(names):
        return {tuple(names[first:last]) for first, last in spans(names, 100)}

    before = groups(keys)
    assert sum(len(group) for group in before) == len(keys)
    sizes = [len(group) for group in before]
    assert min(sizes) >= 1
    assert max(sizes) <= 200
    assert 80 < len(keys) / len(sizes) < 120
    for at in (0, 777, 10_000, 19_999):
        assert len(before - groups([*keys[:at], "/gallery/new.jpg", *keys[at:]])) <= 3
        assert len(before - groups([*keys[:at], *keys[at + 1 :]])) <= 3
    assert groups([]) == set()


def test_linked_folders_are_reported_and_linked_files_read(photos, tmp_path):
    (photos / "circle").symlink_to(photos)
    (photos / "outside.jpg").symlink_to(photos / "0.jpeg")
    (photos / "nowhere.jpg").symlink_to(photos / "gone.jpeg")
    got = records(str(photos))
    errors = {r.uri.rpartition("/")[2]: r.error for r in got if r.error}
    assert len(got) == 9 + 3
    assert set(errors) == {"circle", "nowhere.jpg"}
    assert "not entered" in errors["circle"]
    assert errors["nowhere.jpg"] == "no such file"


def test_a_name_that_is_no_text_is_reported_by_a_name_that_is(photos):
    try:
        with open(os.fsencode(str(photos)) + b"/caf\xe9.jpg", "wb") as file:
            file.write(jpeg())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (bad,) = [r for r in records(str(photos)) if r.error]
    assert "UTF-8" in bad.error
    bad.uri.encode()
    assert bad.uri.endswith("caf\\udce9.jpg")


def test_zoo_is_read_whole_and_empty_files_too(tmp_path):
    zoo = write_zoo(tmp_path / "zoo")
    got = records(str(tmp_path / "zoo"))
    assert {r.uri.rpartition("/")[2] for r in got} == set(zoo)
    assert all(r.error is None for r in got)


def test_mixed_list_pattern_and_overlap(photos, tmp_path):
    (tmp_path / "b.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    (tmp_path / "a.tgz").write_bytes(tar_bytes([("2.jpg", jpeg())], "w:gz"))
    write_parquet(tmp_path / "x.parquet", {"image": pa.array([jpeg()])})
    spec = [str(tmp_path / "*.t*"), str(photos), str(photos / "**/*.jpeg"), str(tmp_path / "x.parquet")]
    shards = list_shards(spec)
    assert [(s.kind, s.count) for s in shards] == [("files", 9), ("tar", None), ("tar", None), ("parquet", 1)]
    assert [s.paths[0].rpartition("/")[2] for s in shards[1:]] == ["a.tgz", "b.tar", "x.parquet"]
    assert shards == list_shards(spec[::-1])


def test_csv_list_with_captions_and_relative_paths(photos):
    (photos / "list.csv").write_text('caption,path\n"one, two",0.jpeg\n,deep er/ü/1.jpeg\nnone,gone.jpg\n', "utf-8-sig")
    got = records(str(photos / "list.csv"))
    assert [r.caption for r in got] == ["one, two", None, "none"]
    assert [r.error for r in got] == [None, None, "no such file"]
    assert got[1].data == (photos / "deep er/ü/1.jpeg").read_bytes()
    absolute = photos.parent / "other.csv"
    absolute.write_text(f"where\n{photos / '2.jpeg'}\n")
    assert records(str(absolute), column="where")[0].data == jpeg(2)


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_parquet_rows_are_cut_into_shards_without_loss(tmp_path, rows):
    images = [jpeg(i) for i in range(13)]
    path = write_parquet(tmp_path / "x.parquet", {"image": pa.array(images), "text": [f"t{i}" for i in range(13)]}, 4)
    shards = list_shards(path, rows_per_shard=rows)
    assert all(0 < s.count <= rows for s in shards)
    assert sum(s.count for s in shards) == 13
    got = [r for s in shards for r in read_shard(s)]
    assert [r.data for r in got] == images
    assert [r.caption for r in got] == [f"t{i}" for i in range(13)]
    assert [r.uri for r in got] == [f"{path}#row={i}" for i in range(13)]
    assert len({s.fingerprint for s in shards}) == len(shards)


def test_s3_folder_tar_parquet_list_and_pattern(bucket):
    for name in ("a/1.jpg", "a/b c/ü.PNG", "a/.hidden/x.jpg", "a/readme.txt"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(jpeg())
    (bucket / "t.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    (bucket / "t.tar.gz").write_bytes(tar_bytes([("1.jpg", jpeg())], "w:gz"))
    write_parquet(bucket / "x.parquet", {"path": ["a/1.jpg", "s3://bucket/a/b c/ü.PNG"]})
    (bucket / "list.csv").write_text("path\na/1.jpg\n")
    assert [r.uri for r in records("s3://bucket/a/")] == ["s3://bucket/a/1.jpg", "s3://bucket/a/b c/ü.PNG"]
    assert [r.uri for r in records("s3://bucket/**/*.jpg")] == ["s3://bucket/a/1.jpg"]
    assert [r.uri for r in records("s3://bucket/*/*")] == ["s3://bucket/a/1.jpg"]
    for spec, count in (("t.tar", 1), ("*.tar", 1), ("t.tar.gz", 1), ("t.*", 2), ("x.parquet", 2), ("list.csv", 1)):
        got = records(f"s3://bucket/{spec}")
        assert [r.data for r in got] == [jpeg()] * count
        assert all(r.uri.startswith("s3://bucket/") for r in got)
        assert list(fetch([r.uri for r in got])) == [(r.uri, jpeg(), None) for r in got]
    with pytest.raises(KtrayError, match="s3://bucket/gone' does not exist"):
        list_shards("s3://bucket/gone")


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("textt", "does not exist.*Did you mean '.*/texts'"),
        ("empty", "has no images: it is empty"),
        ("texts", r"has no images: it contains 2 x \.txt, 1 x README"),
        ("mixed", "contains 1 image files and 1 tar shards.*pattern"),
        ("*.bmp", "No images match"),
        ("texts/*", "No images match .* it matches only 2 x .txt"),
        ("texts/a.txt", "unsupported file type"),
        ("labels.csv", "no path column, only a, b"),
        ("nothing.csv", "has no rows"),
        ("wide.csv", "more cells than columns in line 2"),
        ("latin.csv", "not CSV in UTF-8"),
        ("labels.parquet", r"no column that is recognised as the image column.*a \(int64\)"),
        ("two.parquet", "several columns of bytes: left, right"),
        ([], "list of image sources is empty"),
    ],
)
def test_errors_say_what_and_how_to_mend_it(tmp_path, spec, what):
    for name in ("empty", "texts", "mixed"):
        (tmp_path / name).mkdir()
    for name in ("texts/a.txt", "texts/b.txt", "texts/README"):
        (tmp_path / name).write_text("")
    (tmp_path / "mixed/a.jpg").write_bytes(jpeg())
    (tmp_path / "mixed/b.tar").write_bytes(tar_bytes([("1.jpg", jpeg())]))
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    (tmp_path / "nothing.csv").write_text("path\n")
    (tmp_path / "wide.csv").write_text("path\n1.jpg,2\n")
    (tmp_path / "latin.csv").write_bytes("path\nü.jpg\n".encode("latin-1"))
    write_parquet(tmp_path / "labels.parquet", {"a": [1]})
    write_parquet(tmp_path / "two.parquet", {"left": pa.array([b""]), "right": pa.array([b""])})
    with pytest.raises(KtrayError, match=what) as caught:
        list_shards(str(tmp_path / spec) if spec else spec)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_wrong_column_names_the_nearest_and_its_type(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"image": pa.array([jpeg()]), "label": [1]})
    with pytest.raises(KtrayError, match=r"no column 'imgae'\. Did you mean 'image'"):
        list_shards(path, column="imgae")
    with pytest.raises(KtrayError, match=r"'label' .* type int64"):
        list_shards(path, column="label")


def test_folder_without_permission(photos, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path) in shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    shut = {str(photos)}
    with pytest.raises(KtrayError, match=r"cannot be listed.*permissions"):
        list_shards(str(photos))
    shut = {str(photos / "deep er")}
    got = records(str(photos))
    assert [r.uri for r in got if r.error] == [str(photos / "deep er")]
    assert len(got) == 6


def test_a_pattern_on_s3_costs_only_its_listing(s3, monkeypatch):
    monkeypatch.setattr(s3_module, "_PAGE", 40)
    for i in range(90):
        filesystem.write_bytes(f"{s3.home}/tars/{i:03d}.tar", b"x" * i)
    filesystem.write_bytes(f"{s3.home}/tars/notes.md", b"")
    pattern = f"{s3.home}/tars/*.tar"
    s3.seen.clear()
    shards = list_shards(pattern)
    assert s3.seen["GET", ""] <= 3 + 2
    assert s3.seen["HEAD", ""] <= 4
    wanted = [filesystem.stat(f"{s3.home}/tars/{i:03d}.tar") for i in range(90)]
    assert [shard.fingerprint for shard in shards] == [fingerprint([file]) for file in wanted]
    assert filesystem.expand_files(pattern) == [(file.path, file) for file in wanted]
    one_by_one = list_shards([file.path for file in wanted])
    assert one_by_one == shards
