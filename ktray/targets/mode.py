"""Whether the teacher's outputs are stored, or made while the student trains: the arithmetic of ``teach.mode=auto``."""

from __future__ import annotations

import shutil
from pathlib import Path

# Of a disk's free space, for one transfer set.
SHARE = 0.5


def choose_mode(rows: int, drawn: int, row_bytes: int, free: int | None, streaming: int) -> tuple[str, str]:
    """(mode, reason).

    The teacher sees ``rows`` views when its outputs are stored, and ``drawn`` when they are not.

    Args:
        rows: views in the transfer set.
        drawn: views that training will use, each as often as it comes.
        row_bytes: of a stored view with its targets.
        free: bytes for the store; None: as many as are wanted.
        streaming: teachers that have a device beside each training worker.
    """
    size = rows * row_bytes
    often = f"training uses {drawn:,} views, there are {rows:,}"
    if free is not None and size > SHARE * free:
        why = f"{size / 1e9:.3g} GB of targets are too much for {free / 1e9:.3g} GB of free space"
    elif drawn >= rows:
        return "cached", f"{often}: the teacher is paid once a view, {size / 1e9:.2g} GB stored"
    else:
        why = f"{often}: storing them all would cost the teacher more"
    return ("streamed", f"{why}; teachers have devices of their own") if streaming else ("live", why)


def free_bytes(store: str) -> int | None:
    """Free space where a store lies; None for object storage."""
    if "://" in store:
        return None
    folder = Path(store).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
