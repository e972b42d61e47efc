"""Windows as a chain of datasets: the rows of one long dataset, without its start."""

import json
import threading
from itertools import count, islice

import numpy as np
import pytest

from ktray.training import read_windows as module
from ktray.training.messages import BadImages
from ktray.training.read_slices import slice_table
from ktray.training.read_windows import _StreamReader, group_windows
from ktray.training.sampler import Slice


class Dataset:
    """Stands for a dataset of Ray Data: computes an item when its batch is asked for."""

    def __init__(self, rows, log):
        self.items, self.log = [json.loads(row["item"]) for row in rows], log
        log.append(("made", len(self.items)))

    def iter_batches(self, **_):
        for item in self.items:
            self.log.append(("read", item["shard"]))
            if item["shard"] == "broken":
                raise OSError("this shard is broken")
            rows = {"id": 100 * int(item["shard"]) + np.arange(item["rows"])[item["start"] :: item["step"]]}
            if item["shard"] in ("3", "7"):
                rows["bad"] = np.array([["3.png", "empty"]])
            yield slice_table(item, rows)


@pytest.fixture
def chained(monkeypatch):
    """A function that makes a reader, and the log of its datasets."""
    log: list[tuple[str, object]] = []
    monkeypatch.setattr(module, "ordered", lambda rows: Dataset(rows, log))

    def make(slices, report=None):
        return _StreamReader(lambda dataset: dataset, report, slices)

    return make, log


def windows(*sizes):
    shard = count()
    return [[Slice(str(next(shard)), 6, i % 2, 2) for i in range(size)] for size in sizes]


@pytest.mark.parametrize("slices", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("sizes", [[], [1], [3], [1, 1, 1], [2, 3, 1, 4, 2, 2], [5, 1, 7]])
def test_a_chain_reads_what_one_dataset_would(chained, slices, sizes):
    make, log = chained
    asked = windows(*sizes)
    found = [rows["id"].tolist() for rows in make(slices)(iter(asked))]
    wanted = [[100 * int(s.shard) + row for s in window for row in range(s.start, s.rows, s.step)] for window in asked]
    assert found == wanted
    assert sorted(int(shard) for what, shard in log if what == "read") == [int(s.shard) for w in asked for s in w]
    made = [size for what, size in log if what == "made"]
    assert made == [sum(map(len, group)) for group in group_windows(asked, slices)]


def test_groups_have_whole_windows_and_few_slices():
    groups = list(group_windows(windows(2, 3, 1, 9, 2, 2, 1), 4))
    assert [[len(window) for window in group] for group in groups] == [[2, 3], [1, 9], [2, 2], [1]]


def test_an_endless_schedule_starts(chained):
    make, log = chained
    endless = ([Slice(str(number), 4)] for number in count())
    found = list(islice(make(3)(endless), 8))
    assert [rows["id"][0] for rows in found] == [100 * n for n in range(8)]
    made = sum(size for what, size in log if what == "made")
    assert made <= 12, "no more than a dataset ahead"


def test_the_next_dataset_starts_while_the_last_window_is_read(chained, monkeypatch):
    make, log = chained
    begun = threading.Event()
    original = module.ordered

    def ordered(rows):
        dataset = original(rows)
        if len([1 for what, _ in log if what == "made"]) == 2:
            begun.set()
        return dataset

    monkeypatch.setattr(module, "ordered", ordered)
    read = make(4)(windows(2, 2, 2, 2))
    next(read)
    assert not begun.is_set(), "two datasets would share the machine"
    next(read)
    assert begun.wait(30)
    assert [rows["id"][0] for rows in read] == [400, 600]


def test_an_error_of_a_later_dataset_is_raised(chained):
    make, _ = chained
    asked = [*windows(1, 1, 1), [Slice("broken", 4)]]
    read = make(1)(asked)
    assert [len(next(read)["id"]) for _ in range(3)] == [3, 3, 3]
    with pytest.raises(OSError, match="this shard is broken"):
        next(read)


def test_a_bad_image_is_reported_once_by_the_whole_chain(chained):
    make, _ = chained
    told = []
    for rows in make(1, told.append)(windows(*[1] * 9)):
        assert list(rows) == ["id"]
    assert told == [BadImages((("3.png", "empty"),))]
