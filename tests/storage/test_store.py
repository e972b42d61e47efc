import pickle

import pytest

from ktray.errors import KtrayError
from ktray.storage.store import Dir, Stage, Store


def test_write_read_list_delete(tmp_path):
    store = Store(str(tmp_path / "s"))
    store.check_writable()
    stage = store.stage("teach", "k1")
    stage.write("b.bin", b"12")
    stage.write("a/c.txt", b"x")
    stage.append_line("l.jsonl", "1")
    stage.append_line("l.jsonl", "2\n")
    assert stage.read("b.bin") == b"12"
    assert list(stage.names()) == ["b.bin", "l.jsonl"]
    assert stage.read_lines("l.jsonl") == ["1", "2"]
    assert stage.children() == ["a"]
    again = pickle.loads(pickle.dumps(stage))
    assert isinstance(again, Stage)
    assert again.read("a/c.txt") == b"x"
    stage.delete("a")
    stage.delete("a")
    assert not stage.exists("a/c.txt")


def test_stage_is_whole_only_with_manifest_and_all_bytes(tmp_path):
    stage = Store(str(tmp_path)).stage("index", "k")
    stage.write("shard.bin", b"abc")
    assert stage.manifest() is None
    stage.commit({"n": 3})
    manifest = stage.manifest()
    assert manifest is not None
    assert manifest["n"] == 3
    assert manifest["files"] == {"shard.bin": 3}
    (tmp_path / "stages/index/k/shard.bin").write_bytes(b"ab")
    with pytest.raises(KtrayError, match=r"shard\.bin.*missing or incomplete.*Delete"):
        stage.manifest()


def test_a_file_that_is_just_being_written_is_none_of_the_stages(tmp_path):
    stage = Store(str(tmp_path)).stage("teach", "k")
    stage.write("a.bin", b"12345")
    # The ledger's thread writes beside the stage's work: to another name first, which is gone a moment later.
    passing = tmp_path / "stages/teach/k/ledger.jsonl.0123abcd.tmp"
    passing.write_bytes(b"half")
    stage.commit({})
    passing.unlink()
    assert stage.manifest()["files"] == {"a.bin": 5}


def test_store_in_the_place_of_a_file_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KtrayError, match=r"store="):
        Store(str(tmp_path / "file")).check_writable()


def test_dir_local_yields_the_path_itself(tmp_path):
    directory = Dir(str(tmp_path))
    directory.write("x/y.txt", b"1")
    with directory.local("x") as path:
        assert (path / "y.txt").read_bytes() == b"1"


@pytest.mark.parametrize("place", ["file", "file/x/y"])
def test_a_store_below_a_file_is_refused_with_the_key(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(KtrayError, match=rf"store={tmp_path}/{place} cannot be a folder: '{tmp_path}/file' is a file"):
        Store(f"{tmp_path}/{place}").check_writable()
