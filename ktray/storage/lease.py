"""The lease: only one job at a time works on a directory of the store, even if clocks, networks or processes fail.

The folder ``lease/`` holds records ``00000001.json``, ``00000002.json``, and so on. Each record is created by a write
that fails if the record exists, and it never changes. The highest record is the current state:

- ``{"owner": ...}``: the lease is held. The holder rewrites its own ``beat-OWNER`` every few seconds.
- ``{"free": true}``: the lease is free.
- ``{"owner": ..., "file": NAME, "content": ...}``: the holder has ended its work with this record, and NAME is about to
  be written. If the holder cannot write it, the next job does.

A job takes over by creating the next record, and a holder ends its work by creating the next record. If a holder was
wrongly taken for dead, only one of the two jobs can create that record, and the other one notices. No clocks are
compared. A holder counts as dead if its process is known to be gone (same machine, same boot, same process namespace),
or if its heartbeat was watched for `STALE_S` and did not change.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ktray.errors import KtrayError

logger = logging.getLogger("ktray")

FOLDER = "lease"
REFRESH_S = 5.0  # seconds between two heartbeats
STALE_S = 60.0  # seconds without a new heartbeat after which a holder counts as dead
_POLL_S = 1.0  # seconds between two looks at the records
# Number of records that are kept. A job that was stopped between its look at the records and the creation of its own
# record must not find that number free again.
_KEPT = 8

_warned: list[str] = []  # the warning is shown once per process

State = tuple[int, dict[str, Any]]


class Directory(Protocol):
    """The part of `ktray.storage.store.Dir` that a lease needs; the methods are documented there."""

    @property
    def uri(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def exclusive(self) -> bool: ...

    def sub(self, name: str) -> Directory: ...

    def names(self, suffix: str = "") -> dict[str, int]: ...

    def read(self, name: str) -> bytes: ...

    def read_json(self, name: str) -> Any: ...

    def write(self, name: str, data: bytes) -> None: ...

    def write_json(self, name: str, value: Any) -> None: ...

    def create(self, name: str, data: bytes) -> bool: ...

    def delete(self, name: str = "") -> None: ...


class LeaseLost(KtrayError):
    """Another job has taken over the directory."""


def process() -> dict[str, Any]:
    """The identity of this process, with all that is needed to find out later whether it still runs."""
    boot, namespace = _machine()
    host = socket.gethostname()
    return {"host": host, "boot": boot, "space": namespace, "pid": os.getpid(), "born": _start_time(os.getpid())}


@functools.lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """Id of the machine's current boot, and its process namespace: containers with the same host name may differ."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}", ""


