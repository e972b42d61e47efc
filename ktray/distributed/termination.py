"""SIGTERM ends a job as Ctrl-C does: stages are closed, and the same command resumes the job.

Schedulers (Docker, Slurm, Kubernetes, ``ray job stop``) end a job by SIGTERM. ``ray.init`` installs a handler that
writes a dump of the process and aborts, so it must be called within `kept_sigterm`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_received = False


def was_terminated() -> bool:
    """Whether the process received SIGTERM since `handle_sigterm`. Ray replaces an exception of a signal handler by its
    own KeyboardInterrupt, so that the exception does not tell."""
    return _received


def handle_sigterm() -> None:
    """Raise KeyboardInterrupt in the main thread when SIGTERM arrives. Called in another thread, this does nothing."""
    global _received
    _received = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM that the program had before the context, if it had one of its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and callable(before):
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    global _received
    _received = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the end of the stages
    raise KeyboardInterrupt
