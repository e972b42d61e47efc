"""Jobs at once: order, how many at a time, errors; and shares of a cluster that cannot deadlock."""

import threading

import pytest

from ktray.distributed.allocation import allocate
from ktray.errors import KtrayError
from ktray.jobs.compare.parallel import how_many, run_all, share


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_keep_the_order_of_the_jobs(at_once):
    assert run_all([lambda i=i: i * i for i in range(10)], at_once) == [i * i for i in range(10)]


def test_jobs_run_beside_each_other():
    together = threading.Barrier(3)  # passes only if three are in it at once
    assert run_all([lambda: together.wait(20) >= 0] * 6, 3) == [True] * 6


def test_after_an_error_no_job_is_begun_and_those_that_run_end():
    begun, ended, go = [], [], threading.Event()

    def bad():
        begun.append("bad")
        go.set()
        raise KtrayError("no")

    def good():
        begun.append("good")
        go.wait(20)
        ended.append("good")

    with pytest.raises(KtrayError, match="no"):
        run_all([good, bad, *[good] * 5], 2)
    assert begun.count("bad") == 1
    assert 1 <= begun.count("good") == len(ended) < 6


def test_auto_gives_each_worker_a_core_and_memory_and_says_so():
    count, why = how_many("auto", allocate(2, 0, 1, 1, "auto"), 9, 16e9)
    assert count == 2
    assert "2 CPUs" in why
    assert how_many("auto", allocate(32, 0, 1, 1, "auto"), 99, 40e9)[0] == 10
    assert how_many("auto", allocate(2, 0, 1, 2, "auto"), 9, 16e9)[0] == 1
    assert how_many("auto", allocate(8, 0, 1, 1, "auto"), 9, 1e9)[0] == 1
    assert how_many("auto", allocate(32, 8, 1, 2, "auto"), 99, 1e9)[0] == 4
    assert how_many("auto", allocate(32, 8, 1, 1, "auto"), 3, 1e9)[0] == 3
    assert how_many(2, allocate(2, 0, 1, 1, "auto"), 9, 1e9)[0] == 2
    with pytest.raises(KtrayError, match="at most 2"):
        how_many(3, allocate(32, 4, 1, 2, "auto"), 9, 1e9)


@pytest.mark.parametrize(
    ("cpus", "gpus", "workers", "count"), [(2, 0, 1, 2), (32, 0, 2, 4), (64, 8, 2, 4), (16, 3, 1, 2)]
)
def test_shares_leave_room_for_a_reader(cpus, gpus, workers, count):
    one = share(allocate(cpus, gpus, 1, workers, "auto"), count)
    held = count * max(one.workers * one.worker_cpus, one.actors * one.actor_cpus if one.actor_gpus else 0)
    assert held <= cpus / 2 + 1e-9
    assert one.decode_cpus <= cpus - held
    assert count * max(one.workers * one.worker_gpus, one.actors * one.actor_gpus) <= gpus
    assert one.workers == workers