def lives(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record runs; None if this process cannot find out."""
    me = process()
    if os.name != "posix" or any(record.get(name) != me[name] for name in ("boot", "space")):
        return None
    pid = int(record["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(pid) == record.get("born")


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks since the boot; "" if there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


class Lease:
    """The right to work in a directory of the store and to end the work (`publish`).

    Args:
        home: the directory.
    """

    def __init__(self, home: Directory) -> None:
        self.home = home
        self.folder = home.sub(FOLDER)
        self.owner = uuid.uuid4().hex
        self.lost = threading.Event()
        self._number = 0
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lease; wait while another live job holds it.

        Args:
            wait: False: do not wait, but return False as soon as the holder is known to be alive.

        Returns:
            Whether this job holds the lease now.
        """
        self._warn()
        watch = _HolderWatch()
        reported = False
        while True:
            number, record = self._state()
            alive = lives(record) if record.get("owner") else None
            if not record or "free" in record or alive is False or watch.dead(number, self._beat(record)):
                if "file" in record:
                    self._complete(record)
                if self._append(number + 1, {"owner": self.owner, **process()}):
                    break
                continue
            if not wait and (alive or watch.alive):
                return False
            if not reported:
                holder = f"host {record.get('host')}, pid {record.get('pid')}"
                action = "waiting for it" if wait else f"checking for up to {STALE_S:.0f} s whether it still runs"
                logger.info(f"another job works on {self.home.uri} ({holder}); {action}")
                reported = True
            time.sleep(_POLL_S)
        for name in self.folder.names():
            if name.startswith("beat-") and name != _beat_name(self.owner):
                self.folder.delete(name)
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()
        return True

    def _warn(self) -> None:
        if not self.folder.exclusive and not _warned:
            _warned.append(self.home.uri)
            logger.info(
                f"lease     {self.home.uri} is on a store without conditional writes: if two jobs start within one "
                "second, both may compute the same stage"
            )

    def check(self) -> None:
        """Check whether this job still holds the lease, as far as it knows.

        Raises:
            LeaseLost: another job has taken over.
        """
        if self.lost.is_set():
            raise LeaseLost(
                f"Another job has taken over {self.home.uri}, because this job gave no heartbeat for {STALE_S:.0f} s",
                "Run the same command again: it continues with the results of the other job.",
            )

    def publish(self, name: str, content: Any) -> None:
        """End the work by writing a JSON file.

        Raises:
            LeaseLost: another job has taken over; nothing was written.
        """
        self.check()
        record = {"owner": self.owner, **process(), "file": name, "content": content}
        if not self._append(self._number + 1, record):
            self.lost.set()
            self.check()
        self._complete(record)

    def release(self) -> None:
        """Free the lease. If that cannot be written now, the next job treats this one as a job that died."""
        self._stop.set()
        if self._keeper:
            self._keeper.join(timeout=REFRESH_S)
        with contextlib.suppress(OSError, KtrayError):
            if not self.lost.is_set():
                self._append(self._number + 1, {"free": True, "by": self.owner})
            self.folder.delete(_beat_name(self.owner))

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()
        # For a while two jobs worked in one directory, so that is the cause of the error.
        if self.lost.is_set() and isinstance(error, Exception) and not isinstance(error, LeaseLost):
            try:
                self.check()
            except LeaseLost as lost:
                raise lost from error

    # ---------------------------------------------------------------------------------------- records

    def _state(self) -> State:
        """Number and content of the highest record; (0, {}) if there is none."""
        while True:
            number = self._highest()
            if not number:
                return 0, {}
            try:
                record: dict[str, Any] = self.folder.read_json(_record_name(number))
                return number, record
            except FileNotFoundError:
                time.sleep(0.05)  # a newer record exists by now
            except ValueError:  # half a record, on a file system without hard links; its writer may have died
                return number, {"owner": "", "host": "?", "pid": 0}

    def _highest(self) -> int:
        return max((int(name[:8]) for name in self.folder.names(".json")), default=0)

    def _append(self, number: int, record: dict[str, Any]) -> bool:
        """Create a record; False if another job was first."""
        if not self.folder.create(_record_name(number), json.dumps(record).encode()):
            return False
        if self._highest() > number:  # the number was free only because older records are deleted
            self.folder.delete(_record_name(number))
            return False
        self._number = number
        if "free" not in record:
            self._write_beat(0)
        with contextlib.suppress(OSError):
            for name in list(self.folder.names(".json"))[:-_KEPT]:
                self.folder.delete(name)
        return True

    def _complete(self, record: dict[str, Any]) -> None:
        self.home.write_json(record["file"], record["content"])

    # ------------------------------------------------------------------------------------------ beats

    def _beat(self, record: dict[str, Any]) -> bytes | None:
        try:
            return self.folder.read(_beat_name(str(record.get("owner"))))
        except FileNotFoundError:
            return None

    def _write_beat(self, count: int) -> None:
        self.folder.write(_beat_name(self.owner), str(count).encode())

    def _keep(self) -> None:
        count = 0
        while not self._stop.wait(REFRESH_S):
            count += 1
            # A full disk or an unreachable store becomes visible in the work itself, with its cause.
            with contextlib.suppress(OSError, KtrayError):
                self._write_beat(count)
                number, record = self._state()
                if number >= self._number and self.owner not in (record.get("owner"), record.get("by")):
                    self.lost.set()
                    return


class _HolderWatch:
    """Measures with this process's own clock how long a holder's heartbeat has not changed.

    One look counts for at most two pauses: while this process was stopped or the store was unreachable, nothing was
    observed.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, bytes | None] | None = None
        self._still = 0.0
        self._looked = time.monotonic()
        self.alive = False  # whether the heartbeat was seen to change

    def dead(self, number: int, beat: bytes | None) -> bool:
        """Whether the holder counts as dead, with this look at the record's number and its heartbeat."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * _POLL_S), now
        if self._seen == (number, beat):
            self._still += passed
        else:
            self.alive = self._seen is not None
            self._seen, self._still = (number, beat), 0.0
        return self._still > STALE_S


def _record_name(number: int) -> str:
    return f"{number:08d}.json"


def _beat_name(owner: str) -> str:
    return f"beat-{owner}"
