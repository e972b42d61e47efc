"""What Ray needs of the machine on which it starts: an address that it can use, short paths for its sockets, shared
memory, and a home folder."""

from __future__ import annotations

import getpass
import os
import re
import socket
import tempfile
import time
from collections.abc import MutableMapping
from pathlib import Path

from ktray.errors import ResourceError

# The path of a socket has at most 107 bytes on Linux, of which Ray's own part of the path takes about 70:
# /ray/session_2026-11-28_14-30-00_123456_1234567/sockets/plasma_store
_SOCKET_BYTES, _RAY_PART = 107, 72
_SLOW_SHARED = 1e9
_LITTLE_MEMORY = 3e9
LEAST_OBJECT_STORE = 80_000_000  # Ray refuses less than 75 MB


def check_address(address: str | None) -> None:
    """Check ``RAY_ADDRESS``.

    Raises:
        ResourceError: it is an address that a driver cannot join, with the one to use instead.
    """
    if not address:
        return
    if address.startswith("ray://"):
        raise ResourceError(
            f"RAY_ADDRESS={address} is an address of Ray Client, through which Ray Train and Ray Data cannot be driven",
            "Submit the job with `ray job submit --address http://HOST:8265`, as --dry-submit prints it, or run it on "
            "the head node with RAY_ADDRESS=auto.",
        )
    if address.startswith(("http://", "https://")):
        raise ResourceError(
            f"RAY_ADDRESS={address} is the address of a dashboard, which runs submitted jobs only",
            "Submit the job with `ray job submit`, as --dry-submit prints it, or run it on a node of the cluster with "
            "RAY_ADDRESS=auto.",
        )
    if address not in ("auto", "local") and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise ResourceError(f"RAY_ADDRESS={address} is not an address of Ray", "Use HOST:PORT (6379), or auto.")


def check_answers(address: str, within: float = 30.0) -> None:
    """Check that something listens at ``HOST:PORT``. Ray itself tries for minutes and says nothing that a person reads.

    Args:
        within: seconds to try; a head that starts at the same time needs some.

    Raises:
        ResourceError: nothing listens there.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + within
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise not_reached(address, error) from error
        time.sleep(1.0)


def not_reached(address: str, error: BaseException) -> ResourceError:
    """The error for a cluster that cannot be joined."""
    text = " ".join(str(error).split())
    if address == "auto":
        return ResourceError(
            "RAY_ADDRESS=auto, and no Ray runs on this machine",
            "Start one with `ray start --head`, set RAY_ADDRESS to HOST:6379, or unset it: ktray then starts Ray.",
        )
    return ResourceError(
        f"The Ray cluster at RAY_ADDRESS={address} cannot be joined: {text[:200]}",
        "Check that its head is up (`ray status`) and that this machine is one of its nodes, or submit the job with "
        "`ray job submit`. Unset RAY_ADDRESS to start Ray on this machine.",
    )


def use_short_temporary_folder(environment: MutableMapping[str, str]) -> str:
    """Set ``RAY_TMPDIR`` if the temporary folder has a path that is too long for Ray's sockets, as Slurm, PBS and macOS
    have them. Returns what was done, as a sentence; empty if nothing was."""
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(folder)) + _RAY_PART <= _SOCKET_BYTES:
        return ""
    short = Path("/tmp")
    if not os.access(short, os.W_OK):
        raise ResourceError(
            f"The temporary folder '{folder}' has too long a path for Ray's sockets, and {short} cannot be written",
            f"Set RAY_TMPDIR to a folder whose path has at most {_SOCKET_BYTES - _RAY_PART} bytes.",
        )
    environment["RAY_TMPDIR"] = str(short)
    return f"Ray's files are in {short}: the path of TMPDIR is too long for its sockets"


def shared_memory(object_store: float, memory: float) -> list[str]:
    """What will be slow on this machine, as sentences.

    Args:
        object_store: size of Ray's object store, bytes.
        memory: memory that this process may use, bytes.
    """
    problems = []
    try:
        shared = os.statvfs("/dev/shm")
        free = shared.f_bavail * shared.f_frsize
    except OSError:
        free = 0
    if free < min(object_store, _SLOW_SHARED):
        problems.append(
            f"/dev/shm has {free / 1e6:.0f} MB: Ray keeps its objects on disk, which is slow. In a container, start it "
            f"with --shm-size={max(1, round(object_store / 1e9))}g"
        )
    if memory < _LITTLE_MEMORY:
        problems.append(
            f"{memory / 1e9:.1f} GB of memory are little, because Ray and one worker need about 3 GB. If a stage is "
            "killed, set train.batch_size lower, or use a smaller student or a larger machine"
        )
    return problems


def give_a_home(environment: MutableMapping[str, str]) -> str:
    """Set ``HOME`` (and ``USER``) for a process whose user has none, as in containers that run under a free user id.
    Libraries ask for both. Returns what was done, as a sentence; empty if nothing was."""
    try:
        place = Path.home()
    except RuntimeError:  # no HOME, and no entry of the user
        place = Path("/")
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        environment.setdefault("USER", f"user{os.getuid()}")
    if place != Path("/") and os.access(place, os.W_OK):
        environment.setdefault("HOME", str(place))
        return ""
    spare = Path(tempfile.gettempdir()) / f"ktray-home-{os.getuid()}"
    spare.mkdir(mode=0o700, exist_ok=True)
    environment["HOME"] = str(spare)
    return f"HOME={spare}: the user has no home folder that can be written"
