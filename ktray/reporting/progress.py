"""A progress line for each running stage: done/total, rate, time left, and the share of time spent waiting for data.

On a terminal, the line is rewritten in place. In a file or a job log, a new line is written every few seconds. With
``--quiet``, there are no progress lines.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TextIO

from ktray.reporting.log import is_quiet

_hushed: ContextVar[bool] = ContextVar("ktray-hushed", default=False)
# Two stages that run at once (transfer and the scratch baseline, say) share the terminal.
_screen = threading.Lock()
# Seconds without an update after which the line shows what the stage waits for, in a log and on a terminal.
_IDLE_S, _IDLE_TTY_S = 30.0, 5.0
_WINDOW_S = 15.0  # the rate covers the last seconds only, so that a slow start does not distort it for long


def humanise(seconds: float) -> str:
    """``8s``, ``2m05s``, ``3h07m``, ``2d04h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


@contextlib.contextmanager
def hushed(silent: bool = True) -> Iterator[None]:
    """Show no progress lines for stages that start on this thread while the context is open, because those of parallel
    stages would mix."""
    token = _hushed.set(silent)
    try:
        yield
    finally:
        _hushed.reset(token)


class Progress:
    """The progress line of one stage; a context manager, safe to update from any thread.

    Args:
        stage: name of the stage.
        total: number of units to process; None or 0: not known yet, and no time left is shown.
        unit: name of the unit that is counted.
        done: units that an earlier attempt has processed; they count in done/total, but not in the rate.
        stream: where to write; None: standard error.
        every: seconds between lines if the stream is no terminal.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str = "img",
        done: int = 0,
        stream: TextIO | None = None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._total, self._unit, self._every, self._clock = stage, total or None, unit, every, clock
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._lock = threading.Lock()
        self._began, self._first = clock(), done
        self._done, self._extra = done, ""
        self._wait: float | None = None
        self._recent: deque[tuple[float, int]] = deque([(self._began, done)])
        self._shown_at: float | None = None
        self._closed = False
        self._silent = _hushed.get() or is_quiet()
        self._show()

    def update(
        self,
        done: int,
        data_wait: float | None = None,
        extra: str | Mapping[str, Any] = "",
        total: int | None = None,
    ) -> None:
        """Report the progress of the stage.

        Args:
            done: units processed so far, including those of earlier attempts.
            data_wait: share of the time that the device waited for data, 0..1.
            extra: further information to show, as text or as names and values.
            total: the total, if it has become known or has changed.
        """
        with self._lock:
            if self._closed:
                return
            now = self._clock()
            self._done = done
            self._total = self._total if total is None else total
            self._wait = data_wait if data_wait is not None else self._wait
            self._extra = extra if isinstance(extra, str) else " ".join(f"{k}={_short(v)}" for k, v in extra.items())
            self._recent.append((now, done))
            while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_S:
                self._recent.popleft()
            if self._shown_at is None or now - self._shown_at >= (0.2 if self._tty else self._every):
                self._show()

    def idle(self, what: str) -> None:
        """Say what the stage waits for if nothing was shown for a while; to be called now and then.

        Args:
            what: what it waits for, as a noun; empty: not known.
        """
        with self._lock:
            after, pause = (_IDLE_TTY_S, 1.0) if self._tty else (_IDLE_S, _IDLE_S)
            now, shown = self._clock(), self._shown_at or self._began
            if self._closed or now - max(self._recent[-1][0], self._began) < after or now - shown < pause:
                return
            self._shown_at = now
            self._write(self.line() + (f" | waiting for {what}" if what else ""), last=False)

    def resume(self, done: int) -> None:
        """Restart the rate after ``done`` units, which an earlier attempt or a lost worker has processed."""
        with self._lock:
            self._first += done - self._done  # the units of this attempt still count in the mean rate
            self._done = done
            self._recent = deque([(self._clock(), done)])

    def close(self, word: str = "done") -> None:
        """Write the last line, with the total time and the mean rate. Later updates are ignored."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            took = self._clock() - self._began
            worked = self._done - self._first
            rate = f", {_count(worked / took)} {self._unit}/s" if worked > 0 and took > 0 else ""
            parts = [f"{self._stage}: {word}", self._amount() + rate, f"in {humanise(took)}", *self._tail()]
            self._write(" | ".join(parts), last=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("stopped" if kind else "done")

    def line(self) -> str:
        """The current progress line."""
        parts = [f"{self._stage}: {self._amount()}"]
        if self._total:
            parts[0] += f" {100 * min(1.0, self._done / self._total):.0f}%"
        rate = self._rate()
        if rate > 0:
            parts.append(f"{_count(rate)} {self._unit}/s")
            if self._total:
                parts.append(f"ETA {humanise((self._total - self._done) / rate)}")
        parts.append(humanise(self._clock() - self._began))
        return " | ".join([*parts, *self._tail()])

    def _amount(self) -> str:
        total = "" if self._total is None else f"/{self._total:,}"
        return f"{self._done:,}{total} {self._unit}"

    def _tail(self) -> list[str]:
        waiting = "" if self._wait is None else f"data_wait {100 * self._wait:.0f}%"
        return [part for part in (waiting, self._extra) if part]

    def _rate(self) -> float:
        (then, before), (now, done) = self._recent[0], self._recent[-1]
        return max(0.0, (done - before) / (now - then)) if now > then else 0.0

    def _show(self) -> None:
        self._shown_at = self._clock()
        self._write(self.line(), last=False)

    def _write(self, text: str, last: bool) -> None:
        if self._silent:
            return
        with _screen:
            try:
                if self._tty:
                    # A line wider than the terminal would wrap, and "\r" would no longer reach its beginning.
                    width = shutil.get_terminal_size().columns
                    self._stream.write("\r\x1b[2K" + (text if last else text[: width - 1]) + ("\n" if last else ""))
                else:
                    self._stream.write(text + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a closed pipe or stream must not end the stage
                return


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
