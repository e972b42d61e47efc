"""The store: content-addressed stage directories and run folders, on a local disk or S3.

A stage directory ``stages/<stage>/<key>/`` is whole once ``manifest.json`` stands in it: the manifest is
written last, by rename (local) or a single put (S3), so a half-written directory is never taken for a whole
one, and what a killed stage left (shards, checkpoints) stays in place for the next attempt to go on from.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from ktray.errors import KtrayError

LEASE_REFRESH_S = 5.0
LEASE_STALE_S = 60.0


def storage_error(error: OSError, where: str) -> KtrayError:
    """The user's view of an error of the file system."""
    if error.errno == errno.ENOSPC:
        return KtrayError(f"No space is left on the disk of '{where}'", "Free space or set store= to another disk.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return KtrayError(f"No permission to write to '{where}'", "Set store= to a folder that you may write to.")
    return KtrayError(f"'{where}' cannot be written: {error}".replace("\n", " "), "Check store= and its disk.")


class Dir:
    """A directory of the store. Picklable; safe to use from workers on other machines when it is on S3."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        if "://" in self.uri:
            try:
                self.fs, self.path = pafs.FileSystem.from_uri(self.uri)
            except (OSError, ValueError) as error:
                raise KtrayError(
                    f"Store '{self.uri}' cannot be opened: {error}", "Check store= and credentials."
                ) from error
        else:
            self.fs, self.path = pafs.LocalFileSystem(), str(Path(self.uri).absolute())
            self.uri = self.path

    def __getstate__(self) -> str:
        return self.uri

    def __setstate__(self, uri: str) -> None:
        self.uri = uri
        self._connect()

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def sub(self, name: str) -> Dir:
        return Dir(f"{self.uri}/{name}")

    def file(self, name: str) -> str:
        """Path of a file for readers that know ``s3://`` themselves (Ray Data, pyarrow)."""
        return f"{self.uri}/{name}"

    def exists(self, name: str = "") -> bool:
        info = self.fs.get_file_info(f"{self.path}/{name}".rstrip("/"))
        return bool(info.type != pafs.FileType.NotFound)

    def names(self, suffix: str = "") -> dict[str, int]:
        """Files directly in this directory, name to size in bytes, sorted by name."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = {i.base_name: i.size for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.File}
        return {name: found[name] for name in sorted(found) if name.endswith(suffix)}

    def children(self) -> list[str]:
        """Names of the directories directly in this one, sorted."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(i.base_name for i in self.fs.get_file_info(selector) if i.type == pafs.FileType.Directory)

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing (a reader never sees half of it)."""
        target = f"{self.path}/{name}"
        try:
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
                try:
                    with open(temporary, "wb") as stream:
                        stream.write(data)
                        stream.flush()
                        os.fsync(stream.fileno())
                    os.replace(temporary, target)
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary)
            else:
                with self.fs.open_output_stream(target) as stream:
                    stream.write(data)
        except OSError as error:
            raise storage_error(error, f"{self.uri}/{name}") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, default=str, ensure_ascii=False).encode())

    def put(self, local: Path, name: str = "") -> None:
        """Copy a local file or folder into this directory."""
        for path in sorted(p for p in [local, *local.rglob("*")] if p.is_file()):
            inside = path.name if path == local else path.relative_to(local).as_posix()
            self.write(f"{name}/{inside}".strip("/"), path.read_bytes())

    @contextlib.contextmanager
    def local(self, name: str = "") -> Iterator[Path]:
        """A file or folder as a local path: itself on a local store, a temporary copy otherwise."""
        if self.is_local:
            yield Path(self.path) / name
            return
        with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
            source = f"{self.path}/{name}".rstrip("/")
            target = Path(folder) / (Path(name).name or "dir")
            pafs.copy_files(
                source, str(target), source_filesystem=self.fs, destination_filesystem=pafs.LocalFileSystem()
            )
            yield target

    def delete(self, name: str = "") -> None:
        """Delete a file or folder if it is there."""
        target = f"{self.path}/{name}".rstrip("/")
        kind = self.fs.get_file_info(target).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(target)
        elif kind == pafs.FileType.File:
            self.fs.delete_file(target)

    # One writer at a time holds the stage's lease, so read-modify-write is safe on S3 too.
    def append_line(self, name: str, line: str) -> None:
        before = self.read(name) if self.exists(name) else b""
        self.write(name, before + line.rstrip("\n").encode() + b"\n")

    def read_lines(self, name: str) -> list[str]:
        return self.read(name).decode().splitlines() if self.exists(name) else []


class Stage(Dir):
    """The directory of one stage under one key."""

    def manifest(self) -> dict[str, Any] | None:
        """The manifest when the stage is whole, else None. Files it lists must be there in full length."""
        if not self.exists("manifest.json"):
            return None
        manifest: dict[str, Any] = self.read_json("manifest.json")
        for name, size in manifest.get("files", {}).items():
            info = self.fs.get_file_info(f"{self.path}/{name}")
            if info.type == pafs.FileType.NotFound or info.size != size:
                raise KtrayError(
                    f"'{self.uri}/{name}' is missing or cut short (manifest says {size} bytes, found {info.size})",
                    f"Delete '{self.uri}' and run again: the stage is then redone.",
                )
        return manifest

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Declare the stage whole. Lists every file with its size, so that loss is noticed later."""
        selector = pafs.FileSelector(self.path, recursive=True, allow_not_found=True)
        prefix = len(self.path) + 1
        skip = ("lease.json", "manifest.json", "ledger.jsonl")
        manifest["files"] = {
            i.path[prefix:]: i.size
            for i in sorted(self.fs.get_file_info(selector), key=lambda i: i.path)
            if i.type == pafs.FileType.File and i.path[prefix:] not in skip
        }
        self.write_json("manifest.json", manifest)
        return manifest

    @contextlib.contextmanager
    def lease(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Be the only one who works on this stage; waits while another live job does.

        A lease is refreshed every few seconds; one that was not for a minute, or whose process on this
        machine is gone, is taken over: that is how a killed job's stage is resumed.
        """
        me = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
        told = False
        while True:
            holder = self._lease()
            if holder is None or _is_stale(holder):
                self._write_lease(me)
                time.sleep(0.05 if self.is_local else 1.0)  # two that took over at once: the last writer stays
                now = self._lease()
                if now and now.get("owner") == me["owner"]:
                    break
            elif not told:
                waiting(
                    f"another job works on {self.uri} (host {holder.get('host')}, pid {holder.get('pid')}); waiting"
                )
                told = True
            time.sleep(1.0)
        stop = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(me, stop), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            stop.set()
            keeper.join(timeout=LEASE_REFRESH_S)
            with contextlib.suppress(OSError):
                self.delete("lease.json")

    def _lease(self) -> dict[str, Any] | None:
        try:
            holder: dict[str, Any] = self.read_json("lease.json")
            return holder
        except (OSError, ValueError):
            return None

    def _write_lease(self, me: dict[str, Any]) -> None:
        self.write_json("lease.json", {**me, "time": time.time()})

    def _keep(self, me: dict[str, Any], stop: threading.Event) -> None:
        while not stop.wait(LEASE_REFRESH_S):
            # A full disk shows up in the stage itself, with its cause; here it must not end the thread.
            with contextlib.suppress(OSError, KtrayError):
                self._write_lease(me)


def _is_stale(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder.get("time", 0)) > LEASE_STALE_S:
        return True
    if holder.get("host") != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class Store(Dir):
    """Root of a store: ``stages/`` and ``runs/``."""

    def __init__(self, root: str) -> None:
        super().__init__(root if "://" in root else str(Path(root).expanduser()))

    def stage(self, name: str, key: str) -> Stage:
        return Stage(f"{self.uri}/stages/{name}/{key}")

    def run(self, run_id: str) -> Dir:
        return Dir(f"{self.uri}/runs/{run_id}")

    def check_writable(self) -> None:
        """Fail early, with the remedy, when nothing can be written."""
        name = f".probe-{uuid.uuid4().hex[:8]}"
        self.write(name, b"x" * 4096)
        self.delete(name)
