"""Copies of remote files on the disk of a node, so that the processes of a node read each file from the store once.

Training reads the shards of a large set again in every epoch. All processes of a user on a node share the copies:

``files/KEY``
    a copy: a header with the length and the CRC-32 of the content, then the content. A copy is written to another name
    and renamed, so a reader finds a whole copy or none. A copy that differs from its header counts as missing.
``used``
    the bytes that the copies take, at most. When they would exceed the limit, the folder is listed, and the copies
    that were not read for the longest time are deleted (the modification time of a copy is that of its last use).
``locks/``
    files that processes lock: one to write ``used``, and several so that two processes do not fetch the same file.

The cache never makes a read fail: without a folder, without space, or if the folder is deleted, files are read from the
store.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ktray.errors import KtrayError
from ktray.storage.store import Dir

# Folder on a node's own disk below which the copies are kept, and the most bytes that they may take (0: no copies).
FOLDER, LIMIT = "KTRAY_CACHE", "KTRAY_CACHE_BYTES"

logger = logging.getLogger("ktray")

_HEADER = struct.Struct("<4sQI")  # mark, length, CRC-32
_MARK = b"ktc1"
# Shares of the disk's space (free, or taken by copies) that the copies take at most: without a limit, and with one.
_SHARE, _MOST_SHARE = 0.5, 0.9
_WRITTEN_S = 3600.0  # seconds without a write after which a file that has no name yet is a leftover
_KEPT = 0.9  # of the limit that a deletion of old copies leaves, so that not every write has to list the folder


def read_through(directory: Dir, name: str, version: str) -> bytes:
    """The content of a file of the store, from the copy on this node if there is one.

    Args:
        directory, name: the file; on a local store it is read directly.
        version: changes whenever the content may have changed; empty: the file is read from the store.

    Raises:
        OSError: the file cannot be read from the store.
    """
    cache = None if directory.is_local or not version else this_node()
    if cache is None:
        return directory.read(name)
    return cache.read(key_of(directory.uri, name, version), lambda: directory.read(name))


def key_of(*parts: str) -> str:
    """A key that is different for different texts, 64 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def this_node() -> NodeCache | None:
    """`node_cache` with the variables of this process."""
    return node_cache(os.environ.get(FOLDER), os.environ.get(LIMIT))


@functools.lru_cache(maxsize=8)
def node_cache(folder: str | None, limit: str | None) -> NodeCache | None:
    """The cache of this node; None if copies are switched off.

    Args:
        folder, limit: values of `FOLDER` and `LIMIT`. By default, the copies are in the folder for temporary files, and
            take at most as much of its disk as they leave free.

    Raises:
        KtrayError: the limit is not a number of bytes.
    """
    most: int | None = None
    if limit:
        if not limit.isascii() or not limit.isdigit():
            raise KtrayError(
                f"{LIMIT}={limit} is not a number of bytes", f"Set {LIMIT} to a whole number, or unset it."
            )
        most = int(limit)
    if most == 0:
        return None
    # With the user's id in its name, so that users do not share a folder.
    return NodeCache(Path(folder or tempfile.gettempdir()) / f"ktray-cache-{os.getuid()}", most)


class NodeCache:
    """A bounded folder of copies with the least recently used ones deleted first.

    Args:
        folder: the folder; it is created when it is needed, and must belong to this user.
        limit: bytes that the copies take at most; None: half of the disk's space that other files leave.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._warned = False

    def read(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The content under a key. Without a valid copy, ``fetch`` reads it and a copy is kept.

        Args:
            key: hexadecimal digest of what the content depends on.
            fetch: reads the content; its errors are passed on.
        """
        copy = self._copy(key)
        if copy is not None:
            return copy
        with contextlib.ExitStack() as held:
            with self.harmless():
                held.enter_context(self.locked(f"fetch-{key[:2]}"))
            copy = self._copy(key)  # another process may have fetched it while this one waited
            if copy is not None:
                return copy
            data = fetch()
            with self.harmless():
                self._keep(key, data)
        return data

    def _copy(self, key: str) -> bytes | None:
        """The content of a copy; None if there is no valid copy."""
        path = self.folder / "files" / key
        try:
            with open(path, "rb") as file:
                header, data = file.read(_HEADER.size), file.read()
        except OSError:
            return None
        if header != _header(data):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return data

    def _keep(self, key: str, data: bytes) -> None:
        with self.locked("used"):
            if not self.make_room(_HEADER.size + len(data)):
                return
        handle, temporary = tempfile.mkstemp(dir=self.folder / "files", suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                file.write(_header(data))
                file.write(data)
            os.replace(temporary, self.folder / "files" / key)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def make_room(self, size: int) -> bool:
        """Reserve ``size`` bytes, for which old copies may be deleted; returns whether there is room."""
        record = self.folder / "used"
        try:
            used = int(record.read_text())
        except (OSError, ValueError):
            used = self._delete_old(None)
        available = used + shutil.disk_usage(self.folder).free
        limit = int(_SHARE * available) if self.limit is None else min(self.limit, int(_MOST_SHARE * available))
        if size > limit:
            return False
        if used + size > limit:
            used = self._delete_old(max(0, min(limit - size, int(_KEPT * limit))))
        fits = used + size <= limit
        record.write_text(str(used + size * fits))
        return fits

    def _delete_old(self, leave: int | None) -> int:
        """Delete the copies that were not used for the longest time, until they take at most ``leave`` bytes (None: no
        limit); returns the bytes that are left."""
        copies, used, now = [], 0, time.time()
        for entry in os.scandir(self.folder / "files"):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                used += status.st_size
                # A file that is being written is not deleted; after a while, its process must have been killed.
                if not entry.name.endswith(".tmp") or now - status.st_mtime > _WRITTEN_S:
                    copies.append((status.st_mtime_ns, entry.path, status.st_size))
        for _, path, size in sorted(copies):
            if leave is None or used <= leave:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the folder, which is created where it is missing."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(self.folder)
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError("it belongs to another user, or others may write to it")
        for below in ("files", "locks"):
            (self.folder / below).mkdir(exist_ok=True)
        with open(self.folder / "locks" / name, "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the lock ends with the process that holds it
            yield

    @contextlib.contextmanager
    def harmless(self) -> Iterator[None]:
        """Turn an error of the cache's disk into one warning per process."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"'{self.folder}' cannot keep copies of shards ({error.strerror or error}), so shards are read "
                    f"from the store in every epoch; {FOLDER} sets another folder"
                )


def _header(data: bytes) -> bytes:
    return _HEADER.pack(_MARK, len(data), zlib.crc32(data))
