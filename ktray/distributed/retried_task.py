"""A Ray task with a limited number of retries. Ray's own retries are unlimited if a worker runs out of memory.

Work on a GPU is done in a device worker, which already has CUDA open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from ktray.distributed import watchdog
from ktray.distributed.assigned import use_assigned_device
from ktray.distributed.device_calls import lost_errors
from ktray.distributed.device_workers import WORKERS
from ktray.distributed.explain import out_of_memory
from ktray.errors import ResourceError
from ktray.reporting.heartbeat import heard_by

T = TypeVar("T")
logger = logging.getLogger("ktray")


def run_with_retries(
    work: Callable[[], T],
    what: str,
    remedy: str,
    max_failures: int,
    *,
    cpus: float,
    gpus: float = 0.0,
    at: Callable[[str], None] | None = None,
    also: tuple[type[Exception], ...] = (),
    mailbox: Any = None,
) -> T:
    """Call ``work`` in a Ray worker, and wait for its result under the stage's watchdog.

    If the worker dies or runs out of memory, ``work`` is called again, at most ``max_failures`` times, each time with a
    warning.

    Args:
        work: the function; picklable.
        what: name of the worker for the error message ("the training worker").
        remedy: what to change if the worker runs out of memory, for the error message.
        max_failures: number of failures after which ``work`` is called again.
        cpus, gpus: resources of the task.
        at: called with the id of the node where ``work`` ran, when it has ended.
        also: errors of ``work`` after which it is also called again.
        mailbox: handle of the `ktray.distributed.mailbox.ProgressActor` for the heartbeats of ``work``
            (`ktray.reporting.heartbeat`); None: they are not heard.

    Raises:
        KtrayError: the last attempt ran out of memory, or (on a GPU) its process ended, or the stage's watchdog ended
            the work.
        ray.exceptions.RayError: the worker of the last attempt died.
        Exception: any other error that ``work`` raised.
    """
    import ray

    if mailbox is not None:
        work = partial(_heard, work, mailbox)
    again = (*lost_errors(), *also)
    failures = 0
    while True:
        try:
            result, node = _on_device(work, cpus, gpus) if gpus else _in_task(work, cpus)
            if at:
                at(node)
            return result
        except again as error:
            failures += 1
            ended_for_memory = isinstance(error, ray.exceptions.OutOfMemoryError) or "memory" in str(error)
            if failures <= max_failures:
                why = "it ran out of memory" if ended_for_memory else type(error).__name__
                logger.warning(f"{what} was lost ({why}); it is started again ({failures} of at most {max_failures})")
                continue
            if ended_for_memory:
                raise out_of_memory(f"{what[0].upper()}{what[1:]}", error, failures, remedy) from error
            if gpus and isinstance(error, ray.exceptions.RayActorError):
                # Ray does not say of a process that it starts again why it ended.
                raise ResourceError(
                    f"The process of {what} ended {failures} time{'s' if failures > 1 else ''} ({_line(error)})",
                    f"Most often its machine has too little memory: {remedy} Ray's logs under "
                    "/tmp/ray/session_latest/logs say how it ended.",
                ) from error
            raise


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _in_task(work: Callable[[], T], cpus: float) -> tuple[T, str]:
    import ray

    task: Any = ray.remote(num_cpus=cpus, max_retries=0)(_call)
    under_way = task.remote(work)
    end = partial(ray.cancel, under_way, force=True)
    return cast("tuple[T, str]", watchdog.run_watched(partial(ray.get, under_way), end))


def _on_device(work: Callable[[], T], cpus: float, gpus: float) -> tuple[T, str]:
    import ray
    from ray import cloudpickle

    with WORKERS.borrow(1, cpus, gpus) as (worker,):
        under_way = worker.call(cloudpickle.dumps(partial(_with_place, work)))
        # A call of an actor cannot be cancelled; the error ends the worker.
        return cast("tuple[T, str]", watchdog.run_watched(partial(ray.get, under_way), partial(ray.kill, worker.actor)))


def _call(work: Callable[[], T]) -> tuple[T, str]:
    use_assigned_device()
    return _with_place(work)


def _heard(work: Callable[[], T], mailbox: Any) -> T:
    with heard_by(mailbox.post.remote):
        return work()


def _with_place(work: Callable[[], T]) -> tuple[T, str]:
    import ray

    return work(), str(ray.get_runtime_context().get_node_id())
