"""Several pipelines at once, each on its share of the cluster.

Threads of one driver: Ray does the work in its own processes, MLflow is spoken to through clients without process-wide
state, and a stage that two pipelines need is made by one while the other waits for its lease.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from ktray.distributed.allocation import Allocation, allocate
from ktray.errors import KtrayError

T = TypeVar("T")
# Processes of one pipeline (driver's share, training worker and its controller, teacher actor) hold about so much.
BYTES_A_PIPELINE = 4e9


def how_many(requested: int | Literal["auto"], whole: Allocation, jobs: int, memory: float) -> tuple[int, str]:
    """Pipelines at once, and why so many.

    On CPUs one core a training worker does more than several: two workers of a small student with a thread each make
    1.2 times the steps of one with two, and start-up, which keeps one core busy, hides behind the other's steps.

    Args:
        memory: of the cluster, bytes.

    Raises:
        KtrayError: a number was asked for that the GPUs do not suffice for.
    """
    on_gpu = whole.worker_gpus > 0
    if on_gpu:
        room = max(1, int(whole.total_gpus // whole.least))
        why = f"{whole.total_gpus:g} GPUs, {whole.least} for each"
    else:
        room = max(1, min(int(whole.total_cpus // whole.least), int(memory // (BYTES_A_PIPELINE * whole.least))))
        why = f"{whole.total_cpus:g} CPUs and {memory / 1e9:.0f} GB: a core and {BYTES_A_PIPELINE / 1e9:g} GB a worker"
    if requested == "auto":
        return min(room, jobs), why
    if on_gpu and requested > room:
        raise KtrayError(
            f"compare.parallel={requested} pipelines of {whole.least} GPUs do not fit on {whole.total_gpus:g}",
            f"Set compare.parallel to at most {room}.",
        )
    return min(requested, jobs), "compare.parallel"


def share(whole: Allocation, count: int) -> Allocation:
    """The plan of one of ``count`` pipelines that run at once. Side by side they have no room to grow: each has its
    fewest workers.

    What all of them hold together (training workers, teacher actors) is at most half of the CPUs, so that a reading
    task always finds room and none waits for another for ever.

    Raises:
        KtrayError: it does not fit.
    """
    if count == 1:
        return whole
    gpus = float(whole.total_gpus // count)
    return allocate(whole.total_cpus / count, gpus, 1, whole.least, whole.worker_gpus > 0)


def run_all(jobs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """Results in the order of the jobs.

    After a job's exception no further job is begun; those that run come to their end (their stages are kept), then
    the first exception is raised. A keyboard interrupt does not wait.
    """
    if at_once <= 1:
        return [job() for job in jobs]
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        todo.put(number)

    def work() -> None:
        while not errors:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                results[number] = jobs[number]()
            except BaseException as error:
                errors.append(error)

    # Daemons: the interpreter does not wait for them after an interrupt.
    threads = [threading.Thread(target=work, name=f"ktray-way-{i}", daemon=True) for i in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(jobs))]
