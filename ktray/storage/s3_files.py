"""The files of `ktray.storage.s3`, with the methods that pyarrow expects of Python files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa

from ktray.storage.concurrent import in_order

_IN_MEMORY = 1 << 26  # bytes; larger files are kept on the local disk until their upload
_BLOCK = 1 << 23  # bytes
_PART, _PARTS_AT_ONCE = 1 << 23, 8  # bytes in a part of a large read, and parts that are requested concurrently

WithRetries = Callable[[Callable[[], Any]], Any]


class Reader:
    """A file for reading. A failed read is repeated from the same position."""

    def __init__(self, opened: Callable[[], pa.NativeFile], with_retries: WithRetries) -> None:
        self._with_retries = with_retries
        self._file: pa.NativeFile = with_retries(opened)
        self._size = int(with_retries(self._file.size))
        self._at = 0
        self.closed = False

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if not count:
            return b""
        # One answer of S3 has 80 to 100 MB/s, so the parts of a large read are requested concurrently.
        step = count if count < 2 * _PART else _PART
        starts = range(self._at, self._at + count, step)
        parts = [partial(self._read_at, min(step, self._at + count - start), start) for start in starts]
        data = b"".join(in_order(parts, min(_PARTS_AT_ONCE, len(parts))))
        self._at += len(data)
        return data

    def _read_at(self, count: int, start: int) -> bytes:
        data: bytes = self._with_retries(lambda: self._file.read_at(count, start))
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._file.close()


class Writer:
    """A file for writing. It is uploaded when it is closed, so that an upload can be repeated from the start."""

    def __init__(self, opened: Callable[[], pa.NativeFile], with_retries: WithRetries) -> None:
        self._opened, self._with_retries = opened, with_retries
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115
        self.closed = False

    def write(self, data: Any) -> int:
        return self._spool.write(memoryview(data))

    def tell(self) -> int:
        return self._spool.tell()

    def flush(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        with self._spool:
            self._with_retries(self._send)

    def _send(self) -> None:
        self._spool.seek(0)
        with self._opened() as stream:
            shutil.copyfileobj(self._spool, stream, _BLOCK)
