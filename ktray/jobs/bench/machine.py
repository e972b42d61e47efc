"""The load of the machine and the memory of processes, without which a measurement cannot be judged."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def busy_cores(seconds: float = 2.0, stat: Path = Path("/proc/stat")) -> float | None:
    """Measure the number of busy cores over seconds in which this process only waits; None without Linux's /proc."""
    if not stat.exists():
        return None
    before, began = _used(stat), time.monotonic()
    time.sleep(seconds)
    return (_used(stat) - before) / _TICKS / (time.monotonic() - began)


def _used(stat: Path) -> int:
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


class Peak:
    """``bytes``: the most memory that this process and all its descendants held together."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak_memory(every: float = 2.0) -> Iterator[Peak]:
    """Watch the memory of this process and its descendants (including Ray's processes if this process started Ray).

    The memory is the sum of proportional set sizes, so shared pages, such as Ray's object store, are counted once. It
    is read on entry, every ``every`` seconds, and on exit, so that short work is measured too.
    """
    peak, stop = Peak(), threading.Event()

    def look() -> None:
        peak.bytes = max(peak.bytes, held(os.getpid()))

    def watch() -> None:
        while not stop.wait(every):
            look()

    look()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        look()


def held(root: int) -> int:
    """Return the bytes that a process and its descendants hold now; 0 without Linux's /proc."""
    return sum(held_by_process(root).values())


def held_by_process(root: int) -> dict[int, int]:
    """Return the bytes that each process of ``root`` and its descendants holds now, by process id; empty without
    Linux's /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):  # the process has ended
            continue
        children.setdefault(parent, []).append(int(entry.name))
    bytes_of, todo = {}, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        bytes_of[pid] = 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return bytes_of
