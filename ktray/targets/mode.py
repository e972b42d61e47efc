"""The rule of ``teach.mode=auto``: whether targets are stored, or computed while the student is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

# The share of a disk's free space that one transfer set may use.
SHARE = 0.5


def choose_mode(rows: int, drawn: int, row_bytes: int, free: int | None, streaming: int) -> tuple[str, str]:
    """Choose between cached, streamed and live targets.

    The teacher processes ``rows`` views if its outputs are stored, and ``drawn`` views if they are not.

    Args:
        rows: views in the transfer set.
        drawn: views that training uses, with repetitions.
        row_bytes: size of a stored view with its targets, in bytes.
        free: free space of the store, in bytes; None: unlimited.
        streaming: number of teachers that have devices of their own, in addition to those of the training workers.

    Returns:
        Mode (``cached``, ``streamed`` or ``live``) and the reason for the log.
    """
    size = rows * row_bytes
    usage = f"training uses {drawn:,} views, and the transfer set has {rows:,}"
    if free is not None and size > SHARE * free:
        reason = f"{size / 1e9:.3g} GB of targets are too large for {free / 1e9:.3g} GB of free space"
    elif drawn >= rows:
        return "cached", f"{usage}: the teacher processes each view once, and {size / 1e9:.2g} GB are stored"
    else:
        reason = f"{usage}: storing all of them would cost more teacher time"
    return ("streamed", f"{reason}; the teachers have devices of their own") if streaming else ("live", reason)


def free_bytes(store: str) -> int | None:
    """Free space of the file system of a store, in bytes; None for object storage."""
    if "://" in store:
        return None
    folder = Path(store).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
