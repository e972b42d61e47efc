"""The watchdog: a stage that shows no sign of life for `cluster.stall_minutes` ends, and says what it waited for.

Ray never gives up: a task that asks for a CPU that nobody has, a store that does not answer, a worker that waits for a
dead one, all look the same from the driver, which blocks. So what may block for ever runs on a thread of its own, and
the driver waits for it with one eye on the stage's watchdog, which everything that reports progress beats.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from ktray.errors import KtrayError
from ktray.reporting.progress import humanise

T = TypeVar("T")
_LOOK = 1.0  # seconds between looks at the watchdog
_ANSWER = 20.0  # seconds that the cluster and the store have to answer when they are asked what is wrong
_current: ContextVar[Watchdog | None] = ContextVar("ktray-watchdog", default=None)
_limit: ContextVar[Callable[[], None] | None] = ContextVar("ktray-limit", default=None)


class Watchdog:
    """Of a stage; safe from any thread.

    Args:
        stage: its name.
        minutes: without a beat after which it counts as dead.
        store: asks the store for something small; raises or hangs where it does not answer.
        clock: seconds, monotonic.
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
        self._waits, self._asks = "", ""

    def heartbeat(self, progress: str = "") -> None:
        """There is life, and perhaps progress that can be named."""
        self._last = self._clock()
        self._progress = progress or self._progress

    def waits(self, what: str, asks: str = "") -> None:
        """What the stage waits for from now on, and what it asks of the cluster for it; no sign of life by itself."""
        self._waits, self._asks = what, asks or self._asks

    @property
    def silent(self) -> float:
        """Seconds since the last beat."""
        return self._clock() - self._last

    def check(self) -> None:
        """Raises `KtrayError` once the stage counts as dead."""
        if self.silent > self.seconds:
            raise self._error()

    def _error(self) -> KtrayError:
        silent = humanise(self.silent)
        causes = _within(_ANSWER, _nodes, "Ray's head does not answer: is its machine up?")
        causes += _within(_ANSWER, lambda: _answers(self._store), "The store does not answer: network, or its server?")
        asked = f", which asks for {self._asks}" if self._asks else ""
        return KtrayError(
            f"{self.stage}: no progress for {silent} (last: {self._progress}) while waiting for "
            f"{self._waits or 'its tasks'}{asked}",
            f"{' '.join(causes)} The same command goes on from what is stored; cluster.stall_minutes sets the limit.",
        )


@contextlib.contextmanager
def limited(check: Callable[[], None] | None) -> Iterator[None]:
    """Within it, whatever a stage waits for on this thread is ended by what ``check`` raises; it is asked every second
    of waiting, between the shards of a stage, and before each stage."""
    token = _limit.set(check)
    try:
        yield
    finally:
        _limit.reset(token)


def check_limit() -> None:
    """Raises what the limit of this thread's run raises, if it has one."""
    check = _limit.get()
    if check is not None:
        check()


@contextlib.contextmanager
def watch(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Within it, `run_watched` and `iterate_watched` on this thread mind the watchdog."""
    token = _current.set(watchdog)
    try:
        yield watchdog
    finally:
        _current.reset(token)


def waiting_for(what: str, asks: str = "") -> None:
    """`Watchdog.waiting_for` of the stage that runs on this thread, if any."""
    watchdog = _current.get()
    if watchdog is not None:
        watchdog.waits(what, asks)


def run_watched(work: Callable[[], T], cancel: Callable[[], object]) -> T:
    """What ``work`` gives; it runs on a thread of its own.

    Args:
        cancel: ends the work; called when the stage's watchdog stops or the wait is broken off.

    Raises:
        KtrayError: the stage's watchdog has stopped.
    """
    (found,) = iterate_watched(lambda: (work(),), cancel)
    return found


def iterate_watched(items: Callable[[], Iterable[T]], cancel: Callable[[], object]) -> Iterator[T]:
    """The items, which are made on a thread of their own, one ahead; see `run_watched`."""
    watchdog = _current.get()
    box: queue.Queue[tuple[bool, Any]] = queue.Queue(1)
    gone = threading.Event()

    def put(found: tuple[bool, Any]) -> None:
        while not gone.is_set():
            with contextlib.suppress(queue.Full):
                box.put(found, timeout=_LOOK)
                return

    def make() -> None:
        try:
            for item in items():
                put((True, item))
                if gone.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    threading.Thread(target=copy_context().run, args=(make,), name="ktray-work", daemon=True).start()
    whole = False
    try:
        while True:
            if watchdog:
                watchdog.heartbeat()  # the stage was at its own work until now
            more, found = _next(box, watchdog)
            if not more:
                whole = True
                if found is not None:
                    raise found
                return
            yield found
    finally:
        gone.set()
        if not whole:
            _within(_ANSWER, lambda: [str(cancel())], "")


def _next(box: queue.Queue[tuple[bool, Any]], watchdog: Watchdog | None) -> tuple[bool, Any]:
    while True:
        try:
            return box.get(timeout=_LOOK)
        except queue.Empty:
            check_limit()
            if watchdog:
                watchdog.check()


def _within(seconds: float, ask: Callable[[], list[str]], otherwise: str) -> list[str]:
    """What ``ask`` says, or ``otherwise`` where it takes longer; asking must not hang too."""
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.extend(_asked(ask)), daemon=True)
    thread.start()
    thread.join(seconds)
    return [otherwise] if thread.is_alive() else said


def _asked(ask: Callable[[], list[str]]) -> list[str]:
    try:
        return ask()
    except Exception as error:  # whatever is wrong with it is what we want to know
        return [f"Asking failed: {' '.join(str(error).split())[:200]}."]


def _answers(store: Callable[[], Any]) -> list[str]:
    store()
    return []


def _nodes() -> list[str]:
    import ray

    nodes = ray.nodes()
    dead = [n["NodeManagerAddress"] for n in nodes if not n["Alive"]]
    total, free = ray.cluster_resources(), ray.available_resources()
    counts = [f"{free.get(name, 0.0):g} of {total[name]:g} {name}s" for name in ("CPU", "GPU") if total.get(name)]
    said = [f"Free are {' and '.join(counts) or 'no CPUs'} on {len(nodes) - len(dead)} nodes."]
    if dead:
        said.append(f"Nodes that have died: {', '.join(dead)}.")
    return said
