"""What ktray writes for the person who watches: plain lines through Python's logging, under the logger ``ktray``.

Library code calls ``logging.getLogger("ktray").info(...)`` and configures nothing. The command line shows the lines
while a job runs (`console`): up to INFO and `RESULT` on standard output, warnings and errors on standard error.
Outside of `console` the logger is an ordinary one that passes its records on, so a program that imports ktray, and
pytest's ``caplog``, decide for themselves what they show.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

logger = logging.getLogger("ktray")
RESULT = 25  # between INFO and WARNING: the lines that a job ends with, which --quiet shows too
logging.addLevelName(RESULT, "RESULT")

_context: ContextVar[tuple[str | None, bool]] = ContextVar("ktray-log", default=(None, False))
_quiet = False


class _Console(logging.Handler):
    """Writes each line at once. Streams are looked up for each line, because tests and notebooks replace them."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        # A closed pipe or a full disk ends the job, as it does with `print`.
        print(self.format(record), file=stream, flush=True)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Within it, lines of the logger ``ktray`` are written as plain text; `verbosity` says which."""
    handler = _Console()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    # Libraries add handlers to the root logger (`logging.info` does so by itself): each line would be there twice.
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
        quiet: only warnings, errors and the lines that a job ends with; no progress lines either.
        verbose: also lines at DEBUG.
    """
    global _quiet
    _quiet = quiet
    logger.setLevel(RESULT if quiet else logging.DEBUG if verbose else logging.INFO)


def is_quiet() -> bool:
    """Whether progress lines stay away too."""
    return _quiet


def result(text: str) -> None:
    """Write one line that belongs to what a job ends with."""
    logger.log(RESULT, text)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Within it, all lines belong to what a job ends with: ``--quiet`` shows them too."""
    before = logger.level
    if _quiet:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def titled(title: str | None, muted: bool = False) -> Iterator[None]:
    """Within it, on this thread, each line begins with a title, so that the lines of several runs at once can be told
    apart.

    Args:
        title: None: lines stay as they are.
        muted: lines below WARNING are dropped.
    """
    token = _context.set((title, muted))
    try:
        yield
    finally:
        _context.reset(token)


def muted() -> contextlib.AbstractContextManager[None]:
    """Within it, on this thread, lines below WARNING are dropped."""
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
