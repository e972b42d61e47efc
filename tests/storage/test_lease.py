import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from heard import hearing

from ktray.storage import lease as module
from ktray.storage.lease import Lease, LeaseLost, lives, process
from ktray.storage.store import Dir, Stage


@pytest.fixture(params=["local", "s3"])
def stage(request, tmp_path):
    return Stage(request.getfixturevalue("s3").home if request.param == "s3" else str(tmp_path / "stage"))


@pytest.fixture
def quick(monkeypatch):
    """Short pauses; what is stale is left as it is."""
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    monkeypatch.setattr(module, "REFRESH_S", 0.1)


def silent(stage):
    """A holder that has stopped giving signs of life, and has not noticed."""
    holder = Lease(stage)
    holder.acquire()
    holder._stop.set()
    holder._keeper.join()
    return holder


def at_once(*calls):
    """Run calls in threads that start together; their results, or what they raised."""
    barrier, out = threading.Barrier(len(calls)), [None] * len(calls)

    def work(i):
        barrier.wait(60)
        try:
            out[i] = calls[i]()
        except Exception as error:
            out[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_one_of_many_that_create_the_same_file_succeeds(stage):
    for round in range(5):
        made = at_once(*[lambda i=i, r=round: stage.create(f"f{r}", str(i).encode()) for i in range(8)])
        assert sorted(made) == [False] * 7 + [True]
        assert stage.read(f"f{round}") == str(made.index(True)).encode()
    assert sorted(stage.names()) == [f"f{i}" for i in range(5)]


def test_threads_have_the_lease_one_at_a_time(stage, quick):
    inside, most, turns = [], [], []

    def work():
        for _ in range(2):
            with stage.lease():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)
                inside.pop()
                turns.append(1)

    assert at_once(*[work] * 4) == [None] * 4
    assert max(most) == 1
    assert len(turns) == 8


def _add(uri, times):
    module._POLL_S = 0.02
    stage = Stage(uri)
    for _ in range(times):
        with stage.lease():
            stage.append_line("count", "1")  # read, then write


def test_processes_have_the_lease_one_at_a_time(stage):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(stage.uri, 4)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert stage.read_lines("count") == ["1"] * 8


def test_a_holder_that_was_taken_over_cannot_declare_the_stage_whole(stage, quick, monkeypatch):
    first = silent(stage)
    monkeypatch.setattr(module, "STALE_S", 0.3)
    second = Lease(stage)
    second.acquire()
    stage.write("a", b"123")
    with pytest.raises(LeaseLost, match="taken over"):
        stage.commit({"by": "first"}, first)
    assert stage.manifest() is None
    first.release()  # takes nothing from the second
    stage.commit({"by": "second"}, second)
    second.release()
    assert stage.manifest() == {"by": "second", "files": {"a": 3}}


def test_a_holder_finds_out_that_it_was_taken_over(stage, quick, monkeypatch):
    first = silent(stage)
    monkeypatch.setattr(module, "STALE_S", 0.3)
    with stage.lease():
        first._stop.clear()
        first._keep()  # comes back
        with pytest.raises(LeaseLost):
            first.check()
    with pytest.raises(LeaseLost) as raised, stage.lease() as third:  # noqa: PT012
        third.lost.set()
        raise FileNotFoundError("what two jobs in one folder come to")
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_of_an_end_and_a_take_over_at_once_one_succeeds(stage, quick):
    for round in range(8):  # which of them wins is chance
        home = Stage(f"{stage.uri}/{round}")
        first, second = silent(home), Lease(home)
        taken = {"owner": second.owner, **process()}
        ended, took = at_once(
            partial(first.publish, "manifest.json", {"by": 1}), partial(second._append, first._number + 1, taken)
        )
        if isinstance(ended, LeaseLost):
            assert took is True
            assert home.manifest() is None
        else:
            assert (ended, took) == (None, False)
            assert home.manifest() == {"by": 1}


def test_what_a_holder_ended_before_it_died_is_written_by_the_next(stage, quick):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    mine = {**process(), "pid": dead.pid, "born": "1"}
    dead.wait()
    record = {"owner": "x", **mine, "file": "manifest.json", "content": {"n": 5}}
    assert stage.sub("lease").create("00000003.json", json.dumps(record).encode())
    with stage.lease():
        assert stage.manifest() == {"n": 5}


class Clock:
    """Time that passes by sleeping; the wall clock jumps about. ``then`` is called after each sleep."""

    def __init__(self, then):
        self.now, self.then = 100.0, then

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 * (1 + int(self.now * 7) % 3)

    def sleep(self, seconds):
        self.now += seconds
        self.then(self)


