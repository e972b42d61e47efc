"""SIGKILL of jobs/index.py and jobs/curate.py: the same command goes on, no shard is lost and none is there twice."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_task import SMALL, picture, write_task

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.pipeline.run import curate_only, index_only
from ktray.retrieval.index_dir import IndexDir

ROOT = Path(__file__).resolve().parents[2]
TARS, A_TAR = 10, 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_task(root / "task")
    rng = np.random.default_rng(5)
    (root / "gallery").mkdir()
    for number in range(TARS):
        with tarfile.open(root / "gallery" / f"{number:02d}.tar", "w") as tar:
            for i in range(A_TAR):
                encoded = io.BytesIO()
                picture(int(rng.integers(0, 3)), rng).save(encoded, "JPEG")
                entry = tarfile.TarInfo(f"{number:02d}{i:03d}.jpg")
                entry.size = encoded.tell()
                encoded.seek(0)
                tar.addfile(entry, encoded)
    return root


def start(job, log, *keys):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    words = [sys.executable, str(ROOT / f"jobs/{job}.py"), *keys]
    return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def kill_when(process, log, ready):
    """SIGKILL as soon as ``ready`` is true; False if the job ended before."""
    limit = time.monotonic() + 300
    while not ready():
        if process.poll() is not None:
            assert process.returncode == 0, Path(log.name).read_text()[-2000:]
            return False
        assert time.monotonic() < limit, Path(log.name).read_text()[-2000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def table(folder):
    """uri to embedding of all whole shards, and how often each uri is there."""
    index, found, count = IndexDir(str(folder)), {}, Counter()
    whole, broken = index.shards()
    assert not broken
    for shard in whole.values():
        for part in shard.parts:
            uris = index.rows(part, ["uri"])["uri"].tolist()
            count.update(uris)
            found.update(zip(uris, index.embedding(part), strict=True))
    return found, count


@pytest.mark.long
def test_a_killed_index_goes_on_by_shard_and_is_no_index_before(world, tmp_path):
    place = tmp_path / "index"
    keys = ["teacher.name=miniverse", f"gallery.data={world / 'gallery'}", f"gallery.index={place}"]
    store = f"store={tmp_path / 'store'}"

    def written(count, what="*.json"):
        return lambda: len(list((place / "shards").glob(what))) >= count

    with open(tmp_path / "log", "w") as log:
        # In the middle of the first shard's files, and after some shards.
        kills = [kill_when(start("index", log, store, *keys), log, when) for when in (written(1, "*"), written(4))]
        assert kills[0], "the job ended before a file of it was seen"
        if all(kills):
            before = len(table(place)[0])
            assert A_TAR <= before < TARS * A_TAR
            alone = [f"store={tmp_path / 'other'}", f"task.data={world / 'task'}", f"gallery.index={place}"]
            with pytest.raises(KtrayError, match="is incomplete"):
                curate_only(recipes.load(None, [*SMALL, *alone, "transfer.size=20"]))
        done = start("index", log, store, *keys)
        assert done.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-2000:]
    found, count = table(place)
    assert len(found) == TARS * A_TAR
    assert set(count.values()) == {1}
    assert not list((place / "unfinished").glob("*"))
    other = [f"store={tmp_path / 'other'}", *keys[:2], f"gallery.index={tmp_path / 'whole'}"]
    index_only(recipes.load(None, other))
    plain, _ = table(tmp_path / "whole")
    assert plain.keys() == found.keys()
    assert all(np.array_equal(plain[uri], found[uri]) for uri in plain)


@pytest.mark.long
def test_a_killed_curate_ends_with_the_same_set(world, tmp_path):
    keys = [*SMALL, f"task.data={world / 'task'}", f"gallery.data={world / 'gallery'}", "transfer.size=60"]
    store = tmp_path / "store"
    with open(tmp_path / "log", "w") as log:
        embedded = lambda: list((store / "stages/curate").glob("*/heldout/*"))  # noqa: E731
        kill_when(start("curate", log, f"store={store}", *keys), log, embedded)
        done = start("curate", log, f"store={store}", *keys)
        assert done.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-2000:]
    (killed,) = (store / "stages/curate").glob("*/transfer.parquet")
    result = curate_only(recipes.load(None, [f"store={tmp_path / 'plain'}", *keys]))
    plain = pq.read_table(result["transfer_set"]["path"])
    assert pq.read_table(killed).column("uri").to_pylist() == plain.column("uri").to_pylist()
