"""Who works on a directory of the store: one job at a time, whatever clocks, networks and killed processes do.

The folder ``lease/`` holds records ``00000001.json``, ``00000002.json``, ..., each created by one write that fails if
there is such a record, and never changed. The highest says how things stand:

- ``{"owner": ...}``: held. The holder rewrites its own ``beat-OWNER`` every few seconds.
- ``{"free": true}``: nobody works.
- ``{"owner": ..., "file": NAME, "content": ...}``: the holder has ended its work by this record, and NAME is about to
  be written; whoever comes next writes it, if the holder could not.

To take over is to create the next record, and so is to end the work: of a holder that was thought dead and the one that
took over, one only can, and the other finds out. No clocks are compared: a holder is dead when its process is known
to be gone (same machine, same boot, same process namespace), or when its beat was looked at for `STALE_S` and did not
change.
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
REFRESH_S = 5.0
STALE_S = 60.0
_POLL_S = 1.0
# A job that stopped between its look at the records and its own must not find its number free again.
_KEPT = 8

_warned: list[str] = []  # once a process

State = tuple[int, dict[str, Any]]


class Directory(Protocol):
    """The part of `ktray.storage.store.Dir` that a lease needs; see there."""

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
    """Another job has taken the work over."""


def process() -> dict[str, Any]:
    """What tells this process from all others, as far as it can be asked whether it still lives."""
    boot, space = _machine()
    host = socket.gethostname()
    return {"host": host, "boot": boot, "space": space, "pid": os.getpid(), "born": _born(os.getpid())}


@functools.lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """The machine since its start, and the space of process numbers: containers of one name may have several."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()}/{uuid.getnode():x}", ""


def lives(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record runs; None where that cannot be known from here."""
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
    return _born(pid) == record.get("born")


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks since the boot; "" where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


class Lease:
    """The right to work in a directory of the store, and to end the work (`publish`).

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
        """Take the lease. Waits while another live job has it; not ``wait``: False as soon as it is seen to live."""
        self._warn()
        watch = _Watch()
        told = False
        while True:
            number, record = self._state()
            known = lives(record) if record.get("owner") else None
            if not record or "free" in record or known is False or watch.dead(number, self._beat(record)):
                if "file" in record:
                    self._complete(record)
                if self._append(number + 1, {"owner": self.owner, **process()}):
                    break
                continue
            if not wait and (known or watch.lives):
                return False
            if not told:
                holder = f"host {record.get('host')}, pid {record.get('pid')}"
                what = "waiting" if wait else f"looking for up to {STALE_S:.0f} s whether it still does"
                logger.info(f"another job works on {self.home.uri} ({holder}); {what}")
                told = True
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
                f"lease     {self.home.uri} is on a store without conditional writes: two jobs that start within a "
                "second may both do a stage"
            )

    def check(self) -> None:
        """Raises `LeaseLost` if another job has taken over, as far as is known."""
        if self.lost.is_set():
            raise LeaseLost(
                f"Another job has taken over {self.home.uri}: this one was not heard of for {STALE_S:.0f} s",
                "The same command goes on with what the other makes.",
            )

    def publish(self, name: str, content: Any) -> None:
        """End the work with a JSON file, unless another job has taken over.

        Raises:
            LeaseLost: it has; nothing was written.
        """
        self.check()
        record = {"owner": self.owner, **process(), "file": name, "content": content}
        if not self._append(self._number + 1, record):
            self.lost.set()
            self.check()
        self._complete(record)

    def release(self) -> None:
        """Give the lease back; what cannot be written now is left as if the job had died."""
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
        # Two jobs in one directory for a while: what went wrong then has that cause.
        if self.lost.is_set() and isinstance(error, Exception) and not isinstance(error, LeaseLost):
            try:
                self.check()
            except LeaseLost as lost:
                raise lost from error

    # ---------------------------------------------------------------------------------------- records

    def _state(self) -> State:
        """Number and content of the highest record; (0, {}) where there is none."""
        while True:
            number = self._highest()
            if not number:
                return 0, {}
            try:
                record: dict[str, Any] = self.folder.read_json(_record_name(number))
                return number, record
            except FileNotFoundError:
                time.sleep(0.05)  # a newer one stands by now
            except ValueError:  # half of it, on a file system without hard links; its writer may have died over it
                return number, {"owner": "", "host": "?", "pid": 0}

    def _highest(self) -> int:
        return max((int(name[:8]) for name in self.folder.names(".json")), default=0)

    def _append(self, number: int, record: dict[str, Any]) -> bool:
        """Create a record; False if another job was first."""
        if not self.folder.create(_record_name(number), json.dumps(record).encode()):
            return False
        if self._highest() > number:  # older than those that are kept
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
            # A full disk or a store that is away shows up in the work itself, with its cause.
            with contextlib.suppress(OSError, KtrayError):
                self._write_beat(count)
                number, record = self._state()
                if number >= self._number and self.owner not in (record.get("owner"), record.get("by")):
                    self.lost.set()
                    return


class _Watch:
    """How long a holder was seen not to move, by this process's own clock.

    A look counts for two pauses at most: while this process was stopped, or the store away, nothing was seen.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, bytes | None] | None = None
        self._still = 0.0
        self._looked = time.monotonic()
        self.lives = False

    def dead(self, number: int, beat: bytes | None) -> bool:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * _POLL_S), now
        if self._seen == (number, beat):
            self._still += passed
        else:
            self.lives = self._seen is not None
            self._seen, self._still = (number, beat), 0.0
        return self._still > STALE_S


def _record_name(number: int) -> str:
    return f"{number:08d}.json"


def _beat_name(owner: str) -> str:
    return f"beat-{owner}"
