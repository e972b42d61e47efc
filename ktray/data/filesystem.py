"""Access to local files, and to objects of remote stores, with the same functions.

A path is a local path or an address such as ``s3://bucket/key``, ``hf://datasets/ORG/NAME/file`` or ``gs://bucket/key``
(`ktray.storage.schemes`). Keys are used unchanged, including spaces and non-ASCII characters. Servers and credentials
come from the environment, such as ``AWS_ENDPOINT_URL``.

Paths come from lists of unknown authors. Therefore only regular files and objects of buckets with plain names are
opened. If ``KTRAY_DATA_ROOTS`` names folders and buckets (``/data,s3://bucket/prefix``), the file must be inside one of
them after links and ``..`` are resolved.
"""

from __future__ import annotations

import difflib
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
from ktray.storage import network, remote, s3
from ktray.storage.store import STORE_MARK

# An encoded image is read into memory completely; photos are far smaller than this.
MAX_FILE_BYTES = 1 << 28

ROOTS = "KTRAY_DATA_ROOTS"
_STREAM_BLOCK = 1 << 23
_MOST_NAMES = 10_000  # that are compared with a misspelt one; more would take seconds

# Leftovers of systems and tools, in lower case: of archives, NAS boxes (thumbnails, trash, snapshots), file systems,
# Windows, Python and sync programs. Names that begin with a dot are left out as well.
_JUNK = frozenset((
    "__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "lost+found",
    "$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
    "__pycache__", "_gsdata_", "found.000",
))  # fmt: skip
_BUCKET = re.compile(r"[\w.-]+", re.ASCII)


class FileTooLarge(OSError):
    """A file or member above `MAX_FILE_BYTES`."""


class OutsideRoots(OSError):
    """A path that ``KTRAY_DATA_ROOTS`` does not allow."""


