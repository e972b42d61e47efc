"""Calls that wait for a store, many at once, with their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

# As many as keep a decoder busy where an answer takes some 30 ms (S3 from within its region).
AT_ONCE = 16


def in_order(calls: Iterable[Callable[[], T]], at_once: int = AT_ONCE) -> Iterator[T]:
    """The result of each call, in order; at most twice ``at_once`` of them are begun and not yet taken.

    With ``at_once`` of 1 each is called at its turn, in the thread of who asks. A call that raises does so at its turn;
    calls that were not begun by then, or when nobody asks any more, are not made.
    """
    if at_once == 1:
        for call in calls:
            yield call()
        return
    pool = ThreadPoolExecutor(at_once)
    try:
        begun: deque[Future[T]] = deque()
        for call in calls:
            # Each in the settings of who asks, such as `patience`.
            begun.append(pool.submit(copy_context().run, call))
            if len(begun) >= 2 * at_once:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
