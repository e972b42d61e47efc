"""The watchdog: what blocks for ever ends with the stage, what it waited for and why."""

import threading
import time

import pytest

from ktray.distributed.watchdog import Watchdog, iterate_watched, run_watched, waiting_for, watch
from ktray.errors import KtrayError


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_beat_keeps_a_stage_alive_and_waiting_does_not():
    clock = Clock()
    watchdog = Watchdog("teach", 10, clock=clock)
    clock.now = 590
    watchdog.heartbeat("40 images")
    clock.now = 1180
    watchdog.waits("its tasks")
    watchdog.check()
    clock.now = 1191
    with pytest.raises(
        KtrayError, match=r"^teach: no progress for 10m01s .last: 40 images. while waiting for its tasks"
    ):
        watchdog.check()


def test_work_that_hangs_is_cancelled_and_the_error_says_what_is_free(cluster):
    cancelled = threading.Event()
    watchdog = Watchdog("transfer", 1.2 / 60)
    with watch(watchdog):
        waiting_for("its training workers", "3 times 50 CPUs")
        watchdog.heartbeat("step 7")
        with pytest.raises(KtrayError) as caught:
            run_watched(cancelled.wait, cancelled.set)
    assert cancelled.is_set()
    assert "transfer: no progress for" in caught.value.what
    assert "(last: step 7)" in caught.value.what
    assert caught.value.what.endswith("waiting for its training workers (requested: 3 times 50 CPUs)")
    assert f"of {cluster.total_cpus:g} CPUs on 1 nodes" in caught.value.remedy
    assert "store" not in caught.value.remedy.split("The same command")[0]


def test_a_store_that_does_not_answer_is_named(monkeypatch, cluster):
    monkeypatch.setattr("ktray.distributed.watchdog._ANSWER_S", 0.5)
    never, broken = threading.Event(), OSError("no route to host")

    def refuse():
        raise broken

    for ask, said in ((never.wait, "The store does not answer"), (refuse, "no route to host")):
        clock = Clock()
        watchdog = Watchdog("index", 1, ask, clock)
        clock.now = 61
        with pytest.raises(KtrayError, match=said):
            watchdog.check()
    never.set()


def test_while_it_waits_it_is_told_what_for():
    told = []
    with watch(Watchdog("adapt", 1.0)) as dog:
        dog.idle = told.append
        waiting_for("the teacher's heads")
        run_watched(lambda: time.sleep(2.5), lambda: None)
    assert told
    assert set(told) == {"the teacher's heads"}


def test_what_comes_is_handed_on_in_order_and_each_is_a_beat():
    watchdog = Watchdog("teach", 0.5 / 60)

    def slowly():
        for number in range(4):
            time.sleep(0.2)
            yield number

    with watch(watchdog):
        assert list(iterate_watched(slowly, lambda: pytest.fail("cancelled"))) == [0, 1, 2, 3]
    assert watchdog.silent < 0.5


def test_errors_come_through_and_results_too():
    def fail():
        raise ValueError("planted")

    assert run_watched(lambda: 7, lambda: pytest.fail("cancelled")) == 7
    with pytest.raises(ValueError, match="planted"):
        run_watched(fail, lambda: pytest.fail("cancelled"))


def test_who_stops_early_ends_the_making():
    ended = threading.Event()
    made = []

    def numbers():
        for number in range(1000):
            made.append(number)
            yield number

    for number in iterate_watched(numbers, ended.set):
        if number == 3:
            break
    assert ended.wait(5)
    assert len(made) < 10
