"""Gives memory that this process has freed back to the system.

Ray's workers keep it (`ktray.distributed.connect.TUNED`), because a training step is faster without asking the system
for it. But Ray reuses its processes, and one that has decoded a gallery would hold gigabytes while another trains.
"""

from __future__ import annotations

import contextlib
import ctypes
import time

_EVERY_S = 5.0  # so that short tasks do not ask the system for the same memory again and again
_last = 0.0


def give_back(now: bool = False) -> None:
    """Give freed memory back, if this has not happened in the last seconds, or ``now``. Only glibc can; elsewhere
    nothing happens."""
    global _last
    if now or time.monotonic() - _last > _EVERY_S:
        _last = time.monotonic()
        with contextlib.suppress(OSError, AttributeError):  # no glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
