import gzip
import io
import tarfile

import pytest
from archives import tar_bytes
from image_zoo import jpeg

from ktray.data.sources import tars
from ktray.data.sources.tars import read_tar
from ktray.data.sources.uris import ImageRef

TEN = [(f"{i:03d}.jpg", jpeg(i, 200, 150)) for i in range(10)]


def write(tmp_path, data, name="x.tar"):
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def split(path):
    got = list(read_tar(path))
    return [r for r in got if r.error is None], [r for r in got if r.error]


def test_a_reader_may_stop_early(tmp_path):
    reading = read_tar(write(tmp_path, tar_bytes(TEN)))
    assert next(reading).data == TEN[0][1]
    reading.close()  # raises RuntimeError where the generator goes on yielding


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_point_at_the_bytes(tmp_path, format):
    names = ["a.jpg", "d/" * 60 + "long.jpg", "ü/spa ce&#.png", "z.jpeg"]
    names = names[:1] + names[2:] if format == tarfile.USTAR_FORMAT else names
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(i))
            archive.addfile(info, io.BytesIO(jpeg(i)))
    path = write(tmp_path, out.getvalue())
    good, bad = split(path)
    assert not bad
    for i, (name, record) in enumerate(zip(names, good, strict=True)):
        ref = ImageRef.parse(record.uri)
        assert (ref.path, ref.member) == (path, name)
        assert out.getvalue()[ref.offset : ref.offset + ref.size] == record.data == jpeg(i)
        assert tars.fetch_members(path, [ref]) == {ref: (jpeg(i), None)}


def test_captions_stand_before_or_after_the_image_of_their_sample(tmp_path):
    members = [
        ("s/1.jpg", jpeg(1)),
        ("s/1.txt", b" after \n"),
        ("s/1.json", b"{}"),
        ("s/2.txt", "vörher".encode()),
        ("s/2.a.png", jpeg(2)),
        ("s/2.b.png", jpeg(3)),
        ("s/3.jpg", jpeg(4)),
        ("t/3.txt", b"another folder"),
        ("s/4.jpg", jpeg(5)),
        ("s/4.txt", b""),
    ]
    good, bad = split(write(tmp_path, tar_bytes(members)))
    assert not bad
    assert [(r.data, r.caption) for r in good] == [
        (jpeg(1), "after"),
        (jpeg(2), "vörher"),
        (jpeg(3), "vörher"),
        (jpeg(4), None),
        (jpeg(5), None),
    ]


def test_unsafe_members_are_reported_and_nothing_is_extracted(tmp_path):
    link, hard, folder = (tarfile.TarInfo() for _ in range(3))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.jpg"
    folder.type = tarfile.DIRTYPE
    members = [
        ("ok.jpg", jpeg()),
        ("folder.jpg", folder),
        ("/abs.jpg", jpeg()),
        ("../up.jpg", jpeg()),
        ("a/../../up.jpg", jpeg()),
        ("link.jpg", link),
        ("hard.jpg", hard),
        ("._ok.jpg", b"finder"),
        ("two..dots.jpg", jpeg(1)),
        ("labels.json", b"{}"),
    ]
    inside = tmp_path / "inside"
    inside.mkdir()
    good, bad = split(write(inside, tar_bytes(members)))
    assert [ImageRef.parse(r.uri).member for r in good] == ["ok.jpg", "two..dots.jpg"]
    reasons = {ImageRef.parse(r.uri).member: r.error for r in bad}
    assert set(reasons) == {"/abs.jpg", "../up.jpg", "a/../../up.jpg", "link.jpg", "hard.jpg"}
    assert "unsafe name" in reasons["/abs.jpg"]
    assert "unsafe name" in reasons["a/../../up.jpg"]
    assert "not a regular file" in reasons["link.jpg"]
    assert all(r.data is None for r in bad)
    assert [p.name for p in inside.iterdir()] == ["x.tar"]
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]


def member_starts(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [m.offset for m in archive]


@pytest.mark.parametrize("kind", ["inside data", "inside header", "between members", "no end mark"])
def test_truncated_tar_gives_what_is_readable_and_one_error(tmp_path, kind):
    data = tar_bytes(TEN)
    start = member_starts(data)[6]
    end = {
        "inside data": start + 512 + 100,
        "inside header": start + 100,
        "between members": start,
        "no end mark": len(data.rstrip(b"\0")) // 512 * 512 + 512,
    }[kind]
    path = write(tmp_path, data[:end])
    good, bad = split(path)
    assert [r.data for r in good] == [d for _, d in TEN[: 10 if kind == "no end mark" else 6]]
    assert len(bad) == 1
    assert bad[0].uri == path
    assert "broken or truncated" in bad[0].error


@pytest.mark.parametrize("kind", ["garbage", "zeros"])
def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path, kind):
    data = bytearray(tar_bytes(TEN))
    start = member_starts(bytes(data))[6]
    data[start : start + 1024] = (b"\xa7" if kind == "garbage" else b"\0") * 1024
    good, bad = split(write(tmp_path, bytes(data)))
    assert len(good) == 6
    assert len(bad) == 1


@pytest.mark.parametrize("data", [b"", b"not a tar" * 200, b"\0" * 5000])
def test_not_a_tar(tmp_path, data):
    good, bad = split(write(tmp_path, data))
    assert not good
    assert len(bad) == (data[:1] != b"\0")  # an archive of zeros is a valid empty one
    missing = list(read_tar(str(tmp_path / "gone.tar")))
    assert [r.error is None for r in missing] == [False]
    assert "no such file" in missing[0].error


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_broken_gzip(tmp_path, damage):
    data = bytearray(gzip.compress(tar_bytes(TEN), mtime=0))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    good, bad = split(write(tmp_path, bytes(data), "x.tgz"))
    assert 0 < len(good) < 10
    assert len(bad) == 1


def test_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_UNPACKED_FLOOR", 1 << 16)
    bomb = tar_bytes([("1.jpg", jpeg()), ("2.jpg", bytes(20 << 20)), ("3.jpg", jpeg())], "w:gz")
    good, bad = split(write(tmp_path, bomb, "x.tar.gz"))
    assert len(good) == 1
    assert "bomb" in bad[-1].error


def test_too_large_member_is_skipped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 10_000)
    good, bad = split(write(tmp_path, tar_bytes([("1.jpg", jpeg()), ("2.jpg", bytes(20_000)), ("3.jpg", jpeg())])))
    assert [ImageRef.parse(r.uri).member for r in good] == ["1.jpg", "3.jpg"]
    assert ImageRef.parse(bad[0].uri).member == "2.jpg"
