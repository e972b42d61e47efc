"""Memory and CPU time of every process of a job, by stage, from /proc (Linux)."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

MARK = "KTRAY_REHEARSAL"
BETWEEN = "between stages"
_TICK = os.sysconf("SC_CLK_TCK")
_STAGE = re.compile(r"^(?:\[[^]]*] )?([a-z_]+): ")


@dataclass
class StageSeen:
    """What was seen while a stage's progress line was the newest one, and the stage was not done.

    Attributes:
        seconds: how long that was, in all.
        driver_cpu: CPU seconds of the driver's process.
        memory: by role, the private memory in bytes of its largest process: at the first look, the largest, at the
            last look.
        shared: the largest object store, bytes.
    """

    seconds: float = 0.0
    driver_cpu: float = 0.0
    memory: dict[str, list[int]] = field(default_factory=dict)
    shared: int = 0

    @property
    def driver_share(self) -> float:
        """CPU seconds of the driver for each second of the stage."""
        return self.driver_cpu / max(self.seconds, 1e-9)


class Watch:
    """Looks at the processes that carry a mark in their environment, once a second, until `stop`.

    Args:
        mark: value of ``KTRAY_REHEARSAL`` in the processes' environment.
        driver: pid of the driver.
        stages: the stages of which the job may show progress.
    """

    def __init__(self, mark: str, driver: int, stages: set[str]) -> None:
        self.stages: dict[str, StageSeen] = {}
        self._mark, self._driver, self._known = f"{MARK}={mark}".encode(), driver, stages
        self._began, self._current = time.monotonic(), "start"
        self._cpu, self._looked = 0.0, self._began
        self._marked: dict[int, bool] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._looks, daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """A line of the job's output, which may tell that another stage works."""
        found = _STAGE.match(text)
        if found and found[1] in self._known:
            with self._lock:
                self._current = BETWEEN if f"{found[1]}: done" in text else found[1]

    def stop(self) -> dict[str, StageSeen]:
        self._stop.set()
        self._thread.join()
        return self.stages

    def _looks(self) -> None:
        while not self._stop.wait(1.0):
            with self._lock:
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        seen = self.stages.setdefault(self._current, StageSeen())
        seen.seconds += now - self._looked
        self._looked = now
        largest: dict[str, int] = defaultdict(int)
        for pid in self._processes():
            role = "driver" if pid == self._driver else _role(pid)
            private, shared = _memory(pid)
            largest[role] = max(largest[role], private)
            if role == "raylet":
                seen.shared = max(seen.shared, shared)
        for role, size in largest.items():
            first, most, _ = seen.memory.get(role, [size, size, size])
            seen.memory[role] = [first, max(most, size), size]
        cpu = _cpu(self._driver)
        seen.driver_cpu += max(0.0, cpu - self._cpu)
        self._cpu = max(cpu, self._cpu)

    def _processes(self) -> list[int]:
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        for pid in pids:
            if pid not in self._marked:
                try:
                    self._marked[pid] = self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
        return [pid for pid in pids if self._marked.get(pid)]


def workers(mark: str, name: bytes) -> list[int]:
    """Pids of the marked processes whose title begins with ``ray::`` and the name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            title, settings = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::" + name) and f"{MARK}={mark}".encode() in settings.split(b"\0"):
            found.append(int(path.name))
    return found


def _role(pid: int) -> str:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return "ended"
    if title.startswith("ray::"):
        return re.split(r"[.(]", title.removeprefix("ray::"))[0] or "worker"
    return Path(title).name.split(" ")[0]


def _memory(pid: int) -> tuple[int, int]:
    """Private and shared resident memory, in bytes. Pages of the object store and of mapped files are shared."""
    sizes = {"RssAnon": 0, "RssShmem": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) * 1024
    except OSError:
        pass
    return sizes["RssAnon"], sizes["RssShmem"]


def _cpu(pid: int) -> float:
    """CPU seconds of a process, all its threads."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(values[11]) + int(values[12])) / _TICK
