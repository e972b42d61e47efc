"""The store: content-addressed stage directories and run folders, on a local disk or on S3.

A stage directory ``stages/<stage>/<key>/`` is complete once it contains ``manifest.json``. The manifest is written
last, by a rename (local) or a single put (S3), so a half-written directory is never taken for a complete one. The
shards and checkpoints of a killed stage stay in its directory, and the next attempt resumes from them.
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
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow.fs as pafs

from ktray.errors import KtrayError, ResourceError
from ktray.storage import network, s3
from ktray.storage.concurrent import AT_ONCE, in_order
from ktray.storage.lease import FOLDER as LEASE
from ktray.storage.lease import Lease
from ktray.storage.retry import retry_for

# The file that marks a folder as a store (`ktray.data.filesystem` leaves such folders out of listings).
STORE_MARK = ".ktray-store"
_BLOCK = 1 << 23
_PROBE_S = 15.0  # seconds; at the start, a store that does not answer more likely has a wrong address than is busy


def storage_error(error: OSError, where: str) -> KtrayError:
    """The `KtrayError` for an error of the file system."""
    if error.errno == errno.ENOSPC:
        return ResourceError(f"No space is left on the disk of '{where}'", "Free space or set store= to another disk.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"No permission to write to '{where}'", "Set store= to a folder that you may write to.")
    what = f"'{where}' cannot be written: {error}".replace("\n", " ")
    remedy = "AWS_ENDPOINT_URL and the credentials" if "://" in where else "its disk"
    if "HTTP status 411" in what:  # older stores do not support a checksum after the data
        return ResourceError(
            what,
            "This store does not support checksums after the data: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required.",
        )
    return ResourceError(what, network.remedy(what) or f"Check store= and {remedy}.")


@contextlib.contextmanager
def _aside(target: str, source: IO[bytes]) -> Iterator[str]:
    """Write the whole content to a temporary file on disk, in the folder of the target. Yields the file's path."""
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
    """Give a complete file a name that does not exist. If several jobs try, one succeeds, also on NFS."""
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # NFS may repeat a request and report the second answer
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    try:  # without hard links, a reader may see half of the file
        handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with open(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return True


class Dir:
    """A directory of the store. It can be pickled; on S3 it can be used from workers on other machines."""

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
        """Path or address of a file, for readers that support ``s3://`` themselves (Ray Data, pyarrow)."""
        return f"{self.uri}/{name}"

    def exists(self, name: str = "") -> bool:
        info = self.fs.get_file_info(f"{self.path}/{name}".rstrip("/"))
        return bool(info.type != pafs.FileType.NotFound)

    def names(self, suffix: str = "") -> dict[str, int]:
        """The files directly in this directory: name to size in bytes, sorted by name."""
        sizes = {i.base_name: i.size for i in s3.entries(self.fs, self.path) if i.type == pafs.FileType.File}
        return {name: sizes[name] for name in sorted(sizes) if name.endswith(suffix)}

    def children(self) -> list[str]:
        """Names of the directories directly in this directory, sorted."""
        return sorted(i.base_name for i in s3.entries(self.fs, self.path) if i.type == pafs.FileType.Directory)

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def read_each_json(self, names: Iterable[str]) -> Iterator[Any]:
        """`read_json` of each file, in order. From a remote store, several files are read concurrently."""
        return in_order((partial(self.read_json, name) for name in names), self.at_once)

    @property
    def at_once(self) -> int:
        """Number of small requests that are made concurrently."""
        return 1 if self.is_local else AT_ONCE

    def write(self, name: str, data: bytes) -> None:
        """Write the whole file or nothing: a reader never sees half of it.

        Raises:
            KtrayError: the file cannot be written.
        """
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
        """Whether only one of several simultaneous calls of `create` can succeed."""
        remote = s3.handler(self.fs)
        return self.is_local or (remote is not None and remote.conditional(self.path))

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file if it does not exist.

        If several jobs try at the same time, one of them succeeds. On stores that are not `exclusive`, several may
        succeed in rare cases, if they are less than a second apart.

        Args:
            data: must differ from what other jobs write to this file.

        Returns:
            False if the file exists.

        Raises:
            KtrayError: the file cannot be written.
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
            time.sleep(1.0)  # if two jobs wrote at the same time, the content of the last one remains
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

        # The copies run in their own threads. pyarrow's `copy_files` would call this file system from the threads that
        # this file system needs for its own requests.
        with ThreadPoolExecutor(1 if self.is_local else 8) as pool:
            list(pool.map(copy, sorted(p for p in [local, *local.rglob("*")] if p.is_file())))

    @contextlib.contextmanager
    def local(self, name: str = "") -> Iterator[Path]:
        """A file or folder as a local path: the original on a local store, otherwise a temporary copy."""
        if self.is_local:
            yield Path(self.path) / name
            return
        with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
            source = f"{self.path}/{name}".rstrip("/")
            target = Path(folder) / (Path(name).name or "dir")
            if self.fs.get_file_info(source).type == pafs.FileType.File:
                self._fetch(source, target)
            else:
                infos = s3.entries(self.fs, source, recursive=True)
                files = [i.path for i in infos if i.type == pafs.FileType.File]
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda path: self._fetch(path, target / path[len(source) + 1 :]), files))
            yield target

    def _fetch(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download(self.fs, path, target)

    def delete(self, name: str = "") -> None:
        """Delete a file or folder, or, without a name, this directory; nothing happens if it does not exist."""
        target = f"{self.path}/{name}".rstrip("/")
        kind = self.fs.get_file_info(target).type
        with contextlib.suppress(FileNotFoundError):  # another job has deleted it
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(target)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(target)

    def append_line(self, name: str, line: str) -> None:
        """Append a line to a text file. Only the holder of the directory's lease may do this."""
        # The lease has one holder at a time, so reading, changing and writing the file is safe on S3, too.
        before = self.read(name) if self.exists(name) else b""
        self.write(name, before + line.rstrip("\n").encode() + b"\n")

    def read_lines(self, name: str) -> list[str]:
        """The lines of a text file; empty if it does not exist."""
        return self.read(name).decode().splitlines() if self.exists(name) else []


class Stage(Dir):
    """The directory of one stage under one key."""

    def manifest(self) -> dict[str, Any] | None:
        """The manifest if the stage is complete, else None.

        Raises:
            KtrayError: a file that the manifest lists is missing or has another size.
        """
        if not self.exists("manifest.json"):
            return None
        manifest: dict[str, Any] = self.read_json("manifest.json")
        sizes = self._sizes()  # by listing, because a stage may have 100,000 files
        for name, size in manifest.get("files", {}).items():
            if sizes.get(name) != size:
                found = f"has {sizes[name]}" if name in sizes else "does not exist"
                raise KtrayError(
                    f"'{self.uri}/{name}' is missing or incomplete (it should have {size} bytes and {found})",
                    f"Delete '{self.uri}' and run again: the stage is then computed again.",
                )
        return manifest

    def commit(self, manifest: dict[str, Any], lease: Lease | None = None) -> dict[str, Any]:
        """Declare the stage complete. The manifest lists every file with its size, so that a loss is noticed later.

        Args:
            manifest: the stage's entries; ``files`` is added.
            lease: the lease under which the stage was computed.

        Raises:
            LeaseLost: another job has taken over the stage.
        """
        skip = ("manifest.json", "ledger.jsonl")
        manifest["files"] = {
            name: size
            for name, size in sorted(self._sizes().items())
            if name not in skip
            and not name.endswith(".tmp")  # the ledger's next line, which is being written
            and not name.startswith(f"{LEASE}/")
        }
        if lease:
            lease.publish("manifest.json", manifest)
        else:
            self.write_json("manifest.json", manifest)
        return manifest

    def _sizes(self) -> dict[str, int]:
        """The size in bytes of each file below this directory, by its path in it."""
        infos = s3.entries(self.fs, self.path, recursive=True)
        return {i.path[len(self.path) + 1 :]: i.size for i in infos if i.type == pafs.FileType.File}

    def lease(self) -> Lease:
        """The right of one job to work on this stage, as a context manager. It waits while another live job has it."""
        return Lease(self)


class Store(Dir):
    """The root of a store, with ``stages/`` and ``runs/``.

    Args:
        root: a folder, or an address such as ``s3://bucket/prefix``.
    """

    def __init__(self, root: str) -> None:
        with retry_for(_PROBE_S):
            super().__init__(root if "://" in root else str(Path(root).expanduser()))

    def stage(self, name: str, key: str) -> Stage:
        return Stage(f"{self.uri}/stages/{name}/{key}")

    def run(self, run_id: str) -> Dir:
        return Dir(f"{self.uri}/runs/{run_id}")

    def check_writable(self) -> None:
        """Check early that the store can be written.

        Raises:
            KtrayError: it cannot be written; with the remedy.
        """
        name = f".probe-{uuid.uuid4().hex[:8]}"
        if self.is_local:
            above = Path(self.path)
            while not above.exists():
                above = above.parent
            if not above.is_dir():
                raise KtrayError(f"store={self.uri} cannot be a folder: '{above}' is a file", "Set store= to a folder.")
        with retry_for(_PROBE_S):
            self.write(name, b"x" * 4096)
            self.delete(name)
            if not self.exists(STORE_MARK):
                self.write(STORE_MARK, b"A store of ktray. Its content is left out where images are listed.\n")


def local_home(store: Store) -> Path:
    """Local folder for the embedded MLflow and the logs: the store itself, or ``./ktray-store`` for a store on S3."""
    if store.is_local:
        return Path(store.path)
    home = Path("ktray-store").absolute()
    home.mkdir(exist_ok=True)
    (home / STORE_MARK).touch()
    return home
