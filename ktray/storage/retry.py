"""Retries for a store on the network: requests that a busy store does not answer are repeated, with one message."""

from __future__ import annotations

import contextlib
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from ktray.storage.network import is_certificate

T = TypeVar("T")

RETRY_S = 120.0  # seconds after which a request is not repeated any more
_PAUSES_S = (0.5, 8.0)  # the first and the longest pause between two attempts

_BUSY_CODES = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted")

_retry_seconds: ContextVar[float] = ContextVar("retry-seconds", default=RETRY_S)

_BUSY = re.compile(
    r"HTTP status (?:429|5\d\d)|curlCode|AWS Error (?:SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|"
    r"REQUEST_TIMEOUT|NETWORK_CONNECTION)"
)


@contextlib.contextmanager
def retry_for(seconds: float) -> Iterator[None]:
    """Use another limit than `RETRY_S` for the requests of this thread within this context."""
    token = _retry_seconds.set(seconds)
    try:
        yield
    finally:
        _retry_seconds.reset(token)


def busy(error: Exception) -> bool:
    """Whether the store may answer the same request later."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status == 429 or (status >= 500 and status != 501) or code(error) in _BUSY_CODES
    if is_certificate(error):
        return False
    if isinstance(error, exceptions.HTTPClientError):
        return True
    return isinstance(error, OSError) and bool(_BUSY.search(str(error)))


class RetryPolicy:
    """Repeats requests to a busy store. It prints one message per outage, however many threads wait.

    Args:
        where: name of the store for the messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._lock = threading.Lock()
        self._since: float | None = None

    def call(self, request: Callable[[], T]) -> T:
        """Make a request and return its result; repeat it with growing pauses while the store is busy.

        Raises:
            OSError: the store was busy for longer than the limit (`retry_for`).
            Exception: any other error of the request, without a retry.
        """
        began, pause = time.monotonic(), _PAUSES_S[0]
        while True:
            try:
                value = request()
            except Exception as error:
                if not busy(error):
                    raise
                spent = time.monotonic() - began
                if spent > _retry_seconds.get():
                    raise OSError(f"{self.where} has not answered for {spent:.0f} s: {line(error)}") from error
                self._report(error)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(_PAUSES_S[1], pause * 2)
            else:
                if self._since is not None:
                    self._report_end()
                return value

    def _report(self, error: Exception) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                seconds = _retry_seconds.get()
                _say(f"{self.where} is busy or unreachable, retrying for {seconds:.0f} s: {line(error)}")

    def _report_end(self) -> None:
        with self._lock:
            if self._since is not None:
                _say(f"{self.where} answers again after {time.monotonic() - self._since:.0f} s")
                self._since = None


def _say(text: str) -> None:
    print(f"s3        {text}", file=sys.stderr, flush=True)


def line(error: Exception) -> str:
    """The message of an error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def code(error: Any) -> str:
    """S3's code of a botocore `ClientError`, such as ``SlowDown``; "" if it has none."""
    return str(error.response.get("Error", {}).get("Code", ""))
