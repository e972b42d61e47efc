"""The one error type that a user is meant to see."""

from __future__ import annotations

from collections.abc import Mapping

MARK = "ktray.errors.KtrayError:"  # before its text, where an error comes as text
# What workers say of the death of another.
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "ProcessGroup", "DistBackendError")


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
    """Of workers that failed, by rank, the one whose failure says most: a user's error, else that of the lowest rank
    that does not just echo another's."""

    def worth(rank: int) -> tuple[bool, bool, int]:
        kind = type(failures[rank])
        text = f"{kind.__module__}.{kind.__name__}: {failures[rank]}"
        return MARK not in text, any(mark in text for mark in _ECHOES), rank

    return min(failures, key=worth)
