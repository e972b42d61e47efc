"""The copies on a node's disk: what is read must be what was fetched, whatever happens to the folder."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ktray.errors import KtrayError
from ktray.storage import node_cache as module
from ktray.storage.columns import read_rows, read_shards, write_rows
from ktray.storage.node_cache import NodeCache, node_cache
from ktray.storage.store import Dir


def key(name):
    return hashlib.sha256(name.encode()).hexdigest()


def content(name, size=1000):
    return np.random.default_rng(list(name.encode())).bytes(size)


class Source:
    """A store that counts how often each file is read from it."""

    def __init__(self):
        self.read = []

    def of(self, name, size=1000):
        def fetch():
            self.read.append(name)
            return content(name, size)

        return fetch


def held(folder):
    """Names and sizes of the copies, by looking at the disk."""
    return {path.name: path.stat().st_size for path in (folder / "files").iterdir()}


def test_a_file_is_fetched_once(tmp_path):
    source, cache = Source(), NodeCache(tmp_path / "c")
    for _ in range(3):
        assert cache.read(key("a"), source.of("a")) == content("a")
        assert NodeCache(tmp_path / "c").read(key("empty"), source.of("empty", 0)) == b""
    assert source.read == ["a", "empty"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:],
    ],
)
def test_a_damaged_copy_is_fetched_again(tmp_path, damage):
    source, cache = Source(), NodeCache(tmp_path / "c")
    cache.read(key("a"), source.of("a"))
    path = tmp_path / "c/files" / key("a")
    path.write_bytes(damage(path.read_bytes()))
    for _ in range(2):
        assert cache.read(key("a"), source.of("a")) == content("a")
    assert source.read == ["a", "a"]


def lru(sizes, limit, uses, kept):
    """The names in the cache after some uses, by the rule in words: (name, fetched) of each use, and the rest."""
    order, fetched = [], []
    for name in uses:
        if name in order:
            order.remove(name)
        else:
            fetched.append(name)
            if sizes[name] <= limit:
                if sum(sizes[n] for n in order) + sizes[name] > limit:
                    most = min(limit - sizes[name], int(kept * limit))
                    while order and sum(sizes[n] for n in order) > most:
                        order.pop(0)
            else:
                continue
        order.append(name)
    return fetched, set(order)


@pytest.mark.parametrize("seed", range(3))
def test_the_copies_stay_below_the_limit_and_the_least_recently_used_ones_go(tmp_path, seed):
    rng = np.random.default_rng(seed)
    header, limit = module._HEADER.size, 10_000
    names = [f"{seed}-{i}" for i in range(12)]
    data = {name: int(rng.integers(500, 4000)) for name in names[:-1]} | {names[-1]: 20_000}
    uses = [names[i] for i in rng.integers(0, len(names), 80)]
    source, cache = Source(), NodeCache(tmp_path / "c", limit)
    for tick, name in enumerate(uses):
        assert cache.read(key(name), source.of(name, data[name])) == content(name, data[name])
        path = tmp_path / "c/files" / key(name)
        if path.exists():
            os.utime(path, ns=(tick, tick))  # no two uses within the resolution of the clock
        assert sum(held(tmp_path / "c").values()) <= limit
    fetched, left = lru({n: size + header for n, size in data.items()}, limit, uses, module._KEPT)
    assert source.read == fetched
    assert set(held(tmp_path / "c")) == {key(name) for name in left}


def test_without_a_limit_the_copies_leave_as_much_free_as_they_take(tmp_path, monkeypatch):
    disk = 50_000

    def usage(folder):
        used = sum(held(tmp_path / "c").values())
        return SimpleNamespace(free=disk - used)

    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    cache, source = NodeCache(tmp_path / "c"), Source()
    for i in range(80):
        cache.read(key(str(i)), source.of(str(i)))
        assert sum(held(tmp_path / "c").values()) <= disk / 2
    assert sum(held(tmp_path / "c").values()) > 0.8 * disk / 2


def test_what_is_being_written_stays_and_leftovers_of_killed_processes_go(tmp_path):
    source, cache = Source(), NodeCache(tmp_path / "c", 5000)
    cache.read(key("a"), source.of("a"))
    for name in ("fresh.tmp", "old.tmp"):
        (tmp_path / "c/files" / name).write_bytes(bytes(1500))
    os.utime(tmp_path / "c/files/old.tmp", ns=(0, 0))
    for i in range(10):
        cache.read(key(str(i)), source.of(str(i)))
        assert sum(held(tmp_path / "c").values()) <= 5000 + 3000, "the two are noticed when the folder is listed"
    assert "fresh.tmp" in held(tmp_path / "c")
    assert "old.tmp" not in held(tmp_path / "c")
    assert sum(held(tmp_path / "c").values()) <= 5000


@pytest.mark.parametrize("lost", ["", "files", "locks", "used"])
def test_a_folder_that_is_deleted_meanwhile_is_made_again(tmp_path, lost):
    source, cache = Source(), NodeCache(tmp_path / "c")
    cache.read(key("a"), source.of("a"))
    path = tmp_path / "c" / lost
    path.unlink() if path.is_file() else shutil.rmtree(path)
    for _ in range(2):
        assert cache.read(key("a"), source.of("a")) == content("a")
        assert cache.read(key("b"), source.of("b")) == content("b")
    assert source.read.count("b") == 1
    assert source.read.count("a") == (2 if lost in ("", "files") else 1)


def test_the_folder_may_vanish_while_the_file_is_fetched(tmp_path, caplog):
    def fetch():
        shutil.rmtree(tmp_path / "c")
        return content("a")

    assert NodeCache(tmp_path / "c").read(key("a"), fetch) == content("a")


def test_a_full_disk_fails_no_read_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            if len(data) > 100:
                raise OSError(28, "No space left on device")

    def limited(target, mode="r"):
        return Full(open(target, mode)) if isinstance(target, int) else open(target, mode)

    source, cache = Source(), NodeCache(tmp_path / "c")
    monkeypatch.setattr(module, "open", limited, raising=False)
    with caplog.at_level(logging.WARNING, "ktray"):
        for _ in range(2):
            assert cache.read(key("a"), source.of("a")) == content("a")
    assert source.read == ["a", "a"]
    assert held(tmp_path / "c") == {}
    (told,) = caplog.messages
    assert "No space left on device" in told
    assert "KTRAY_CACHE" in told
    monkeypatch.undo()
    cache.read(key("a"), source.of("a"))
    assert cache.read(key("a"), source.of("a")) == content("a")
    assert source.read == ["a", "a", "a"]


def test_a_folder_that_cannot_be_made_or_belongs_to_others_is_not_used(tmp_path, caplog):
    (tmp_path / "file").write_text("x")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    for place in ("file", "open", "link"):
        source, cache = Source(), NodeCache(tmp_path / place)
        for _ in range(2):
            assert cache.read(key("a"), source.of("a")) == content("a")
        assert source.read == ["a", "a"]
    assert list((tmp_path / "open").iterdir()) == []


def test_an_error_of_the_store_is_passed_on_and_not_kept(tmp_path):
    def broken():
        raise OSError("the store is away")

    cache = NodeCache(tmp_path / "c")
    with pytest.raises(OSError, match="the store is away"):
        cache.read(key("a"), broken)
    assert cache.read(key("a"), Source().of("a")) == content("a")


def test_threads_fetch_a_file_once(tmp_path):
    cache, reads = NodeCache(tmp_path / "c"), []

    def fetch():
        reads.append(1)
        time.sleep(0.2)
        return content("a")

    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.read(key("a"), fetch))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content("a")] * 8
    assert reads == [1]


def _reader(folder, log, seed):
    """A process that reads files in random order; each fetch adds a line to a file."""
    cache = NodeCache(Path(folder), 30_000)
    for number in np.random.default_rng(seed).permutation(np.tile(np.arange(20), 5)).tolist():
        name = f"f{number}"

        def fetch(name=name):
            with open(log, "a") as file:
                file.write(f"{name}\n")
            return content(name)

        assert cache.read(key(name), fetch) == content(name)


def test_processes_share_the_copies(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = str(tmp_path / "c"), str(tmp_path / "log")
    workers = [context.Process(target=_reader, args=(*arguments, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    read = (tmp_path / "log").read_text().split()
    assert sorted(read) == sorted(f"f{i}" for i in range(20))
    assert {name.endswith(".tmp") for name in held(tmp_path / "c")} == {False}


def test_shards_on_s3_are_read_once_by_a_node(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("KTRAY_CACHE", str(tmp_path))
    directory, rows = Dir(f"{s3.home}/t"), {"id": np.arange(50), "pixels": np.zeros((50, 3, 4, 4), np.uint8)}
    names = [f"s{i}.parquet" for i in range(5)]
    for name in names:
        write_rows(directory, name, rows)

    def epochs(version, count=3):
        s3.seen.clear()
        for _ in range(count):
            for found in read_shards(directory, names, ["id"], version):
                np.testing.assert_array_equal(found["id"], rows["id"])
        return s3.seen["GET", ""], s3.seen["HEAD", ""]

    assert epochs("1") == (5, 5)
    assert epochs("1") == (0, 0)
    assert epochs("2", 1) == (5, 5), "another version is another file"
    assert epochs("") == (15, 15)
    monkeypatch.setenv("KTRAY_CACHE_BYTES", "0")
    assert epochs("1", 1) == (5, 5)


def test_a_local_store_has_no_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("KTRAY_CACHE", str(tmp_path / "copies"))
    directory = Dir(str(tmp_path / "store"))
    write_rows(directory, "a", {"id": np.arange(3)})
    assert read_rows(directory, "a", version="1")["id"].tolist() == [0, 1, 2]
    assert not (tmp_path / "copies").exists()


def test_the_variables_choose_folder_and_limit(tmp_path):
    cache = node_cache(str(tmp_path), "5000")
    assert (cache.folder, cache.limit) == (tmp_path / f"ktray-cache-{os.getuid()}", 5000)
    assert node_cache(None, None).limit is None
    assert node_cache(None, "0") is None
    with pytest.raises(KtrayError, match="KTRAY_CACHE_BYTES=2GB"):
        node_cache(None, "2GB")
