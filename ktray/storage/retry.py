"""Patience with a store on the network: what it is too busy to answer is asked again, and that is told once."""

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

T = TypeVar("T")

PATIENCE_S = 120.0
_PAUSES_S = (0.5, 8.0)

_BUSY_CODES = ("SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted")

_patience: ContextVar[float] = ContextVar("patience", default=PATIENCE_S)

_BUSY = re.compile(
    r"HTTP status (?:429|5\d\d)|curlCode|AWS Error (?:SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|"
    r"REQUEST_TIMEOUT|NETWORK_CONNECTION)"
)


@contextlib.contextmanager
def retry_for(seconds: float) -> Iterator[None]:
    """Another limit than `PATIENCE_S`, for what this thread asks inside."""
    before = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(before)


def busy(error: Exception) -> bool:
    """Whether the store may answer the same question later."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status == 429 or (status >= 500 and status != 501) or code(error) in _BUSY_CODES
    if isinstance(error, exceptions.HTTPClientError):
        return True
    return isinstance(error, OSError) and bool(_BUSY.search(str(error)))


class RetryPolicy:
    """Asks again, and tells that it does: once an outage, whatever number of threads wait."""

    def __init__(self, where: str) -> None:
        self.where = where
        self._lock = threading.Lock()
        self._since: float | None = None

    def call(self, request: Callable[[], T]) -> T:
        """The request's result.

        Raises:
            OSError: the store was busy for longer than the patience; or the request's own error at once.
        """
        began, pause = time.monotonic(), _PAUSES_S[0]
        while True:
            try:
                value = request()
            except Exception as error:
                if not busy(error):
                    raise
                spent = time.monotonic() - began
                if spent > _patience.get():
                    raise OSError(f"{self.where} does not answer, for {spent:.0f} s: {line(error)}") from error
                self._tell(error)
                time.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(_PAUSES_S[1], pause * 2)
            else:
                if self._since is not None:
                    self._over()
                return value

    def _tell(self, error: Exception) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                _say(f"{self.where} is busy or away, trying again for {_patience.get():.0f} s: {line(error)}")

    def _over(self) -> None:
        with self._lock:
            if self._since is not None:
                _say(f"{self.where} answers again, after {time.monotonic() - self._since:.0f} s")
                self._since = None


def _say(text: str) -> None:
    print(f"s3        {text}", file=sys.stderr, flush=True)


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
