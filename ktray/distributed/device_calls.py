"""Calls of device workers that bring a result even if a process, or its machine, is lost.

A lost call is made again. If its worker is gone, because its machine is, another worker takes the call. What a call
computes is stored by its caller, so it may be computed twice. An item during which a process dies again and again is
taken for the cause.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ktray.distributed.device_workers import AT_ONCE, BorrowedWorker
from ktray.errors import ResourceError

DEATHS = 3  # times that a process may die during one item
PATIENCE_S = 30.0  # without a result, after which a worker is asked whether it is there
_PROBE_S = 10.0  # for its answer

_gone: dict[BorrowedWorker, Any] = {}  # probes of this process that have no answer; until then, others get the calls

logger = logging.getLogger("ktray")


def lost_errors() -> tuple[type[Exception], ...]:
    """Ray's errors for work whose process, machine or result was lost."""
    from ray import exceptions as errors

    return (
        errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError,
        errors.OutOfMemoryError, errors.ObjectLostError,
    )  # fmt: skip


def first_result(
    workers: Sequence[BorrowedWorker], first: int, call: Callable[[BorrowedWorker], Any], what: str
) -> Any:
    """The result of ``call``, which starts a call in a worker and returns its reference.

    Args:
        first: any number; equal numbers call the same worker, unless it is gone.
        what: the item, for messages.

    Raises:
        ResourceError: processes died more than `DEATHS` times during the call.
    """
    import ray

    lost, deaths = lost_errors(), 0
    for away, probe in list(_gone.items()):
        if ray.wait([probe], timeout=0)[0]:
            del _gone[away]
    worker = _chosen([worker for worker in workers if worker not in _gone] or workers, first)
    reference = call(worker)
    while True:
        if not ray.wait([reference], timeout=PATIENCE_S)[0]:
            there = present(workers)
            if there and worker not in there:
                _gone[worker] = worker.probe()
                worker = _chosen(there, first)
                reference = call(worker)
            continue
        try:
            return ray.get(reference)
        except lost as error:
            deaths += 1
            _count(deaths, what, error)
            # For some seconds, Ray does not know that a machine is gone, and calls would fail one after the other.
            ray.wait([worker.probe()], timeout=PATIENCE_S)
            there = present(workers)
            worker = worker if worker in there else _chosen(there or workers, first)
            reference = call(worker)


def map_on_workers(
    workers: Sequence[BorrowedWorker], items: Sequence[Any], function: Callable[..., Any], shared: Sequence[Any] = ()
) -> Iterator[tuple[int, Any]]:
    """Call ``function`` (picklable) with every item in the workers. Yields (number of the item, result) as they
    arrive.

    Args:
        shared: references to further arguments, which are the same in all calls.

    Raises:
        ResourceError: processes died more than `DEATHS` times during one item.
    """
    import ray
    from ray import cloudpickle

    content = cloudpickle.dumps(function)
    key, reference = hashlib.sha256(content).hexdigest(), ray.put(content)
    lost, deaths = lost_errors(), Counter[int]()
    todo, left, moved = deque(range(len(items))), set(range(len(items))), set[int]()
    idle = [worker for _ in range(AT_ONCE) for worker in workers]
    running: dict[Any, tuple[int | None, BorrowedWorker]] = {}  # item and worker of each call; a probe has no item

    def hand_out() -> None:
        while todo and idle:
            number = todo.popleft()
            if number not in left:  # it was lost or moved, and another call has done it since
                continue
            worker = idle.pop(0)
            running[worker.apply(key, [reference], items[number], list(shared))] = number, worker

    hand_out()
    while left:
        done, _ = ray.wait(list(running), timeout=PATIENCE_S)
        if not done:
            # A worker that is gone may come back. Its calls are therefore kept, and the first result of an item counts.
            there = present(workers)
            away = (number for number, worker in running.values() if worker not in there)
            gone = left.intersection(away) - moved
            todo.extend(sorted(gone))
            moved |= gone
            hand_out()
            continue
        number, worker = running.pop(done[0])
        try:
            result = ray.get(done[0])
        except lost as error:
            if number in left:
                deaths[number] += 1
                _count(deaths[number], f"item {number + 1} of {len(items)}", error)
                todo.appendleft(number)
            if number is None and not running:
                raise  # the last worker cannot be started again
            if number is not None:
                running[worker.probe()] = None, worker  # it gets items again once it is there
            hand_out()
            continue
        idle.append(worker)
        if number in left:
            left.remove(number)
            hand_out()
            yield number, result
        else:
            hand_out()


def _chosen(workers: Sequence[BorrowedWorker], number: int) -> BorrowedWorker:
    return workers[number % len(workers)]


def present(workers: Sequence[BorrowedWorker]) -> list[BorrowedWorker]:
    """The workers whose process runs. The others start (again), or wait for a machine."""
    import ray

    probes = {worker.probe(): worker for worker in workers}
    answered, _ = ray.wait(list(probes), num_returns=len(probes), timeout=_PROBE_S)
    there = []
    for probe in answered:
        with contextlib.suppress(*lost_errors()):
            ray.get(probe)
            there.append(probes[probe])
    return sorted(there, key=workers.index)


def _count(deaths: int, what: str, error: Exception) -> None:
    if deaths > DEATHS:
        raise ResourceError(
            f"A device worker died {deaths} times during {what} (it computes {AT_ONCE} items at a time)",
            "Most often its machine has too little memory: use machines with more of it, or a smaller teacher. Ray's "
            "logs under /tmp/ray/session_latest/logs say how a process ended; finished parts are kept.",
        ) from error
    logger.warning(
        f"a device worker was lost ({type(error).__name__}) during {what}; it is started again ({deaths} of "
        f"at most {DEATHS})"
    )