def foreign(stage):
    """A holder on another machine."""
    record = {"owner": "far", "host": "far", "boot": "other", "space": "other", "pid": os.getpid(), "born": ""}
    folder = stage.sub("lease")
    folder.write_json("00000001.json", record)
    folder.write("beat-far", b"0")
    return folder


def test_a_live_holder_keeps_its_lease_whatever_the_clocks_say(tmp_path, monkeypatch):
    stage = Stage(str(tmp_path))
    folder = foreign(stage)

    def then(clock):
        if clock.now > 1100:
            folder.create("00000002.json", b'{"free": true}')
        elif int(clock.now) % 40 == 0:
            folder.write("beat-far", str(clock.now).encode())

    clock = Clock(then)
    monkeypatch.setattr(module, "time", clock)
    with stage.lease():
        assert clock.now > 1100


def test_a_dead_holder_is_waited_for_once_whatever_the_clocks_say(tmp_path, monkeypatch):
    stage = Stage(str(tmp_path))
    foreign(stage)
    clock = Clock(lambda clock: None)
    monkeypatch.setattr(module, "time", clock)
    told = []
    with hearing(told), stage.lease():
        assert module.STALE_S < clock.now - 100 < module.STALE_S + 5
    assert len(told) == 1
    assert "host far" in told[0]


def test_time_that_the_waiting_job_itself_was_stopped_does_not_count(tmp_path, monkeypatch):
    stage = Stage(str(tmp_path))
    folder = foreign(stage)
    stopped = []

    def then(clock):
        if clock.now > 4000:
            folder.create("00000002.json", b'{"free": true}')
        elif clock.now > 120 and not stopped:
            stopped.append(True)
            clock.now += 3600
            clock.then = lambda clock: (folder.write("beat-far", b"1"), setattr(clock, "then", then))

    clock = Clock(then)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "STALE_S", 300.0)
    with stage.lease():
        assert clock.now > 4000


def test_a_process_is_known_by_boot_space_and_birth():
    me = process()
    assert lives(me) is True
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert lives({**me, "pid": dead.pid}) is False
    if me["born"]:
        assert lives({**me, "born": "12345"}) is False, "the number was given to another process"
    for other in ("boot", "space"):  # a container of the same name; the machine after its restart
        assert lives({**me, other: "another", "pid": dead.pid}) is None
        assert lives({**me, other: "another"}) is None


def _hold(uri, ready):
    with Stage(uri).lease():
        ready.set()
        time.sleep(60)


def test_a_killed_process_is_taken_over_at_once(tmp_path):
    stage = Stage(str(tmp_path))
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(stage.uri, ready))
    holder.start()
    assert ready.wait(60)
    assert Lease(stage).acquire(wait=False) is False
    told, got = [], threading.Event()

    def take():
        with hearing(told), stage.lease():
            got.set()

    waiter = threading.Thread(target=take)
    waiter.start()
    while not told:
        time.sleep(0.05)
    assert "another job" in told[0]
    assert f"pid {holder.pid}" in told[0]
    assert not got.is_set()
    os.kill(holder.pid, 9)
    holder.join()
    assert got.wait(module.STALE_S / 2)
    waiter.join()
    names = sorted(stage.sub("lease").names())
    assert not any(name.startswith("beat") for name in names)
    assert stage.sub("lease").read_json(names[-1])["free"] is True


@pytest.mark.parametrize("how", ["ignored", "refused"])
def test_stores_without_conditional_writes_are_told_and_have_the_weaker_way(s3, quick, monkeypatch, how):
    monkeypatch.setattr(module, "_warned", [])
    if how == "ignored":
        s3.hide = {"if-none-match"}
    else:
        s3.fault = lambda method, path: "501" if method == "PUT" and ".probe-" in path else ""
    stage, told, inside, most = Stage(s3.home), [], [], []

    def work():
        with stage.lease():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    with hearing(told):
        assert at_once(work, work) == [None, None]
    assert max(most) == 1
    assert sum("no conditional writes" in text or "without conditional writes" in text for text in told) == 1


def test_a_lease_lives_through_a_store_that_fails(s3, quick):
    stage = Stage(s3.home)
    with stage.lease() as mine:
        s3.first(12, "503")
        stage.write("a", b"1")
        s3.first(5, "lost", "PUT", "/lease/0")
        stage.commit({"n": 1}, mine)
        s3.first(6, "reset")
    assert stage.manifest() == {"n": 1, "files": {"a": 1}}
    assert Lease(stage).acquire(wait=False) is True


def test_without_hard_links_the_lease_works_too(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = Dir(str(tmp_path))
    assert sorted(at_once(*[lambda i=i: folder.create("a", b"%d" % i) for i in range(6)])) == [False] * 5 + [True]
    with Stage(str(tmp_path)).lease():
        assert Lease(Stage(str(tmp_path))).acquire(wait=False) is False
