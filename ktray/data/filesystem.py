"""Files here and on S3, by one set of functions.

A path is a local path or ``s3://bucket/key``. Keys are taken as they are, spaces and non-ASCII included. An
S3-compatible server is named by ``AWS_ENDPOINT_URL``, credentials and region come from the environment.

Paths come from lists that others have written. What is opened is a regular file or an object of a plainly named
bucket, and, where ``KTRAY_DATA_ROOTS`` names folders and buckets (``/data,s3://bucket/prefix``), lies in one of them,
whatever links and ``..`` lead to.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ktray.errors import KtrayError
from ktray.redact import scrub
from ktray.storage import s3

# One encoded image is held in memory as a whole; nothing that is a photo comes near this.
MAX_FILE_BYTES = 1 << 28

ROOTS = "KTRAY_DATA_ROOTS"
_STREAM_BLOCK = 1 << 23

_JUNK = ("__MACOSX",)
_BUCKET = re.compile(r"[\w.-]+", re.ASCII)


class FileTooLarge(OSError):
    """A file or member above `MAX_FILE_BYTES`."""


class OutsideRoots(OSError):
    """A path that ``KTRAY_DATA_ROOTS`` does not allow."""


@dataclass(frozen=True)
class FileStat:
    """A file and what tells one version of it from another."""

    path: str
    size: int
    mtime_ns: int


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def normalise(path: str) -> str:
    """Absolute local path, or the uri without a closing slash."""
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def bucket_filesystem(root: str) -> pafs.FileSystem:
    """The file system of ``s3://bucket``. Bucket names need no encoding, so keys never go through a parser."""
    try:
        return s3.open_uri(root)[0]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KtrayError(
            f"'{root}' cannot be opened: {_line(error)}", "Check its name, the credentials and AWS_ENDPOINT_URL."
        ) from error


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """File system and the path inside it."""
    if not is_remote(path):
        return pafs.LocalFileSystem(), normalise(path)
    scheme, _, rest = path.partition("://")
    bucket = rest.partition("/")[0]
    # pyarrow would read credentials and another endpoint here, to which requests with our own credentials would go.
    if not _BUCKET.fullmatch(bucket):
        raise KtrayError(
            f"'{scrub(f'{scheme}://{bucket}')}' is not a bucket's name",
            "Server and credentials come from the environment.",
        )
    return bucket_filesystem(f"{scheme}://{bucket}"), rest.rstrip("/")


def _check_root(path: str) -> None:
    """Raises `OutsideRoots` for a path outside of ``KTRAY_DATA_ROOTS``."""
    roots = [root for root in os.environ.get(ROOTS, "").split(",") if root]
    real = path if is_remote(path) else os.path.realpath(normalise(path))
    for root in roots:
        home = (root if is_remote(root) else os.path.realpath(normalise(root))).rstrip("/")
        # Keys of buckets have no "..", it is a name like others.
        if real == home or real.startswith(f"{home}/"):
            return
    if roots:
        raise OutsideRoots(f"outside of {ROOTS}")


