"""Several pipelines at once, each on its share of the cluster.

The pipelines are threads of one driver. This works because Ray does the work in its own processes, the MLflow clients
have no process-wide state, and if two pipelines need a stage, one computes it while the other waits for its lease.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from ktray.distributed.allocation import Allocation, allocate, gpus_for_each
from ktray.errors import KtrayError

T = TypeVar("T")
# Approximate memory of the processes of one pipeline (share of the driver, training worker, controller, teacher actor).
BYTES_A_PIPELINE = 4e9


def how_many(requested: int | Literal["auto"], whole: Allocation, jobs: int, memory: float) -> tuple[int, str]:
    """Return the number of pipelines at once, and the reason for it.

    On CPUs, one core for each training worker is faster than several: two workers of a small student with one thread
    each make 1.2 times the steps of one worker with two threads, and the start-up of one pipeline, which keeps one core
    busy, runs during the steps of another.

    Args:
        requested: ``compare.parallel`` or ``tune.parallel``.
        whole: the allocation of the whole cluster.
        jobs: number of runs, which limits the result.
        memory: memory of the cluster in bytes.

    Raises:
        KtrayError: there are not enough GPUs for the requested number.
    """
    on_gpu = whole.worker_gpus > 0
    if on_gpu:
        each = whole.least * whole.worker_gpus
        room = max(1, int(whole.total_gpus / each + 1e-9))
        why = f"{whole.total_gpus:g} GPUs, {each:g} for each"
    else:
        room = max(1, min(int(whole.total_cpus // whole.least), int(memory // (BYTES_A_PIPELINE * whole.least))))
        why = (
            f"{whole.total_cpus:g} CPUs and {memory / 1e9:.0f} GB of memory: one core and "
            f"{BYTES_A_PIPELINE / 1e9:g} GB for each worker"
        )
    if requested == "auto":
        return min(room, jobs), why
    if on_gpu and requested > room:
        raise KtrayError(
            f"compare.parallel={requested} pipelines of {each:g} GPUs do not fit on {whole.total_gpus:g}",
            f"Set compare.parallel to at most {room}, or cluster.gpu_share=0.5 so that runs share a GPU.",
        )
    return min(requested, jobs), "compare.parallel"


def share(whole: Allocation, count: int) -> Allocation:
    """Return the allocation of one of ``count`` pipelines that run at once. Each has its smallest number of workers,
    because there is no room for more.

    The training workers and teacher actors of all pipelines together hold at most half of the CPUs, so that there is
    always a CPU for a reading task. Otherwise the pipelines could wait for each other forever.

    Raises:
        KtrayError: the pipelines do not fit on the cluster.
    """
    if count == 1:
        return whole
    gpus, on_gpu = gpus_for_each(whole.total_gpus, count), whole.worker_gpus > 0
    return allocate(whole.total_cpus / count, gpus, 1, whole.least, on_gpu, gpu_share=whole.worker_gpus or 1.0)


def run_all(jobs: Sequence[Callable[[], T]], at_once: int) -> list[T]:
    """Run jobs in threads; returns their results in the order of the jobs.

    After an exception in a job, no further job starts. The running jobs finish (their stages are kept), then the first
    exception is raised. A keyboard interrupt does not wait for them.
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

    # The threads are daemons, so that the interpreter does not wait for them after an interrupt.
    threads = [threading.Thread(target=work, name=f"ktray-run-{i}", daemon=True) for i in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(jobs))]
