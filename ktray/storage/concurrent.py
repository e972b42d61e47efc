"""Concurrent calls that wait for a remote store, with their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

# Enough to keep a decoder busy if a response takes about 30 ms (S3 in the same region).
AT_ONCE = 16


def in_order(calls: Iterable[Callable[[], T]], at_once: int = AT_ONCE) -> Iterator[T]:
    """The result of each call, in order. At most 2 ``at_once`` calls are started before their results are consumed.

    If ``at_once`` is 1, each call runs in the thread of the consumer, when its result is requested. An exception of a
    call is raised in place of its result. Calls that have not started by then, or when the consumer stops, are skipped.
    """
    if at_once == 1:
        for call in calls:
            yield call()
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        started: deque[Future[T]] = deque()
        for call in calls:
            # Each call has the context variables of the consumer, such as `patience`.
            started.append(pool.submit(copy_context().run, call))
            if len(started) >= 2 * at_once:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
