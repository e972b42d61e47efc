"""The one error type that a user is meant to see."""

from __future__ import annotations

import re
from collections.abc import Mapping

MARK = "ktray.errors.KtrayError:"  # before its text, where an error comes as text
# What workers see when another has died.
_ECHO = re.compile(
    r"gloo|nccl|process ?group|collective|all_?(reduce|gather)|broadcast|barrier|rendezvous|tcpstore|"
    r"connection (reset|closed|refused)|broken pipe|socket|timed out",
    re.IGNORECASE,
)


class KtrayError(Exception):
    """Something that the user can mend: what is wrong, and what to change.

    `str(error)` is one line, ``what. remedy``; the command line prints it without a traceback
    (``--debug`` shows the traceback).

    Args:
        what: what is wrong and where, as a sentence without the final period.
        remedy: what to change, naming keys of the recipe where there are any.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what.rstrip(".")
        self.remedy = remedy
        super().__init__(f"{self.what}. {remedy}".strip())

    def __reduce__(self) -> tuple[type[KtrayError], tuple[str, str]]:
        # Exceptions cross Ray process borders; the default would drop the second argument.
        return (type(self), (self.what, self.remedy))


class BadImage(Exception):
    """One image that cannot be used. It is counted and quarantined, never fatal by itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return (type(self), (self.reason,))


def first_failed(failures: Mapping[int, BaseException]) -> int:
    """Of workers that failed, by rank, the one that comes first in the order of causes; Ray tells no times.

    A user's error stands before any other of a worker's own, both before the death of a process, and all of them before
    what others then see: their collective operation breaks off. Among equals it is the lowest rank.
    """

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        name = type(failure).__name__
        text = f"{name} {failure}"
        if isinstance(failure, KtrayError) or MARK in str(failure):
            return 0, rank
        if "HealthCheck" in name or "Actor" in name:
            return 2, rank
        return 3 if isinstance(failure, ConnectionError | TimeoutError) or _ECHO.search(text) else 1, rank

    return min(failures, key=order)
