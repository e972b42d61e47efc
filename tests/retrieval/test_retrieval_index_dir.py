"""The folder of the embedded gallery: whole shards only, broken ones named, other encoders refused."""

import threading

import numpy as np
import pytest

from ktray.errors import KtrayError
from ktray.retrieval.index_dir import IndexDir, IndexedShard

FACTS = {"encoder": "abc", "crops": None}


def columns(n, first=0):
    return {
        "uri": np.array([f"/g/{i}.jpg" for i in range(first, first + n)], dtype=str),
        "hash": np.arange(first, first + n, dtype=np.uint64),
    }


@pytest.fixture
def folder(tmp_path):
    made = IndexDir(str(tmp_path / "index"))
    made.settle(FACTS)
    rng = np.random.default_rng(0)
    for shard, sizes in (("aa", (3, 2)), ("bb", (4,))):
        written = [
            made.write_part(f"{shard}-{i:05d}", columns(n), rng.normal(size=(n, 8)).astype(np.float16))
            for i, n in enumerate(sizes)
        ]
        made.finish(IndexedShard(shard, tuple(written), sum(sizes), sum(sizes), source=f"/{shard}.tar"))
    return made


def test_what_was_written_is_read_back(folder):
    whole, broken = folder.shards()
    assert not broken
    assert sorted(whole) == ["aa", "bb"]
    first, second = whole["aa"].parts
    assert (first.rows, second.rows) == (3, 2)
    vectors = folder.embedding(first)
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == np.float16
    assert vectors.shape == (3, 8)
    assert folder.rows(first, ["uri", "hash"])["hash"].tolist() == [0, 1, 2]
    folder.check(first)


def test_a_shard_of_an_older_version_is_read_and_its_file_keeps_its_keys(folder):
    stored = {
        "shard": "dd",
        "source": "/dd.tar",
        "parts": [{"name": "dd-00000", "rows": 2, "files": {".parquet": [7, "0f"]}}],
        "rows": 2,
        "read": 3,
        "bad": [["/dd.tar#x.jpg", "truncated"]],
    }
    found = IndexedShard.from_json(stored)
    assert (found.parts[0].files[".parquet"], found.bad) == ((7, "0f"), (("/dd.tar#x.jpg", "truncated"),))
    folder.finish(found)
    assert folder.read_json("shards/dd.json") == stored


def test_only_what_is_asked_for_is_looked_at(folder):
    whole, _ = folder.shards(["bb", "cc"])
    assert list(whole) == ["bb"]


def test_a_shard_without_summary_does_not_exist(folder):
    folder.write_part("cc-00000", columns(5), None)
    assert sorted(folder.shards()[0]) == ["aa", "bb"]


def test_a_missing_and_a_short_file_are_named_and_can_be_given_up(folder, tmp_path):
    shards = tmp_path / "index" / "shards"
    (shards / "aa-00001.npy").write_bytes((shards / "aa-00001.npy").read_bytes()[:-3])
    (shards / "bb-00000.parquet").unlink()
    whole, broken = folder.shards()
    assert not whole
    assert "aa-00001.npy has" in broken["aa"]
    assert broken["bb"] == "bb-00000.parquet is missing"
    folder.forget("aa")
    assert list(folder.shards()[1]) == ["bb"]


def test_a_summary_that_is_no_json_is_broken_too(folder, tmp_path):
    (tmp_path / "index" / "shards" / "aa.json").write_text("{")
    assert "cannot be read" in folder.shards()[1]["aa"]


def test_changed_bytes_of_equal_length_are_found_by_checksum(folder, tmp_path):
    file = tmp_path / "index" / "shards" / "bb-00000.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (part,) = folder.shards()[0]["bb"].parts
    with pytest.raises(KtrayError, match="checksum differs"):
        folder.check(part)


def test_the_copy_of_the_summaries_says_the_same_and_may_be_broken(folder, tmp_path):
    before = folder.shards()
    folder.copy_summaries()
    copy = tmp_path / "index" / "shards.parquet"
    written = copy.stat().st_mtime_ns
    folder.copy_summaries()
    assert copy.stat().st_mtime_ns == written
    assert folder.shards() == before
    copy.write_bytes(b"PAR1 no")
    assert folder.shards() == before


def test_another_encoder_is_refused_with_the_reason(folder):
    folder.settle(dict(FACTS))
    with pytest.raises(KtrayError, match=r"made with encoder abc instead of xyz.*gallery\.index"):
        folder.settle({**FACTS, "encoder": "xyz"})


def test_on_a_file_system_that_is_not_local_parts_are_read_whole(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(IndexDir, "is_local", False)
    remote = IndexDir(folder.uri)
    (part,) = remote.shards()[0]["bb"].parts
    assert not isinstance(remote.embedding(part), np.memmap)


@pytest.fixture
def remote(s3):
    """An index of 40 shards on S3; the summary of the last one is no JSON."""
    made = IndexDir(f"{s3.home}/index")
    shards = [f"{i:02d}" for i in range(40)]
    for number, shard in enumerate(shards):
        part = made.write_part(f"{shard}-00000", columns(2, number), np.full((2, 4), number, np.float16))
        made.finish(IndexedShard(shard, (part,), 2, 2, source=f"/{shard}.tar"))
    made.write("shards/39.json", b"{")
    return made


def test_the_summaries_of_an_index_on_s3_are_read_together(s3, remote):
    together = threading.Barrier(8, timeout=30)  # broken, so an error, unless eight are under way

    def meet(method, path):
        if method == "GET" and "shards/" in path and path.endswith(".json"):
            together.wait()
        return ""

    s3.fault = meet
    complete, broken = remote.shards()
    assert [shard.source for shard in complete.values()] == [f"/{i:02d}.tar" for i in range(39)]
    assert list(broken) == ["39"]
    assert "cannot be read" in broken["39"]
    some, _ = remote.shards([f"{i:02d}" for i in [5, *range(8, 14), 99, 3]])
    assert list(some) == ["05", "08", "09", "10", "11", "12", "13", "03"]


def test_known_summaries_are_not_read_for_the_copy(s3, remote):
    remote.forget("39")
    complete, _ = remote.shards()
    summaries = []

    def note(method, path):
        if method == "GET" and "/shards/" in path:
            summaries.append(path)
        return ""

    s3.fault = note
    remote.copy_summaries(complete)
    assert remote.shards() == (complete, {})
    assert summaries == []
    remote.delete("shards.parquet")
    remote.copy_summaries({name: complete[name] for name in list(complete)[:30]})
    assert len(summaries) == 9
    assert remote.shards() == (complete, {})


def test_the_parts_of_an_index_on_s3_are_read_together(s3, remote):
    parts = [shard.parts[0] for shard in remote.shards()[0].values()]
    together = threading.Barrier(4, timeout=30)

    def meet(method, path):
        if method == "GET" and path.endswith((".npy", ".parquet")):
            together.wait()
        return ""

    s3.fault = meet
    assert [rows["hash"].tolist() for rows in remote.rows_of(parts[:36], ["hash"])] == [[i, i + 1] for i in range(36)]
    assert [vectors[0, 0] for vectors in remote.embeddings(parts[:36])] == list(range(36))
