"""Against moto through a proxy that fails: `faulty_s3`."""

import pickle
import threading

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from ktray.data import filesystem
from ktray.errors import KtrayError
from ktray.storage import s3 as module
from ktray.storage import s3_files
from ktray.storage.concurrent import AT_ONCE
from ktray.storage.retry import retry_for
from ktray.storage.store import Dir, Store

MORE = 3


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_what_a_busy_store_refuses_is_asked_again(s3, fault, capsys):
    folder = Dir(f"{s3.home}/a b")
    for call in (
        lambda: folder.write("x/ü 1", b"12"),
        lambda: folder.write("x/2", b"3"),
        lambda: folder.read("x/ü 1") == b"12" or pytest.fail("read"),
        lambda: folder.exists("x/2") or pytest.fail("exists"),
        lambda: folder.names() == {} or pytest.fail("names"),
        lambda: folder.children() == ["x"] or pytest.fail("children"),
        lambda: folder.delete("x/2"),
    ):
        s3.first(MORE, fault)
        call()
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 2, "once that it waits, once that it need not any more"
        assert "s3://ktray-test is busy or unreachable" in told[0]
        assert "answers again" in told[1]
    assert folder.sub("x").names() == {"ü 1": 2}


def test_a_read_goes_on_where_it_stood(s3, tmp_path):
    path = f"{s3.home}/t.parquet"
    table = pa.table({"x": list(range(1000))})
    filesystem.write_bytes(path, b"")
    fs, inside = filesystem.locate(path)
    pq.write_table(table, inside, filesystem=fs, row_group_size=100)
    with filesystem.open_random(path) as stream, pq.ParquetFile(stream) as file:
        for group in range(10):
            s3.first(MORE, "503", "GET")
            assert file.read_row_group(group)["x"].to_pylist() == list(range(group * 100, group * 100 + 100))
    with filesystem.open_stream(path) as stream:
        begin = stream.read(4)
        s3.first(MORE, "reset", "GET")
        assert begin + stream.read() == filesystem.read_bytes(path)


