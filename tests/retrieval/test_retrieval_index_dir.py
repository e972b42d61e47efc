"""The folder of the embedded gallery: whole shards only, broken ones named, other encoders refused."""

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
