"""The memory of windows, which each new window takes over from one that is no longer needed.

Windows have hundreds of megabytes and nearly the same size. If `malloc` places them, smaller arrays come into the place
of a freed window. The next window, if it is only a little larger, then gets a new place, until the process holds the
memory of three windows where one is in use.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np

from ktray.storage.columns import Rows

_SMALL = 1 << 20  # bytes up to which a column has no buffer
_SPARE = 8  # part of a buffer that is left free, so that a slightly larger window fits in; memory is used when written
_KEPT = 4  # free buffers: the large columns of a window


class WindowBuffers:
    """Buffers for the columns of windows. One thread takes them."""

    def __init__(self) -> None:
        # Buffers come back whenever an array is collected, perhaps in the middle of `_take`: a lock could wait for
        # itself, and the operations of a deque need none.
        self._free: deque[mmap.mmap] = deque()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with any content. Its memory is used again as soon as neither it nor a view of it exists."""
        size = int(np.prod(shape)) * dtype.itemsize
        if size <= _SMALL or dtype.hasobject or not hasattr(mmap, "MAP_PRIVATE"):
            return np.empty(shape, dtype)
        buffer = self._take(size)
        array = np.frombuffer(buffer, np.uint8, size)
        weakref.finalize(array, self._free.append, buffer).atexit = False
        return array.view(dtype).reshape(shape)

    def _take(self, size: int) -> mmap.mmap:
        free: list[mmap.mmap] = []
        while self._free:
            free.append(self._free.popleft())
        free = sorted(free, key=len)[-_KEPT:]
        for at, buffer in enumerate(free):
            if size <= len(buffer) <= 2 * size:
                self._free.extend(free[:at] + free[at + 1 :])
                return buffer
        # The first windows of a training are small, each twice the one before. Their buffers will not be needed.
        self._free.extend(buffer for buffer in free if len(buffer) > size)
        return mmap.mmap(-1, size + size // _SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class FillingWindow:
    """A window whose rows arrive in parts, which are copied as they arrive.

    Args:
        rows: number of rows that the window will have at most.
    """

    def __init__(self, rows: int, buffers: WindowBuffers) -> None:
        self._rows, self._buffers = rows, buffers
        self._columns: Rows = {}
        self._texts: dict[str, list[np.ndarray]] = {}  # columns of texts, whose dtype depends on the longest one
        self._filled = 0

    def add(self, part: Rows) -> None:
        """Append rows. All parts have the same columns."""
        if not self._columns and not self._texts:
            for name, values in part.items():
                if values.dtype.kind in "USO":
                    self._texts[name] = []
                else:
                    self._columns[name] = self._buffers.empty((self._rows, *values.shape[1:]), values.dtype)
        count = len(next(iter(part.values())))
        for name, values in part.items():
            if name in self._texts:
                self._texts[name].append(np.array(values))
            else:
                self._columns[name][self._filled : self._filled + count] = values
        self._filled += count

    def take(self) -> Rows:
        """The rows that have arrived; the window is empty afterwards."""
        taken = {name: values[: self._filled] for name, values in self._columns.items()}
        taken |= {name: np.concatenate(values) for name, values in self._texts.items()}
        self._columns, self._texts, self._filled = {}, {}, 0
        return taken