def _regular(path: str, flags: int) -> int:
    """Opens for `open`. A pipe would be waited for without end, and a device has none."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):  # `open` refuses folders
        os.close(handle)
        raise OSError("not a regular file (a pipe, socket or device)")
    return handle


def stat(path: str) -> FileStat | None:
    """None unless it is a file. ``mtime_ns`` is S3's LastModified there."""
    if not is_remote(path):
        try:
            found = os.stat(path)
        except OSError:
            return None
        return FileStat(path, found.st_size, found.st_mtime_ns) if os.path.isfile(path) else None
    fs, inside = locate(path)
    info = fs.get_file_info(inside)
    return FileStat(path, info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else None


def printable(name: str) -> str:
    """A name that a table can hold: bytes that are no UTF-8, which Linux allows in names, become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inside = locate(path)
    return bool(fs.get_file_info(inside).type == pafs.FileType.Directory)


def hidden(name: str) -> bool:
    """Not meant as data: dot files (``.DS_Store``, ``._photo.jpg``) and archive left-overs."""
    return name.startswith(".") or name in _JUNK


def children(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders (links to folders included) and of the files directly in a folder, sorted."""
    if not is_remote(path):
        with os.scandir(path) as entries:
            found = [(e.name, e.is_dir()) for e in entries]
    else:
        fs, inside = locate(path)
        found = [(i.base_name, i.type == pafs.FileType.Directory) for i in s3.entries(fs, inside)]
    found = sorted((name, is_dir) for name, is_dir in found if not hidden(name))
    return [name for name, is_dir in found if is_dir], [name for name, is_dir in found if not is_dir]


def walk(path: str) -> Iterator[FileStat]:
    """All files below a folder, in no order, hidden ones left out.

    A linked folder is not entered (it may lead in a circle, or to what is read elsewhere already), nor one
    without permission: either comes out as a `FileStat` of size -1, so that it is reported when it is read.

    Raises:
        KtrayError: the folder itself cannot be listed.
    """
    try:
        if is_remote(path):
            yield from _walk_remote(path)
        else:
            yield from _walk_local(path, top=True)
    except OSError as error:
        raise KtrayError(f"Folder '{path}' cannot be listed: {_line(error)}", "Check its permissions.") from error


def _walk_local(path: str, top: bool = False) -> Iterator[FileStat]:
    try:
        entries = list(os.scandir(path))
    except OSError:
        if top:
            raise
        yield FileStat(path, -1, 0)
        return
    for entry in entries:
        if hidden(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk_local(entry.path)
        elif entry.is_dir():
            yield FileStat(entry.path, -1, 0)
        else:
            try:
                found = entry.stat()
                yield FileStat(entry.path, found.st_size, found.st_mtime_ns)
            except OSError:  # a link to nowhere: reading it says so
                yield FileStat(entry.path, 0, 0)


def _walk_remote(path: str) -> Iterator[FileStat]:
    fs, inside = locate(path)
    scheme = path.partition("://")[0]
    for info in s3.entries(fs, inside, recursive=True):
        below = info.path[len(inside) :].strip("/").split("/")
        if info.type == pafs.FileType.File and not any(hidden(part) for part in below):
            yield FileStat(f"{scheme}://{info.path}", info.size, info.mtime_ns or 0)


def has_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def expand(pattern: str) -> list[str]:
    """Paths that match ``*``, ``?``, ``[...]`` and ``**`` (any depth), sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(normalise(pattern), recursive=True))
    base = pattern[: re.search(r"[*?\[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if base.endswith(":/"):
        raise KtrayError(f"'{pattern}' has a wildcard in the bucket's name", "Name the bucket in full.")
    parts = pattern.split("/")
    return sorted(s.path for s in _walk_remote(base) if _match(s.path.split("/"), parts))


def _match(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _match(path[1:], pattern[1:])


def open_stream(path: str) -> Any:
    """A file for reading from start to end (``with`` closes it)."""
    _check_root(path)
    if not is_remote(path):
        return open(path, "rb", opener=_regular)
    fs, inside = locate(path)
    # It would unpack .gz by itself; each read that is not buffered is a request.
    return fs.open_input_stream(inside, compression=None, buffer_size=_STREAM_BLOCK)


def open_random(path: str) -> Any:
    """A file for reading anywhere (``with`` closes it)."""
    _check_root(path)
    if not is_remote(path):
        return open(path, "rb", opener=_regular)
    fs, inside = locate(path)
    return fs.open_input_file(inside)


def read_bytes(path: str) -> bytes:
    """A whole file.

    Raises:
        OSError: it cannot be read; `FileTooLarge` above `MAX_FILE_BYTES`.
    """
    with open_stream(path) as stream:
        data = bytes(stream.read(MAX_FILE_BYTES + 1))
    if len(data) > MAX_FILE_BYTES:
        raise FileTooLarge(f"more than {MAX_FILE_BYTES >> 20} MiB")
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file; local folders on the way are made."""
    fs, inside = locate(path)
    if not is_remote(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
    with fs.open_output_stream(inside, compression=None) as stream:
        stream.write(data)


def why(error: Exception) -> str:
    """A file error in a few words, for a quarantine list or an error line."""
    if isinstance(error, IsADirectoryError):
        return "a linked or closed folder, which is not entered: name it as a source of its own"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return _line(error)


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__
