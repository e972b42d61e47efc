"""What ktray logs while something is called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class _Append(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def hearing(lines: list[str]) -> Iterator[None]:
    """Within it, the lines of the logger ``ktray``, from INFO up, are added to ``lines``."""
    logger, handler = logging.getLogger("ktray"), _Append(lines)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def heard(lines: list[str], work: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """Call ``work`` and add what it logs to ``lines``."""
    with hearing(lines):
        return work(*arguments, **more)
