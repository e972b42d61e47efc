"""The watchdog: it ends a stage without a heartbeat for `cluster.stall_minutes`, and says what the stage waited for.

Ray waits for ever. A task that requests a CPU that does not exist, a store that does not answer, a worker that waits
for a dead one: for the driver, which blocks, they all look the same. Calls that may block for ever therefore run on a
thread of their own. While the driver waits for them, it checks the stage's watchdog; all code that reports progress
sends a heartbeat to the watchdog.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from ktray.errors import ResourceError
from ktray.reporting.progress import humanise

T = TypeVar("T")
_CHECK_S = 1.0  # seconds between two checks of the watchdog
_ANSWER_S = 20.0  # seconds within which the cluster and the store must answer when the cause of a stall is looked for
_current: ContextVar[Watchdog | None] = ContextVar("ktray-watchdog", default=None)
_limit: ContextVar[Callable[[], None] | None] = ContextVar("ktray-limit", default=None)


class Watchdog:
    """The watchdog of one stage. Its methods may be called from any thread.

    Args:
        stage: name of the stage.
        minutes: minutes without a heartbeat after which the stage counts as stalled.
        store: makes a small request to the store; it raises or hangs if the store does not answer.
        clock: returns seconds; monotonic.
    """

    def __init__(
        self,
        stage: str,
        minutes: float,
        store: Callable[[], Any] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.seconds, self._store, self._clock = stage, 60 * minutes, store, clock
        self._last, self._progress = clock(), "none yet"
        self._waits, self._requested = "", ""
        self.idle: Callable[[str], None] = lambda what: None  # called every second with what the stage waits for

    def heartbeat(self, progress: str = "") -> None:
        """Record that the stage works; ``progress`` describes how far it is, if that is known."""
        self._last = self._clock()
        self._progress = progress or self._progress

    def waits(self, what: str, asks: str = "") -> None:
        """Record what the stage waits for from now on, and what it requests from the cluster. This is no heartbeat."""
        self._waits, self._requested = what, asks or self._requested

    @property
    def silent(self) -> float:
        """Seconds since the last heartbeat."""
        return self._clock() - self._last

    def check(self) -> None:
        """Check for a stall.

        Raises:
            ResourceError: the last heartbeat is too long ago.
        """
        if self.silent > self.seconds:
            raise self._error()
        self.idle(self._waits)

    def _error(self) -> ResourceError:
        silent = humanise(self.silent)
        causes = _within(_ANSWER_S, _nodes, "Ray's head node does not answer: check that its machine is up.")
        causes += _within(
            _ANSWER_S, lambda: _answers(self._store), "The store does not answer: check the network and its server."
        )
        requested = f" (requested: {self._requested})" if self._requested else ""
        return ResourceError(
            f"{self.stage}: no progress for {silent} (last: {self._progress}) while waiting for "
            f"{self._waits or 'its tasks'}{requested}",
            f"{' '.join(causes)} The same command resumes from what is stored; cluster.stall_minutes sets the limit.",
        )


@contextlib.contextmanager
def limited(check: Callable[[], None] | None) -> Iterator[None]:
    """Within this context, an error that ``check`` raises ends the stage that runs on this thread.

    ``check`` is called every second while a stage waits, between the shards of a stage, and before each stage.
    """
    token = _limit.set(check)
    try:
        yield
    finally:
        _limit.reset(token)


def check_limit() -> None:
    """Call the check of `limited` for this thread, if there is one; its error is passed on."""
    check = _limit.get()
    if check is not None:
        check()


@contextlib.contextmanager
def watch(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Within this context, `run_watched` and `iterate_watched` on this thread check the watchdog."""
    token = _current.set(watchdog)
    try:
        yield watchdog
    finally:
        _current.reset(token)


def waiting_for(what: str, asks: str = "") -> None:
    """`Watchdog.waits` of the stage that runs on this thread, if any."""
    watchdog = _current.get()
    if watchdog is not None:
        watchdog.waits(what, asks)


def run_watched(work: Callable[[], T], cancel: Callable[[], object]) -> T:
    """Run ``work`` on a thread of its own and return its result.

    Args:
        cancel: ends the work; it is called when the watchdog finds a stall or the wait is interrupted.

    Raises:
        ResourceError: the stage's watchdog found a stall.
    """
    (result,) = iterate_watched(lambda: (work(),), cancel)
    return result


def iterate_watched(items: Callable[[], Iterable[T]], cancel: Callable[[], object]) -> Iterator[T]:
    """Iterate over the items, which are computed one ahead on a thread of their own; see `run_watched`."""
    watchdog = _current.get()
    box: queue.Queue[tuple[bool, Any]] = queue.Queue(1)  # (True, item), then (False, error or None)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                box.put(entry, timeout=_CHECK_S)
                return

    def compute() -> None:
        try:
            for item in items():
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    threading.Thread(target=copy_context().run, args=(compute,), name="ktray-work", daemon=True).start()
    complete = False
    try:
        while True:
            if watchdog:
                watchdog.heartbeat()  # until now the stage did its own work
            is_item, value = _next(box, watchdog)
            if not is_item:
                complete = True
                if value is not None:
                    raise value
                return
            yield value
    finally:
        stopped.set()
        if not complete:
            _within(_ANSWER_S, lambda: [str(cancel())], "")


def _next(box: queue.Queue[tuple[bool, Any]], watchdog: Watchdog | None) -> tuple[bool, Any]:
    while True:
        try:
            return box.get(timeout=_CHECK_S)
        except queue.Empty:
            check_limit()
            if watchdog:
                watchdog.check()


def _within(seconds: float, request: Callable[[], list[str]], otherwise: str) -> list[str]:
    """The lines of ``request``, or ``otherwise`` if it takes longer, so that the request cannot hang the job."""
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(_answer(request)), daemon=True)
    thread.start()
    thread.join(seconds)
    return [otherwise] if thread.is_alive() else lines


def _answer(request: Callable[[], list[str]]) -> list[str]:
    try:
        return request()
    except Exception as error:  # the error may be the cause of the stall
        return [f"A request failed: {' '.join(str(error).split())[:200]}."]


def _answers(store: Callable[[], Any]) -> list[str]:
    store()
    return []


def _nodes() -> list[str]:
    import ray

    nodes = ray.nodes()
    dead = [n["NodeManagerAddress"] for n in nodes if not n["Alive"]]
    total, free = ray.cluster_resources(), ray.available_resources()
    counts = [f"{free.get(name, 0.0):g} of {total[name]:g} {name}s" for name in ("CPU", "GPU") if total.get(name)]
    lines = [f"Free now: {' and '.join(counts) or 'no CPUs'} on {len(nodes) - len(dead)} nodes."]
    if dead:
        lines.append(f"Nodes that have died: {', '.join(dead)}.")
    return lines
