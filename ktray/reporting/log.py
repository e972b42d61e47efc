"""Lines for the person who watches a job: plain text through Python's logging, under the logger ``ktray``.

Library code calls ``logging.getLogger("ktray").info(...)`` and configures nothing. The command line shows the lines
while a job runs (`console`): INFO and `RESULT` on standard output, warnings and errors on standard error. Outside of
`console`, the logger passes its records on as any other logger does, so a program that imports ktray, or pytest's
``caplog``, chooses what it shows.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

logger = logging.getLogger("ktray")
RESULT = 25  # between INFO and WARNING: the final lines of a job, which --quiet also shows
logging.addLevelName(RESULT, "RESULT")

_context: ContextVar[tuple[str | None, bool]] = ContextVar("ktray-log", default=(None, False))
_quiet = False


class _Console(logging.Handler):
    """Writes each line immediately. It looks up the streams for each line, because tests and notebooks replace them."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        # A closed pipe or a full disk ends the job, as it does with `print`.
        print(self.format(record), file=stream, flush=True)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Write the lines of the logger ``ktray`` as plain text while the context is open; `verbosity` chooses the
    lines."""
    handler = _Console()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    # Libraries add handlers to the root logger (even `logging.info` does), which would print each line twice.
    logger.propagate = False
    try:
        verbosity()
        yield
    finally:
        verbosity()
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def verbosity(quiet: bool = False, verbose: bool = False) -> None:
    """Choose what `console` shows.

    Args:
        quiet: show only warnings, errors and the final lines of a job, and no progress lines.
        verbose: also show lines at DEBUG.
    """
    global _quiet
    _quiet = quiet
    logger.setLevel(RESULT if quiet else logging.DEBUG if verbose else logging.INFO)


def is_quiet() -> bool:
    """Whether progress lines are off."""
    return _quiet


def result(text: str) -> None:
    """Write one of the final lines of a job."""
    logger.log(RESULT, text)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Treat all lines as final lines of a job while the context is open, so that ``--quiet`` shows them."""
    before = logger.level
    if _quiet:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def titled(title: str | None, muted: bool = False) -> Iterator[None]:
    """Prefix each line of this thread with a title while the context is open, to distinguish the lines of parallel
    runs.

    Args:
        title: the prefix; None: no prefix.
        muted: whether to drop lines below WARNING.
    """
    token = _context.set((title, muted))
    try:
        yield
    finally:
        _context.reset(token)


def muted() -> contextlib.AbstractContextManager[None]:
    """Drop lines of this thread below WARNING while the context is open."""
    return titled(None, muted=True)


def _mark(record: logging.LogRecord) -> bool:
    title, muted = _context.get()
    if muted and record.levelno < logging.WARNING:
        return False
    if title is not None:
        record.msg = "\n".join(f"[{title}] {line}" for line in record.getMessage().splitlines())
        record.args = None
    return True


logger.addFilter(_mark)
