"""The number of threads follows what other programs leave, in a simulation of steps that wait for the slowest."""

import os
import threading
import time

import pytest

from ktray.accounting.device import waited_seconds
from ktray.training.cpu_share import CpuShare


class Machine:
    """Cores on which a training runs beside busy neighbours. A step with more threads than free cores is slow."""

    def __init__(self, cores: int, slowdown: float = 300.0) -> None:
        self.cores, self.slowdown = cores, slowdown
        self.now = self.waited = 0.0
        self.busy, self.threads = 0, cores

    def use(self, threads: int) -> None:
        self.threads = threads

    def step(self) -> float:
        free = max(0, self.cores - self.busy)
        crowded = self.threads > free
        alone = 0.1 * self.cores / self.threads
        # With one thread there is nobody to wait for: it shares a core with a neighbour.
        seconds = alone * (self.slowdown if self.threads > 1 else 2.0) if crowded else alone
        self.now += seconds
        self.waited += seconds * (min(self.threads, self.busy) * 0.5 if crowded else 0.02)
        return seconds

    def share(self) -> CpuShare:
        return CpuShare(self.cores, self.use, lambda: self.now, lambda: self.waited)


def run(machine: Machine, share: CpuShare, seconds: float) -> int:
    end, steps = machine.now + seconds, 0
    while machine.now < end:
        machine.step()
        share.stepped()
        steps += 1
    return steps


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_a_quiet_machine_keeps_all_threads(cores):
    machine = Machine(cores)
    share = machine.share()
    assert run(machine, share, 60) == pytest.approx(600, abs=2)
    assert share.threads == machine.threads == cores


def test_two_neighbours_on_two_cores_cost_their_share():
    machine = Machine(2)
    share = machine.share()
    undisturbed = run(machine, share, 60)
    machine.busy = 2
    run(machine, share, 60)  # the first crowded step takes 30 s
    disturbed = run(machine, share, 300)
    assert machine.threads == 1
    assert disturbed / 300 > 0.2 * undisturbed / 60
    machine.busy = 0
    run(machine, share, 40)
    assert machine.threads == 2
    assert run(machine, share, 60) == pytest.approx(undisturbed, rel=0.02)


def test_a_neighbour_that_was_there_first_is_noticed_too():
    machine = Machine(2)
    machine.busy = 2
    share = machine.share()
    run(machine, share, 120)
    assert machine.threads == 1


def test_of_many_cores_only_the_busy_ones_are_left():
    machine = Machine(16, slowdown=5.0)
    share = machine.share()
    run(machine, share, 20)
    machine.busy = 4
    run(machine, share, 60)
    assert 8 <= machine.threads <= 14
    machine.busy = 0
    run(machine, share, 60)
    assert machine.threads == 16


def test_what_does_not_help_is_taken_back():
    machine = Machine(4)
    share = machine.share()
    machine.busy = 1
    machine.step = lambda: _slow(machine)  # the steps are slow for another reason
    for _ in range(200):
        machine.step()
        share.stepped()
    assert machine.threads == 4


def _slow(machine):
    machine.now += 0.5
    machine.waited += 0.5
    return 0.5


def test_one_thread_stays_one():
    machine = Machine(1)
    machine.busy = 4
    share = machine.share()
    run(machine, share, 60)
    assert machine.threads == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this system does not count the waiting")
def test_waiting_for_a_core_is_measured():
    """Threads that fight for one core wait; hashing releases the interpreter's lock."""
    import hashlib

    cores = os.sched_getaffinity(0)
    data = b"x" * (1 << 22)
    stop = time.monotonic() + 0.4

    def work() -> None:
        os.sched_setaffinity(0, {min(cores)})
        while time.monotonic() < stop:
            hashlib.sha256(data).digest()

    before = waited_seconds()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # threads that have ended are not counted any more
    waited = waited_seconds() - before
    for thread in threads:
        thread.join()
    assert waited > 0.1
