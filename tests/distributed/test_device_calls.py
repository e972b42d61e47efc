"""Calls of device workers whose process dies, or that are not there, on the shared Ray without GPUs."""

import os
from functools import partial
from pathlib import Path

import pytest
import ray

from ktray.distributed import device_calls
from ktray.distributed.device_calls import first_result, map_on_workers, present
from ktray.distributed.device_workers import BorrowedWorker, _end, _start
from ktray.errors import ResourceError


@pytest.fixture
def worker(cluster):
    """Starts workers that end with the test. One that needs a GPU is like one whose machine is gone: it never runs."""
    made = []

    def start(gpus=0.0):
        made.append(BorrowedWorker(_start(0.0, gpus), 1))
        return made[-1]

    yield start
    _end([each.actor for each in made])


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(device_calls, "PATIENCE_S", 1.0)
    monkeypatch.setattr(device_calls, "_PROBE_S", 1.0)
    monkeypatch.setattr(device_calls, "_gone", {})


def call(function, item):
    """A call for `first_result`."""
    reference = ray.put(ray.cloudpickle.dumps(function))
    return lambda to: to.apply(str(id(function)), [reference], item, [])


def dying(folder, times, item):
    """Ends its process the first ``times`` times for the item 1, and otherwise gives 10 times the item."""
    deaths = len(list(Path(folder).iterdir()))
    if item == 1 and deaths < times:
        (Path(folder) / str(deaths)).touch()
        os._exit(1)
    return 10 * item


@pytest.mark.parametrize("times", [1, 3])
def test_lost_calls_are_made_again(worker, tmp_path, times, caplog):
    one = worker()
    assert first_result([one], 7, call(partial(dying, str(tmp_path), times), 1), "the item") == 10
    assert len(list(tmp_path.iterdir())) == times
    assert f"a device worker was lost (ActorUnavailableError) during the item; it is started again ({times} of" in (
        caplog.text
    )


def test_all_items_have_their_results_once_although_a_process_dies(worker, tmp_path):
    workers = [worker(), worker()]
    found = list(map_on_workers(workers, [0, 1, 2, 3, 4], partial(dying, str(tmp_path), 2)))
    assert sorted(found) == [(item, 10 * item) for item in range(5)]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_item_that_always_kills_ends_the_stage(worker, tmp_path):
    one = worker()
    with pytest.raises(ResourceError, match=r"died 4 times during item 1 of 1 \(it computes 2 items at a time\)"):
        list(map_on_workers([one], [1], partial(dying, str(tmp_path), 99)))
    with pytest.raises(ResourceError, match=r"died 4 times during the item .*too little memory"):
        first_result([one], 0, call(partial(dying, str(tmp_path), 99), 1), "the item")


def test_an_error_of_the_work_is_no_loss(worker):
    with pytest.raises(ValueError, match="invalid literal"):
        first_result([worker()], 0, call(int, "x"), "the item")
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_on_workers([worker()], ["1", "x"], int))


def test_another_worker_takes_the_calls_of_one_that_is_gone(worker, hasty):
    gone, there = worker(gpus=1.0), worker()
    ray.get(there.probe())
    assert present([gone, there]) == [there]
    assert first_result([gone, there], 0, call(str, 5), "the item") == "5"
    assert list(device_calls._gone) == [gone]
    device_calls.PATIENCE_S = 1e6  # the next call does not wait for it
    assert first_result([gone, there], 0, call(str, 6), "the item") == "6"


def test_items_of_a_worker_that_is_gone_are_done_by_the_others(worker, hasty):
    workers = [worker(gpus=1.0), worker()]
    assert sorted(map_on_workers(workers, list(range(7)), str)) == [(i, str(i)) for i in range(7)]


def test_a_worker_that_answers_again_gets_its_calls_again(worker, hasty):
    first, second = worker(), worker()
    device_calls._gone[first] = first.probe()
    ray.wait([device_calls._gone[first]])
    first_result([first, second], 0, call(str, 5), "the item")
    assert not device_calls._gone
