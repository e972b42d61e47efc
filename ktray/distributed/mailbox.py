"""The mailbox: workers post their progress to an actor, and the driver reads it there.

Workers run on other machines and must never wait for the driver, so they do not wait for the result of a post. The
driver reads the messages at regular intervals and turns them into the progress line, steps in MLflow and the ledger's
heartbeats.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray

LIMIT = 10_000  # messages
ANSWER_S = 10.0  # for the mailbox to answer, before the driver does something else


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressActor:
    """Keeps messages until the driver reads them. Beyond `LIMIT`, the oldest messages are dropped."""

    def __init__(self) -> None:
        self.posts: list[Any] = []
        self.controllers: list[Any] = []

    def set_controller(self, handle: Any) -> None:
        """Keep the handle of Ray Train's controller, so that the driver can end the training; the last one counts."""
        self.controllers = [handle]

    def controller(self) -> list[Any]:
        """The controller's handle in a list, which is empty before `set_controller`."""
        return self.controllers

    def post(self, message: Any) -> None:
        self.posts.append(message)
        del self.posts[:-LIMIT]

    def drain(self) -> list[Any]:
        posts, self.posts = self.posts, []
        return posts


class Posts:
    """Posts the messages of a worker to a mailbox without waiting for it; with None, nothing is posted."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self._last: Any = None

    def __reduce__(self) -> tuple[type[Posts], tuple[Any]]:
        return Posts, (self.mailbox,)

    def __call__(self, message: Any) -> None:
        if self.mailbox is not None:
            self._last = self.mailbox.post.remote(message)

    def deliver(self) -> None:
        """Wait until the mailbox has the messages. The driver reads it for the last time when the work has returned,
        and messages that were still under way would not count."""
        if self._last is not None:
            ray.wait([self._last], timeout=ANSWER_S)  # the mailbox takes the messages of a process in their order


@contextlib.contextmanager
def open_mailbox(on_post: Callable[[Any], None], interval: float = 0.5) -> Iterator[Any]:
    """Start a mailbox, and call ``on_post`` with each message on a thread of the driver. Yields the actor's handle.

    Args:
        interval: seconds between two reads.

    Raises:
        Exception: what ``on_post`` raised, when the block ends.
    """
    mailbox = ProgressActor.remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    late: list[Any] = []  # the reference to messages that did not come in time; they are no longer in the mailbox

    def drain() -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            reference = late.pop() if late else mailbox.drain.remote()
            try:
                messages = ray.get(reference, timeout=ANSWER_S)
            except ray.exceptions.GetTimeoutError:
                late.append(reference)
                return
            for message in messages:
                on_post(message)

    problems: list[Exception] = []

    def follow() -> None:
        try:
            while not stop.wait(interval):
                drain()
        except Exception as error:  # e.g. no space for the log; raised when the block ends
            problems.append(error)

    # In this context: what is logged on the thread belongs to the run that is logged here.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        stop.set()
        thread.join(timeout=ANSWER_S + 5)
        try:
            if not problems:
                drain()
        finally:
            ray.kill(mailbox)
    if problems:
        raise problems[0]
