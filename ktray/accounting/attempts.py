"""The log of a stage's attempts: one record at the start of an attempt, heartbeats, and one at its end."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Protocol

LOG_NAME = "ledger.jsonl"


class Log(Protocol):
    """The log with the records of one stage under one key."""

    def append(self, line: str) -> None:
        """Append a record; it must still exist when this process has ended."""

    def read(self) -> list[str]:
        """All records in their order."""


class LogDirectory(Protocol):
    """The part of `ktray.storage.store.Dir` that `DirLog` needs."""

    def append_line(self, name: str, line: str) -> None: ...

    def read_lines(self, name: str) -> list[str]: ...


@dataclass(frozen=True)
class DirLog:
    """A `Log` in a directory of the store."""

    directory: LogDirectory

    def append(self, line: str) -> None:
        self.directory.append_line(LOG_NAME, line)

    def read(self) -> list[str]:
        return self.directory.read_lines(LOG_NAME)


@dataclass(frozen=True)
class Entry:
    """One attempt at a stage.

    Attributes:
        stage, key: name of the stage, and the hash of its inputs.
        attempt: number of the attempt under this key, from 1.
        run: id of the run that made the attempt.
        flops: FLOPs that were executed, forward and backward.
        device_seconds: wall seconds times the devices that were held (accelerators, or machines without any).
        wall_seconds: elapsed time.
        images: number of images that were processed; repeats count.
        start_seconds: the part of ``device_seconds`` before the work on images began: what the first count of images
            took, less what so many images took later. 0 if all images were counted at once.
        peak_memory_bytes: largest peak of the processes that reported.
        kwh: measured energy; None if it was not measured.
        usd: price; None if the price of the device is not known.
        cached: whether this run reused the attempt instead of making it.
        restarts: how often the workers restarted, from a checkpoint or with another number of workers.
        lost_flops: the part of ``flops`` that a restart repeated.
        state: ``running`` (the attempt still runs or was killed), ``done`` or ``failed``.
    """

    stage: str
    key: str
    attempt: int = 1
    run: str = ""
    flops: int = 0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    images: int = 0
    start_seconds: float = 0.0
    peak_memory_bytes: int = 0
    kwh: float | None = None
    usd: float | None = 0.0
    cached: bool = False
    restarts: int = 0
    lost_flops: int = 0
    state: str = "done"


def attempts(lines: Iterable[str]) -> list[Entry]:
    """The attempts in a log, each with its last record. Incomplete lines of a killed process are ignored."""
    names = {f.name for f in fields(Entry)}
    latest: dict[tuple[str, str, int], Entry] = {}
    for line in lines:
        try:
            record = json.loads(line)
            entry = Entry(**{name: value for name, value in record.items() if name in names})
        except (ValueError, TypeError, AttributeError):
            continue
        latest[entry.stage, entry.key, entry.attempt] = entry
    return list(latest.values())
