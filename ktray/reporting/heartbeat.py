"""Heartbeats of long work in one process: a sign that it goes on, for the watchdog of the stage that waits for it.

The work calls `beat` where it has done a part: a batch of images, an evaluation of a loss. It does not know who
listens; without a listener, nothing happens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

EVERY_S = 2.0  # seconds between two heartbeats that are passed on; stalls are measured in minutes


@dataclass(frozen=True)
class Heartbeat:
    """A sign that the work goes on. ``progress`` describes how far it is, if that is known."""

    progress: str = ""


class _Listener:
    def __init__(self, post: Callable[[Heartbeat], object]) -> None:
        self.post, self.last = post, -EVERY_S


_listener: ContextVar[_Listener | None] = ContextVar("ktray-heartbeat", default=None)


@contextlib.contextmanager
def heard_by(post: Callable[[Heartbeat], object]) -> Iterator[None]:
    """Within this context, `beat` of this thread calls ``post``, at most once in `EVERY_S` seconds."""
    token = _listener.set(_Listener(post))
    try:
        yield
    finally:
        _listener.reset(token)


def beat(progress: str = "") -> None:
    """Report that the work goes on; ``progress`` describes how far it is."""
    listener = _listener.get()
    if listener is not None and (now := time.monotonic()) - listener.last >= EVERY_S:
        listener.last = now
        listener.post(Heartbeat(progress))