@pytest.mark.parametrize("size", [0, 1, 1999, 2000, 2001, 9999])
def test_a_large_read_is_made_of_parts(s3, size, monkeypatch):
    monkeypatch.setattr(s3_files, "_PART", 1000)
    folder, data = Dir(s3.home), bytes(range(250)) * 40
    folder.write("a", data[:size])
    s3.seen.clear()
    assert folder.read("a") == data[:size]
    assert s3.seen["GET", ""] == (0 if not size else 1 if size < 2000 else -(-size // 1000))
    s3.first(MORE, "503", "GET")
    assert folder.read("a") == data[:size]
    with filesystem.open_random(f"{folder.uri}/a") as stream:
        stream.seek(min(7, size))
        assert stream.read(3000) + stream.read() == data[7:size]


def test_the_parts_of_a_read_are_requested_together(s3, monkeypatch):
    monkeypatch.setattr(s3_files, "_PART", 1000)
    folder = Dir(s3.home)
    folder.write("a", bytes(8000))
    together = threading.Barrier(8, timeout=30)  # broken, so an error, unless eight are under way at the same time

    def meet(method, path):
        if method == "GET":
            together.wait()
        return ""

    s3.fault = meet
    assert folder.read("a") == bytes(8000)


def test_an_answer_that_is_late_is_waited_for(s3):
    folder = Dir(s3.home)
    s3.slow_s = 4.0  # pyarrow's own limit is three
    s3.first(1, "slow", "PUT")
    folder.write("a", b"1")
    assert folder.read("a") == b"1"
    assert s3.seen["PUT", "slow"] == 1
    assert s3.seen["PUT", ""] == 0, "it was asked twice"


def test_a_request_whose_answer_was_lost_counts_once(s3):
    folder = Dir(s3.home)
    assert folder.exclusive
    s3.first(MORE, "lost", "PUT")
    assert folder.create("a", b"mine") is True
    assert folder.create("a", b"yours") is False
    s3.first(MORE, "lost", "DELETE")
    folder.delete("a")
    assert not folder.exists("a")


def test_patience_ends_with_the_reason(s3):
    folder = Dir(s3.home)
    s3.fault = "503"
    with retry_for(0.3), pytest.raises(KtrayError, match=r"ktray-test has not answered for .*SLOW_DOWN"):
        folder.write("a", b"1")


def test_what_is_wrong_for_good_is_not_asked_again(s3):
    folder = Dir(s3.home)
    assert folder.exclusive in (True, False)
    s3.seen.clear()
    with pytest.raises(FileNotFoundError):
        folder.read("none")
    assert sum(s3.seen.values()) <= 3
    with pytest.raises(KtrayError, match=r"cannot be written.*AWS_ENDPOINT_URL"):
        Store("s3://ktray-none/x").check_writable()
    with pytest.raises(KtrayError, match="not a valid bucket name"):
        Dir("s3:///x")
    for address in ("s3://user:secret@ktray-test/x", "s3://ktray-test/x?endpoint_override=http://127.0.0.1:9"):
        with pytest.raises(KtrayError, match="from AWS_") as raised:
            Store(address)
        assert "secret" not in str(raised.value)


def test_the_remedy_for_a_store_without_the_newer_checksums_is_told(s3):
    s3.fault = lambda method, path: "411" if method == "PUT" else ""
    with pytest.raises(KtrayError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        Store(s3.home).check_writable()


def test_listings_come_in_pages(s3, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 7)
    folder = Dir(f"{s3.home}/g")
    wanted = {f"{'ab'[i % 2]}/{i:02d}.jpg": i for i in range(20)}
    for name, size in wanted.items():
        folder.write(name, b"x" * size)
    s3.seen.clear()
    listed = filesystem.walk(folder.uri)
    first = next(listed)
    assert s3.seen["GET", ""] == 1, "more than a page was asked for before the first name was out"
    found = [first, *listed]
    assert {f.path.removeprefix(f"{folder.uri}/"): f.size for f in found} == wanted
    assert s3.seen["GET", ""] == 3
    assert folder.children() == ["a", "b"]
    assert len(folder.sub("a").names()) == 10
    # As pyarrow tells it, by which galleries made before are known.
    inner = module.handler(folder.fs).inner
    told = inner.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    assert {(f"s3://{i.path}", i.size, i.mtime_ns) for i in told if i.type == pafs.FileType.File} == {
        (f.path, f.size, f.mtime_ns) for f in found
    }
    assert {filesystem.stat(f.path) for f in found} == set(found)


def test_a_stage_of_many_files_is_checked_by_its_listing(s3, monkeypatch):
    monkeypatch.setattr(module, "_PAGE", 50)
    stage = Store(s3.home).stage("teach", "k")
    for i in range(120):
        stage.write(f"{'ab'[i % 2]}/{i}", b"x" * i)
    stage.commit({"n": 1})
    s3.seen.clear()
    assert len(stage.manifest()["files"]) == 120
    assert s3.seen["HEAD", ""] <= 2
    assert s3.seen["GET", ""] <= 1 + 3 + 1, "the manifest, and the pages of the listing"
    stage.write("a/2", b"x")
    with pytest.raises(KtrayError, match=r"a/2' is missing or incomplete \(it should have 2 bytes and has 1\)"):
        stage.manifest()
    stage.delete("a/2")
    with pytest.raises(KtrayError, match=r"a/2' is missing or incomplete \(it should have 2 bytes and does not exist"):
        stage.manifest()


def test_many_small_files_are_read_together_and_in_order(s3):
    folder = Dir(s3.home)
    names = [f"{i}.json" for i in range(2 * AT_ONCE)]
    for i, name in enumerate(names):
        folder.write_json(name, {"i": i})
    together = threading.Barrier(AT_ONCE, timeout=30)  # broken, so an error, unless so many are under way

    def meet(method, path):
        if method == "GET":
            together.wait()
        return ""

    s3.fault = meet
    assert [read["i"] for read in folder.read_each_json(names)] == list(range(len(names)))
    s3.fault = ""
    folder.delete("7.json")
    with pytest.raises(FileNotFoundError):
        list(folder.read_each_json(names))


def test_large_files_and_folders_travel_both_ways(s3, tmp_path, monkeypatch):
    (tmp_path / "c/d").mkdir(parents=True)
    large = bytes(range(256)) * (12 << 12)  # more than a part
    (tmp_path / "c/large").write_bytes(large)
    (tmp_path / "c/d/small").write_bytes(b"1")
    folder = Dir(s3.home)
    s3.first(MORE, "503", "PUT")
    folder.put(tmp_path / "c", "k")
    assert folder.sub("k").names() == {"large": len(large)}
    s3.first(MORE, "reset", "GET")
    with folder.local("k") as path:
        assert (path / "large").read_bytes() == large
        assert (path / "d/small").read_bytes() == b"1"
    with folder.local("k/d/small") as path:
        assert path.read_bytes() == b"1"


def test_the_file_system_travels_with_its_patience(s3):
    folder = Dir(s3.home)
    fs = pickle.loads(pickle.dumps(folder.fs))
    assert fs == folder.fs
    s3.first(MORE, "503")
    with fs.open_output_stream(f"{folder.path}/a") as stream:
        stream.write(b"1")
    assert folder.read("a") == b"1"


def test_the_server_for_s3_alone_goes_first(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    Dir(s3.home).write("a", b"1")
    assert s3.seen["PUT", ""] == 1
