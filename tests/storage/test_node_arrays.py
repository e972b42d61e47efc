"""Arrays on a node's disk: the rows that were written, whatever happens to the files."""

import hashlib
import threading

import numpy as np
import pytest

from ktray.storage.node_arrays import load_arrays, map_arrays
from ktray.storage.node_cache import NodeCache

KEY = hashlib.sha256(b"a").hexdigest()


class Blocks:
    """Blocks of two arrays; counts how often they are made."""

    def __init__(self, sizes=(3, 0, 5, 1), seed=0):
        rng = np.random.default_rng(seed)
        self.pixels = [rng.integers(0, 256, (n, 3, 4, 5), dtype=np.uint8) for n in sizes]
        self.labels = [rng.normal(size=n).astype(np.float32) for n in sizes]
        self.made = 0

    def __call__(self):
        self.made += 1
        yield from zip(self.pixels, self.labels, strict=True)

    def check(self, found):
        pixels, labels = found
        np.testing.assert_array_equal(pixels, np.concatenate(self.pixels))
        np.testing.assert_array_equal(labels, np.concatenate(self.labels))
        assert (pixels.dtype, labels.dtype) == (np.uint8, np.float32)


def left(folder):
    return sorted(path.name.partition("-")[2] or path.name for path in (folder / "files").iterdir())


def test_blocks_become_arrays_that_are_made_once(tmp_path):
    blocks, cache = Blocks(), NodeCache(tmp_path / "c")
    assert map_arrays(cache, KEY, 2) == []
    for _ in range(2):
        found = map_arrays(cache, KEY, 2, blocks)
        assert all(isinstance(array, np.memmap) for array in found)
        blocks.check(found)
    blocks.check(map_arrays(NodeCache(tmp_path / "c"), KEY, 2))
    assert blocks.made == 1
    assert left(tmp_path / "c") == ["0.npy", "1.npy"]


def test_what_a_process_writes_stays_its_own(tmp_path):
    blocks, cache = Blocks(), NodeCache(tmp_path / "c")
    map_arrays(cache, KEY, 2, blocks)[0][:] = 0
    blocks.check(map_arrays(cache, KEY, 2, blocks))


@pytest.mark.parametrize("sizes", [(10_000,), (9, 99_999)])
def test_the_number_of_rows_may_have_any_length(tmp_path, sizes):
    made = [(np.zeros((n, 2), np.uint8), np.arange(n)) for n in sizes]
    first, second = map_arrays(NodeCache(tmp_path / "c"), KEY, 2, lambda: iter(made))
    assert first.shape == (sum(sizes), 2)
    np.testing.assert_array_equal(second, np.concatenate([np.arange(n) for n in sizes]))


@pytest.mark.parametrize("hurt", ["missing", "short", "empty", "no array"])
def test_a_file_that_is_damaged_is_made_again(tmp_path, hurt):
    blocks, cache = Blocks(), NodeCache(tmp_path / "c")
    map_arrays(cache, KEY, 2, blocks)
    path = tmp_path / "c/files" / f"{KEY}-1.npy"
    data = path.read_bytes()
    path.unlink()
    if hurt != "missing":
        path.write_bytes({"short": data[:-1], "empty": b"", "no array": b"x" * len(data)}[hurt])
    blocks.check(map_arrays(cache, KEY, 2, blocks))
    assert blocks.made == 2


def test_mapped_rows_outlive_their_file(tmp_path):
    blocks, cache = Blocks(), NodeCache(tmp_path / "c", 2000)
    found = map_arrays(cache, KEY, 2, blocks)
    for i in range(10):
        cache.read(hashlib.sha256(str(i).encode()).hexdigest(), lambda: bytes(600))
    assert "0.npy" not in left(tmp_path / "c")
    blocks.check(found)


def test_without_room_there_are_no_arrays_and_nothing_is_left(tmp_path):
    blocks, cache = Blocks((30, 30, 30)), NodeCache(tmp_path / "c", 5000)
    assert map_arrays(cache, KEY, 2, blocks) == []
    assert left(tmp_path / "c") == []
    (tmp_path / "file").write_text("x")
    assert map_arrays(NodeCache(tmp_path / "file"), KEY, 2, blocks) == []


def test_an_error_of_the_blocks_is_raised_and_leaves_nothing(tmp_path):
    def broken():
        yield np.zeros((2, 2)), np.zeros(2)
        raise OSError("the store is away")

    with pytest.raises(OSError, match="the store is away"):
        map_arrays(NodeCache(tmp_path / "c"), KEY, 2, broken)
    assert left(tmp_path / "c") == []


def test_threads_make_them_once(tmp_path):
    blocks, cache, found = Blocks(), NodeCache(tmp_path / "c"), []
    threads = [threading.Thread(target=lambda: found.append(map_arrays(cache, KEY, 2, blocks))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for arrays in found:
        blocks.check(arrays)
    assert blocks.made == 1


@pytest.mark.parametrize(("limit", "mapped"), [(10**6, False), (100, True), (0, True)])
def test_only_what_is_too_large_is_mapped(tmp_path, limit, mapped):
    blocks, cache = Blocks(), NodeCache(tmp_path / "c")
    for _ in range(2):
        found = load_arrays(cache, KEY, 2, blocks, limit)
        blocks.check(found)
        assert [isinstance(array, np.memmap) for array in found] == [mapped] * 2
        assert all(array.flags.writeable for array in found)
    blocks.check(load_arrays(None, KEY, 2, blocks, limit))


def test_without_room_on_disk_it_is_in_memory(tmp_path):
    blocks, cache = Blocks((30, 30, 30)), NodeCache(tmp_path / "c", 5000)
    found = load_arrays(cache, KEY, 2, blocks, 100)
    blocks.check(found)
    assert not any(isinstance(array, np.memmap) for array in found)
