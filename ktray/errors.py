"""The errors of ktray: one for the user to fix, one for an image that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

# Precedes the message where Ray passes an error on as text.
MARK = re.compile(r"ktray\.errors\.(KtrayError|ResourceError): ?")
# Messages of the errors that workers see after another worker has died.
_CONSEQUENCE = re.compile(
    r"gloo|nccl|process ?group|collective|all_?(reduce|gather)|broadcast|barrier|rendezvous|tcpstore|"
    r"connection (reset|closed|refused)|broken pipe|socket|timed out",
    re.IGNORECASE,
)


class KtrayError(Exception):
    """An error that the user can fix. It says what is wrong and what to change.

    `str(error)` is one line, ``what. remedy``; the command line prints it without a traceback
    (``--debug`` shows the traceback), and exits with `exit_code`.

    Args:
        what: what is wrong and where, as a sentence without the final period.
        remedy: what to change, with the names of the recipe's keys if any are involved.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what.rstrip(".")
        self.remedy = remedy
        super().__init__(f"{self.what}. {remedy}".strip())

    def __reduce__(self) -> tuple[type[KtrayError], tuple[str, str]]:
        # Ray passes exceptions between processes, and the default method would lose the second argument.
        return (type(self), (self.what, self.remedy))


class ResourceError(KtrayError):
    """A `KtrayError` about the cluster, a machine, a disk or the network. The same command may succeed later."""

    exit_code: ClassVar[int] = 3


class BadImage(Exception):
    """An image that cannot be used. It is counted and quarantined; a single one never ends a job."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str]]:
        return (type(self), (self.reason,))


def first_failed(failures: Mapping[int, BaseException]) -> int:
    """The rank of the worker that caused the failures, of the workers that failed.

    Ray does not report when each worker failed, so the kinds of errors are put into the order of cause and consequence:
    first a `KtrayError`, then any other error in a worker's own work, then the death of a process, and last the errors
    that the other workers see when their collective operation breaks off. Among equal kinds, the lowest rank is
    returned.
    """

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        name = type(failure).__name__
        text = f"{name} {failure}"
        if isinstance(failure, KtrayError) or MARK.search(str(failure)):
            return 0, rank
        if "HealthCheck" in name or "Actor" in name:
            return 2, rank
        return 3 if isinstance(failure, ConnectionError | TimeoutError) or _CONSEQUENCE.search(text) else 1, rank

    return min(failures, key=order)
