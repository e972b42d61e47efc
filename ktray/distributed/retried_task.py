"""One Ray task that is tried again within bounds: Ray's own retries have none where a worker runs out of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from ktray.distributed import watchdog
from ktray.errors import KtrayError

T = TypeVar("T")


def run_with_retries(
    work: Callable[[], T],
    what: str,
    remedy: str,
    max_failures: int,
    *,
    cpus: float,
    gpus: float = 0.0,
    also: tuple[type[Exception], ...] = (),
) -> T:
    """What ``work`` gives, called in a Ray worker; waited for under the stage's watchdog.

    It is called again, at most ``max_failures`` times, where its worker dies or runs out of memory.

    Args:
        work: picklable.
        what, remedy: who does it ("the training worker") and what helps where its memory is short, for the message.
        also: errors of ``work`` after which it is called again too.

    Raises:
        KtrayError: it ran out of memory each time, or the stage's watchdog has stopped.
        ray.exceptions.RayError: its worker died each time.
        Exception: what ``work`` raised.
    """
    import ray

    errors = ray.exceptions
    lost: tuple[Any, ...] = errors.WorkerCrashedError, errors.NodeDiedError, errors.LocalRayletDiedError
    again: tuple[Any, ...] = (errors.OutOfMemoryError, *lost, *also)
    task: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_call)
    failures = 0
    while True:
        under_way = task.remote(work)
        try:
            return cast(
                T, watchdog.run_watched(partial(ray.get, under_way), partial(ray.cancel, under_way, force=True))
            )
        except again as error:
            failures += 1
            if failures <= max_failures:
                continue
            if isinstance(error, errors.OutOfMemoryError):
                used = re.search(r"was (\S+ used / \S+) limit", str(error))
                raise KtrayError(
                    f"{what[0].upper()}{what[1:]} ran out of memory, tried {failures} time{'s'[: failures > 1]} "
                    f"({used[1] if used else 'all'} on its machine)",
                    remedy,
                ) from error
            raise


def _call(work: Callable[[], T]) -> T:
    return work()