@dataclass(frozen=True)
class FileStat:
    """A file with the size and modification time of its current version."""

    path: str
    size: int
    mtime_ns: int


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def normalise(path: str) -> str:
    """The absolute local path, or the uri without trailing slashes."""
    if is_remote(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def bucket_filesystem(root: str) -> pafs.FileSystem:
    """The file system of ``s3://bucket``. Only the bucket name is parsed, because keys may contain any characters."""
    try:
        return remote.open_uri(root)[0]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise KtrayError(
            f"'{root}' cannot be opened: {_line(error)}", network.remedy(str(error)) or remote.remedy(root)
        ) from error


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, and the path inside it."""
    if not is_remote(path):
        return pafs.LocalFileSystem(), normalise(path)
    scheme, _, rest = path.partition("://")
    bucket = rest.partition("/")[0]
    # pyarrow would parse credentials and another endpoint here, and send requests with our credentials to it.
    if not _BUCKET.fullmatch(bucket):
        raise KtrayError(
            f"'{scrub(f'{scheme}://{bucket}')}' is not the name of a bucket",
            f"Use {remote.form(path)}; the server and credentials are set in the environment.",
        )
    return bucket_filesystem(f"{scheme}://{bucket}"), rest.rstrip("/")


def check_root(path: str) -> None:
    """For libraries that open files themselves. Raises `OutsideRoots` if a path is outside of ``KTRAY_DATA_ROOTS``."""
    roots = [root for root in os.environ.get(ROOTS, "").split(",") if root]
    real = path if is_remote(path) else os.path.realpath(normalise(path))
    for root in roots:
        home = (root if is_remote(root) else os.path.realpath(normalise(root))).rstrip("/")
        # In keys of buckets, ".." is an ordinary name.
        if real == home or real.startswith(f"{home}/"):
            return
    if roots:
        raise OutsideRoots(f"the path is outside of {ROOTS}")


def _regular(path: str, flags: int) -> int:
    """Opener for `open` that refuses pipes, which could block forever, and devices, which may be endless."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):  # `open` refuses folders
        os.close(handle)
        raise OSError("not a regular file (a pipe, socket or device)")
    return handle


def stat(path: str) -> FileStat | None:
    """The status of a file, or None if it is not a file. On S3, ``mtime_ns`` is LastModified."""
    if not is_remote(path):
        try:
            status = os.stat(path)
        except OSError:
            return None
        return FileStat(path, status.st_size, status.st_mtime_ns) if os.path.isfile(path) else None
    fs, inside = locate(path)
    info = fs.get_file_info(inside)
    return FileStat(path, info.size, info.mtime_ns or 0) if info.type == pafs.FileType.File else None


def printable(name: str) -> str:
    """The name as valid UTF-8. Linux allows other bytes in names; these are replaced with escape sequences."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    fs, inside = locate(path)
    return bool(fs.get_file_info(inside).type == pafs.FileType.Directory)


def hidden(name: str) -> bool:
    """Whether a name does not belong to the data: dot files (``.DS_Store``, ``._photo.jpg``) and leftovers."""
    return name.startswith((".", "~$")) or name.lower() in _JUNK


def children(path: str) -> tuple[list[str], list[str]]:
    """Names of the subfolders (including links to folders) and of the files directly in a folder, both sorted."""
    if not is_remote(path):
        with os.scandir(path) as entries:
            named = [(e.name, e.is_dir()) for e in entries if not _is_store(e)]
    else:
        fs, inside = locate(path)
        named = [(i.base_name, i.type == pafs.FileType.Directory) for i in s3.entries(fs, inside)]
    named = sorted((name, is_dir) for name, is_dir in named if not hidden(name))
    return [name for name, is_dir in named if is_dir], [name for name, is_dir in named if not is_dir]


def _is_store(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and os.path.exists(f"{entry.path}/{STORE_MARK}")


def walk(path: str) -> Iterator[FileStat]:
    """All files below a folder, in no particular order, without hidden files.

    Linked folders are not entered, because links may form cycles or lead to files that are read already. Linked folders
    and folders without permission are returned as a `FileStat` of size -1, so that reading reports them.

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
    if not top and any(entry.name == STORE_MARK for entry in entries):
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
                status = entry.stat()
                yield FileStat(entry.path, status.st_size, status.st_mtime_ns)
            except OSError:  # a broken link is reported when it is read
                yield FileStat(entry.path, 0, 0)


def _walk_remote(path: str) -> Iterator[FileStat]:
    fs, inside = locate(path)
    scheme = path.partition("://")[0]
    entries = s3.entries(fs, inside, recursive=True)
    if s3.handler(fs) is None:
        entries = iter(sorted(entries, key=lambda info: str(info.path)))
    # S3 lists keys in the order of their bytes, and the mark of a store is before everything else that a store has.
    store = ""
    for info in entries:
        below = info.path[len(inside) :].strip("/").split("/")
        if below[-1] == STORE_MARK and len(below) > 1:
            store = info.path.removesuffix(STORE_MARK)
        if store and info.path.startswith(store):
            continue
        if info.type == pafs.FileType.File and not any(hidden(part) for part in below):
            yield FileStat(f"{scheme}://{info.path}", info.size, info.mtime_ns or 0)


def missing(path: str) -> str:
    """What to check if a path does not exist, as a sentence: for a local path, the most similar name in the folder that
    should have it, or the first folder on the way that does not exist."""
    if is_remote(path):
        return remote.remedy(path)
    parent, _, name = path.rpartition("/")
    try:
        while parent and not is_folder(parent):
            parent, _, name = parent.rpartition("/")
        folders, files = children(parent or "/")
    except OSError as error:
        return f"'{parent or '/'}' cannot be read: {why(error)}."
    names = {other.casefold(): other for other in (*folders, *files)[:_MOST_NAMES]}
    near = difflib.get_close_matches(name.casefold(), names, n=1)
    return f"Did you mean '{parent}/{names[near[0]]}'?" if near else f"Folder '{parent or '/'}' has no '{name}'."


def has_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def expand(pattern: str) -> list[str]:
    """Paths that match ``*``, ``?``, ``[...]`` and ``**`` (any depth), sorted."""
    if not is_remote(pattern):
        return sorted(glob.glob(normalise(pattern), recursive=True))
    return [file.path for file in _expand_remote(pattern)]


def expand_files(pattern: str) -> list[tuple[str, FileStat | None]]:
    """The paths of `expand` with their status; None for what is not a file. On S3, the listing has the statuses, so
    that no further requests are needed."""
    if not is_remote(pattern):
        return [(path, stat(path)) for path in expand(pattern)]
    return [(file.path, file) for file in _expand_remote(pattern)]


def _expand_remote(pattern: str) -> list[FileStat]:
    base = pattern[: re.search(r"[*?\[]", pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if base.endswith(":/"):
        raise KtrayError(f"'{pattern}' has a wildcard in the name of the bucket", "Write the full name of the bucket.")
    parts = pattern.split("/")
    return sorted((s for s in _walk_remote(base) if _match(s.path.split("/"), parts)), key=lambda file: file.path)


def _match(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _match(path[1:], pattern[1:])


def open_stream(path: str) -> Any:
    """Open a file for sequential reading; use it as a context manager."""
    check_root(path)
    if not is_remote(path):
        return open(path, "rb", opener=_regular)
    fs, inside = locate(path)
    # By default, .gz files would be decompressed. Without a buffer, each read would be a request.
    return fs.open_input_stream(inside, compression=None, buffer_size=_STREAM_BLOCK)


def open_random(path: str) -> Any:
    """Open a file for random access; use it as a context manager."""
    check_root(path)
    if not is_remote(path):
        return open(path, "rb", opener=_regular)
    fs, inside = locate(path)
    return fs.open_input_file(inside)


def read_bytes(path: str) -> bytes:
    """Read a whole file.

    Raises:
        OSError: the file cannot be read; `FileTooLarge` above `MAX_FILE_BYTES`.
    """
    with open_stream(path) as stream:
        data = bytes(stream.read(MAX_FILE_BYTES + 1))
    if len(data) > MAX_FILE_BYTES:
        raise FileTooLarge(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
    return data


def read_head(path: str, size: int) -> bytes:
    """The first ``size`` bytes of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with open_random(path) as stream:
        return bytes(stream.read(size))


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file, and create missing local folders."""
    fs, inside = locate(path)
    if not is_remote(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
    with fs.open_output_stream(inside, compression=None) as stream:
        stream.write(data)


def why(error: Exception) -> str:
    """A short description of a file error, for the quarantine or an error message."""
    if isinstance(error, IsADirectoryError):
        return "a linked or unreadable folder, which is not entered: name it as a separate source"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read the file"
    return _line(error)


def _line(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:200]) or type(error).__name__
