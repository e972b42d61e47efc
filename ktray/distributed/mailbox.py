"""The board: where workers post how far they are, and the driver reads it.

Workers run on other machines and must never wait for the driver, so a post is fire-and-forget; the driver
reads in its own time and turns posts into the progress line, MLflow steps and the ledger's heartbeat.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

LIMIT = 10_000


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressActor:
    """Holds posts until they are read; the oldest go when nobody reads."""

    def __init__(self) -> None:
        self.posts: list[Any] = []
        self.held: list[Any] = []

    def set_controller(self, handle: Any) -> None:
        """Keep who runs the training, for those who may have to end it; the last one counts."""
        self.held = [handle]

    def controller(self) -> list[Any]:
        return self.held

    def post(self, message: Any) -> None:
        self.posts.append(message)
        del self.posts[:-LIMIT]

    def drain(self) -> list[Any]:
        posts, self.posts = self.posts, []
        return posts


@contextlib.contextmanager
def open_mailbox(on_post: Callable[[Any], None], interval: float = 0.5) -> Iterator[Any]:
    """A board whose posts are handed to ``on_post`` on a thread of the driver. Yields the handle."""
    board = ProgressActor.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def drain() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            for message in ray.get(board.drain.remote(), timeout=10):
                on_post(message)

    problems: list[Exception] = []

    def follow() -> None:
        try:
            while not stop.wait(interval):
                drain()
        except Exception as error:  # e.g. no space for the log; raised where the training ends
            problems.append(error)

    # In this context: what is logged on the thread belongs to the run that is logged here.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(timeout=15)
        if not problems:
            drain()
        ray.kill(board)
    if problems:
        raise problems[0]
