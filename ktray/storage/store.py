"""The store: content-addressed stage directories and run folders, on a local disk or S3.

A stage directory ``stages/<stage>/<key>/`` is whole once ``manifest.json`` stands in it: the manifest is
written last, by rename (local) or a single put (S3), so a half-written directory is never taken for a whole
one, and what a killed stage left (shards, checkpoints) stays in place for the next attempt to go on from.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from ktray.errors import KtrayError
from ktray.storage import s3
from ktray.storage.lease import FOLDER as LEASE
from ktray.storage.lease import Lease
from ktray.storage.retry import retry_for

_BLOCK = 1 << 23
_PROBE_S = 15.0  # a store that does not answer at the start is more likely misnamed than busy


def storage_error(error: OSError, where: str) -> KtrayError:
    """The user's view of an error of the file system."""
    if error.errno == errno.ENOSPC:
        return KtrayError(f"No space is left on the disk of '{where}'", "Free space or set store= to another disk.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return KtrayError(f"No permission to write to '{where}'", "Set store= to a folder that you may write to.")
    what = f"'{where}' cannot be written: {error}".replace("\n", " ")
    remedy = "AWS_ENDPOINT_URL and the credentials" if "://" in where else "its disk"
    if "HTTP status 411" in what:  # the checksum behind the data, of which older stores know nothing
        return KtrayError(what, "Set AWS_REQUEST_CHECKSUM_CALCULATION=when_required for a store that is older than it.")
    return KtrayError(what, f"Check store= and {remedy}.")


@contextlib.contextmanager
def _aside(target: str, source: IO[bytes]) -> Iterator[str]:
    """A local file with the whole content, on the disk, beside the place where it shall stand."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as stream:
            shutil.copyfileobj(source, stream, _BLOCK)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _link(temporary: str, target: str, data: bytes) -> bool:
    """Give a whole file a name that nobody has; one of several succeeds, on NFS too."""
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # NFS may ask twice and tell the second answer
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    try:  # no hard links there: a reader may see half of the file
        handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with open(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return True


class Dir:
    """A directory of the store. Picklable; safe to use from workers on other machines when it is on S3."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        if "://" in self.uri:
            try:
                self.fs, self.path = s3.open_uri(self.uri)
            except (OSError, ValueError) as error:
                shown = re.sub(r"//[^/]*@", "//", self.uri)
                raise KtrayError(
                    f"Store '{shown}' cannot be opened: {error}", "Check store= and credentials."
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
        found = {i.base_name: i.size for i in s3.entries(self.fs, self.path) if i.type == pafs.FileType.File}
        return {name: found[name] for name in sorted(found) if name.endswith(suffix)}

    def children(self) -> list[str]:
        """Names of the directories directly in this one, sorted."""
        return sorted(i.base_name for i in s3.entries(self.fs, self.path) if i.type == pafs.FileType.Directory)

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing (a reader never sees half of it)."""
        self._write(name, io.BytesIO(data))

    def _write(self, name: str, source: IO[bytes]) -> None:
        target = f"{self.path}/{name}"
        try:
            if self.is_local:
                with _aside(target, source) as temporary:
                    os.replace(temporary, target)
            else:
                with self.fs.open_output_stream(target) as stream:
                    shutil.copyfileobj(source, stream, _BLOCK)
        except OSError as error:
            raise storage_error(error, f"{self.uri}/{name}") from error

    @property
    def exclusive(self) -> bool:
        """Whether `create` lets one of several through in any case."""
        remote = s3.handler(self.fs)
        return self.is_local or (remote is not None and remote.conditional(self.path))

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one; False if there is. Of several that try at once, one succeeds; on
        stores that are not `exclusive` several do that are less than a second apart, in rare cases.

        Args:
            data: unlike what others write there.
        """
        target = f"{self.path}/{name}"
        try:
            if self.is_local:
                with _aside(target, io.BytesIO(data)) as temporary:
                    return _link(temporary, target, data)
            remote = s3.handler(self.fs)
            if remote is not None and self.exclusive:
                return remote.create(target, data)
            if self.exists(name):
                return False
            self.write(name, data)
            time.sleep(1.0)  # of two that wrote at once, the last one stays
            return self.read(name) == data
        except OSError as error:
            raise storage_error(error, f"{self.uri}/{name}") from error

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1, default=str, ensure_ascii=False).encode())

    def put(self, local: Path, name: str = "") -> None:
        """Copy a local file or folder into this directory."""

        def copy(path: Path) -> None:
            inside = path.name if path == local else path.relative_to(local).as_posix()
            with open(path, "rb") as stream:
                self._write(f"{name}/{inside}".strip("/"), stream)

        # In threads of its own, and not by pyarrow's `copy_files`: it would call this file system from the threads that
        # this file system's own requests need.
        with ThreadPoolExecutor(1 if self.is_local else 8) as pool:
            list(pool.map(copy, sorted(p for p in [local, *local.rglob("*")] if p.is_file())))

    @contextlib.contextmanager
    def local(self, name: str = "") -> Iterator[Path]:
        """A file or folder as a local path: itself on a local store, a temporary copy otherwise."""
        if self.is_local:
            yield Path(self.path) / name
            return
        with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
            source = f"{self.path}/{name}".rstrip("/")
            target = Path(folder) / (Path(name).name or "dir")
            if self.fs.get_file_info(source).type == pafs.FileType.File:
                self._fetch(source, target)
            else:
                found = s3.entries(self.fs, source, recursive=True)
                files = [i.path for i in found if i.type == pafs.FileType.File]
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda path: self._fetch(path, target / path[len(source) + 1 :]), files))
            yield target

    def _fetch(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download(self.fs, path, target)

    def delete(self, name: str = "") -> None:
        """Delete a file or folder if it is there."""
        target = f"{self.path}/{name}".rstrip("/")
        kind = self.fs.get_file_info(target).type
        with contextlib.suppress(FileNotFoundError):  # another job was first
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

    def commit(self, manifest: dict[str, Any], lease: Lease | None = None) -> dict[str, Any]:
        """Declare the stage whole. Lists every file with its size, so that loss is noticed later.

        Args:
            lease: under which the stage was made; `LeaseLost` if another job has it by now.
        """
        prefix = len(self.path) + 1
        skip = ("manifest.json", "ledger.jsonl")
        manifest["files"] = {
            i.path[prefix:]: i.size
            for i in sorted(s3.entries(self.fs, self.path, recursive=True), key=lambda i: i.path)
            if i.type == pafs.FileType.File
            and i.path[prefix:] not in skip
            and not i.path.endswith(".tmp")  # the ledger's next line, on its way
            and not i.path[prefix:].startswith(f"{LEASE}/")
        }
        if lease:
            lease.publish("manifest.json", manifest)
        else:
            self.write_json("manifest.json", manifest)
        return manifest

    def lease(self) -> Lease:
        """The right to be the only one who works on this stage (``with``); waits while another live job does."""
        return Lease(self)


class Store(Dir):
    """Root of a store: ``stages/`` and ``runs/``."""

    def __init__(self, root: str) -> None:
        with retry_for(_PROBE_S):
            super().__init__(root if "://" in root else str(Path(root).expanduser()))

    def stage(self, name: str, key: str) -> Stage:
        return Stage(f"{self.uri}/stages/{name}/{key}")

    def run(self, run_id: str) -> Dir:
        return Dir(f"{self.uri}/runs/{run_id}")

    def check_writable(self) -> None:
        """Fail early, with the remedy, when nothing can be written."""
        name = f".probe-{uuid.uuid4().hex[:8]}"
        with retry_for(_PROBE_S):
            self.write(name, b"x" * 4096)
            self.delete(name)


def local_home(store: Store) -> Path:
    """Local folder for the embedded MLflow and the logs: the store itself, or ``./ktray-store`` beside S3."""
    return Path(store.path) if store.is_local else Path("ktray-store").absolute()
