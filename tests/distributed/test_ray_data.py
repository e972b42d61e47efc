import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.data import Dataset

from ktray.distributed import ray_data
from ktray.distributed.ray_data import cpu_shards, map_numbered, map_shards
from ktray.distributed.watchdog import Watchdog, watch
from ktray.errors import KtrayError
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Dir
from ktray.training import read_windows as read_module
from ktray.training.read_windows import read_windows, stream_windows
from ktray.training.sampler import RowSampler


def columns(n, offset=0):
    rng = np.random.default_rng(offset)
    return {
        "uri": np.array([f"a/ü {i}.jpg" for i in range(offset, offset + n)]),
        "id": np.arange(offset, offset + n),
        "pixels": rng.integers(0, 256, (n, 3, 4, 5), dtype=np.uint8),
        "logits": rng.normal(size=(n, 7)).astype(np.float16),
        "similarity": rng.normal(size=n).astype(np.float32),
    }


@pytest.mark.parametrize("n", [0, 1, 9])
def test_rows_come_back_as_they_were(tmp_path, n):
    directory = Dir(str(tmp_path))
    rows = columns(n)
    write_rows(directory, "s.parquet", rows)
    back = read_rows(directory, "s.parquet")
    assert back.keys() == rows.keys()
    for name, value in rows.items():
        if name == "uri":
            assert [str(u) for u in back[name]] == value.tolist()
        else:
            assert back[name].dtype == value.dtype
            np.testing.assert_array_equal(back[name], value)
    assert list(read_rows(directory, "s.parquet", ["logits"])) == ["logits"]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("hurt", [lambda d: flipped(d, len(d) // 3), lambda d: d[:-9], lambda d: b""])
def test_a_shard_that_is_not_what_was_written_is_named(tmp_path, hurt):
    directory = Dir(str(tmp_path))
    write_rows(directory, "s.parquet", columns(500))
    path = tmp_path / "s.parquet"
    path.write_bytes(hurt(path.read_bytes()))
    with pytest.raises(KtrayError, match=r"s\.parquet' is broken: .*Delete .* and run again"):
        read_rows(directory, "s.parquet")


class Factor:
    """A model for the test, which tells how many were loaded in its process."""

    loaded = 0

    def __init__(self, value, name=""):
        self.value, self.name = value, name

    def load(self):
        Factor.loaded += 1
        return self.value, os.getpid(), Factor.loaded


class Double:
    """The device multiplies; the CPU writes the shard with another column that the device has not seen."""

    reads = ("x",)

    def __init__(self, directory, name=""):
        self.directory, self.model = directory, Factor(2, name)

    def compute(self, model, rows):
        assert rows.keys() == {"x"}
        value, process, loaded = model
        return {"x": rows["x"] * value, "made": np.array([process, loaded])}

    def finish(self, item, rows, computed):
        made = tuple(computed["made"].tolist())
        if self.directory is not None:
            write_rows(self.directory, item["name"], {"x": computed["x"], "y": rows["y"]})
        return {"name": item["name"], "sum": float(rows["x"].sum()), "n": len(rows["x"]), "made": made}


def prepare(item):
    if item.get("fail"):
        raise KtrayError("This shard is broken", "Mend it.")
    if item.get("fault"):
        raise KeyError("a column")
    return {"x": np.arange(item["n"], dtype=np.float32), "y": np.full(item["n"], 7)}


def test_every_shard_is_finished_once_and_written_whole(cluster, tmp_path):
    directory = Dir(str(tmp_path))
    items = [{"name": f"s{i}.parquet", "n": n} for i, n in enumerate([5, 0, 3, 8])]
    found = list(map_shards(items, prepare, Double(directory), cluster))
    assert sorted((s["name"], s["n"], s["sum"]) for s in found) == [
        (i["name"], i["n"], float(sum(range(i["n"])))) for i in items
    ]
    for item in items:
        rows = read_rows(directory, item["name"])
        np.testing.assert_array_equal(rows["x"], 2.0 * np.arange(item["n"]))
        np.testing.assert_array_equal(rows["y"], np.full(item["n"], 7))


def test_an_error_in_a_task_reaches_the_driver_as_one_line(cluster, tmp_path):
    from ktray.distributed.explain import explain

    items = [{"name": "s.parquet", "n": 1, "fail": True}]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Ray decides the wrapper's type
        list(map_shards(items, prepare, Double(Dir(str(tmp_path))), cluster))
    assert explain(caught.value) == "This shard is broken. Mend it."


def test_a_fault_in_a_task_is_told_by_its_own_error(cluster, tmp_path):
    from ktray.distributed.explain import FAULT, exit_code, explain

    items = [{"name": "s.parquet", "n": 1, "fault": True}]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Ray decides the wrapper's type
        list(map_shards(items, prepare, Double(Dir(str(tmp_path))), cluster))
    assert explain(caught.value) == "KeyError: a column (run with --debug to see the traceback)"
    assert exit_code(caught.value) == FAULT


def test_a_process_loads_a_model_once_and_keeps_it_for_the_next_stage(cluster):
    items = [{"name": str(i), "n": 1} for i in range(6)]
    first = list(map_shards(items, prepare, Double(None, "one model"), cluster))
    again = list(map_shards(items, prepare, Double(None, "one model"), cluster))
    other = list(map_shards(items, prepare, Double(None, "another"), cluster))
    loads = [{tuple(s["made"]) for s in found} for found in (first, again, other)]
    assert len({process for process, _ in loads[0]}) == len(loads[0]), "loaded again for a shard of the same stage"
    known = {process for process, _ in loads[0]}
    assert {made for made in loads[1] if made[0] in known} <= loads[0], "loaded again for the next stage"
    assert not loads[2] & (loads[0] | loads[1])


class Patient:
    """Three pieces, of which the last is read once the first has been seen by the driver."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, item):
        yield {"x": np.arange(3)}
        yield {"x": np.arange(4)}
        for _ in range(600):
            if self.seen.exists():
                yield {"x": np.arange(5)}
                return
            time.sleep(0.1)
        raise KtrayError("The first piece did not come", "")


class Told(Double):
    def finish(self, item, rows, computed):
        return {"piece": item["piece"], "of": item.get("pieces"), "n": len(rows["x"])}


def test_a_piece_is_told_while_later_ones_are_read(cluster, tmp_path):
    seen = tmp_path / "seen"
    told = map_shards([{"name": "s"}], Patient(seen), Told(None), cluster)
    assert next(told) == {"piece": 0, "of": None, "n": 3}
    seen.touch()
    assert list(told) == [{"piece": 1, "of": None, "n": 4}, {"piece": 2, "of": 3, "n": 5}]


def both_halves(item, rows):
    """Pieces as they go from a decode task to a device actor, cut out of a larger block on the way."""
    tables = list(ray_data._Prepare(lambda _: iter(rows))(pa.table({"item": [json.dumps(item)]})))
    block = pa.concat_tables(tables)
    return [block.slice(i, 1) for i in range(block.num_rows)]


def test_an_actor_gets_what_a_decode_task_gave():
    rows = [
        {**columns(n), "pair": np.array([], dtype=str).reshape(0, 2), "f": np.ones((2, 6), np.float32)[:, ::2]}
        for n in (2, 0, 5)
    ]
    got = []

    class Keep(Double):
        reads = ()

        def compute(self, model, columns):
            return {}

        def finish(self, item, columns, computed):
            got.append((item, columns))
            return {"n": len(columns["id"])}

    actor = ray_data._Actor(Keep(None), torch.get_num_threads(), ray_data._summary_table)
    told = [json.loads(actor(table)["summary"][0].as_py()) for table in both_halves({"name": "s"}, rows)]
    assert told == [{"n": 2}, {"n": 0}, {"n": 5}]
    assert [item.get("piece") for item, _ in got] == [0, 1, 2]
    assert [item.get("pieces") for item, _ in got] == [None, None, 3]
    for (_, back), sent in zip(got, rows, strict=True):
        assert back.keys() == sent.keys()
        for name, value in sent.items():
            assert back[name].dtype == value.dtype
            assert back[name].flags.writeable
            np.testing.assert_array_equal(back[name], value)


def square(item):
    return {"n": item["n"] ** 2}


def test_cpu_shards(cluster):
    assert sorted(s["n"] for s in cpu_shards([{"n": i} for i in range(5)], square, cluster)) == [0, 1, 4, 9, 16]
    assert list(cpu_shards([], square, cluster)) == []


class Counted:
    """A value that tells how often it was pickled, by a file."""

    def __init__(self, file, values):
        self.file, self.values = file, values

    def __getstate__(self):
        with open(self.file, "a") as log:
            log.write("x")
        return self.__dict__


def weighed(item, counted, factor):
    return {"sum": np.array([counted.values.sum() * factor + item])}


@pytest.mark.parametrize("count", [0, 1, 12])
def test_what_all_calls_share_is_put_into_the_object_store_once(cluster, tmp_path, count):
    shared = Counted(str(tmp_path / "log"), np.arange(300_000))
    found = dict(map_numbered([10 * i for i in range(count)], weighed, cluster, [shared, 2]))
    assert {number: rows["sum"].tolist() for number, rows in found.items()} == {
        i: [2 * int(shared.values.sum()) + 10 * i] for i in range(count)
    }
    log = tmp_path / "log"
    assert (log.read_text() if log.exists() else "") == ("x" if count > 1 else "")


@pytest.mark.parametrize(("slices", "apart"), [(512, False), (3, False), (3, True)])
def test_streamed_batches_equal_resident_ones_and_the_feed_goes_on_after_a_restart(
    cluster, tmp_path, monkeypatch, slices, apart
):
    original, sizes = read_module.ordered, []
    monkeypatch.setattr(read_module, "ordered", lambda rows: sizes.append(len(rows)) or original(rows))
    monkeypatch.setattr(read_module, "SLICES", slices)
    split, coordinators = Dataset.streaming_split, []
    monkeypatch.setattr(Dataset, "streaming_split", lambda self, n: coordinators.append(n) or split(self, n))
    directory = Dir(str(tmp_path))
    shards = []
    for i, n in enumerate([7, 5, 9, 4]):
        write_rows(directory, f"s{i}.parquet", columns(n, offset=100 * i))
        shards.append((f"s{i}.parquet", n))
    names = ["id", "pixels"]

    def feed(reader):
        return RowSampler(shards, reader, batch=4, seed=5, window_rows=10)

    here = list(feed(read_windows(directory, names)).batches(0, 14))
    streamed = list(feed(stream_windows(directory, names, 0.5, apart=apart)).batches(0, 14))
    later = list(feed(stream_windows(directory, names, 0.5, apart=apart)).batches(9, 14))
    assert len(here) == len(streamed) == 14
    for a, b in zip(here, streamed, strict=True):
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_array_equal(a["pixels"], b["pixels"])
    for a, b in zip(here[9:], later, strict=True):
        np.testing.assert_array_equal(a["id"], b["id"])
    assert len(sizes) == 2 if slices == 512 else max(sizes) <= slices + 3, sizes
    # The first dataset of each of the two is scheduled in this process.
    assert len(coordinators) == (len(sizes) - 2 if apart else 0)
    assert slices == 512 or len(sizes) > 3


def test_tasks_that_nobody_has_room_for_end_with_what_was_asked_and_what_is_free(cluster):
    def executors():
        return {thread for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")}

    plan, before = replace(cluster, decode_cpus=50.0), executors()
    with watch(Watchdog("index", 4 / 60)), pytest.raises(KtrayError) as caught:
        list(cpu_shards([{"name": "a"}], lambda item: {}, plan))
    assert caught.value.what.startswith("index: no progress for")
    assert caught.value.what.endswith("while waiting for its tasks (requested: 50 CPUs each)")
    assert f"of {cluster.total_cpus:g} CPUs" in caught.value.remedy
    assert executors() == before, "its tasks would begin once there is room"
