"""``hf://``: repositories of the Hugging Face hub, read through its own file system, in ranges.

``hf://datasets/ORG/NAME[@REVISION]/PATH`` is a data set, ``hf://ORG/NAME/PATH`` a model. ``HF_ENDPOINT`` names another
hub; the token comes from ``HF_TOKEN`` or ``hf auth login``.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ktray.recipe.registries import SCHEMES
from ktray.redact import scrub
from ktray.storage.schemes.base import Scheme

# Python errors with a meaning that callers know; every other error of the hub or the network becomes an OSError.
_KNOWN = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
# Hex digits of a content's hash that fit into the 64 bits of a modification time.
_DIGITS = 15


class HuggingFace(Scheme):
    """The hub that ``HF_ENDPOINT`` names, or huggingface.co."""

    form = "hf://datasets/ORG/NAME[@REVISION]/PATH"
    remedy = (
        "Check the name, the revision and the path on the hub; for a private or gated repository, accept its terms "
        "there and set HF_TOKEN."
    )

    def open(self, bucket: str) -> pafs.FileSystem:
        from huggingface_hub import constants

        return _open(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT)


@functools.lru_cache(maxsize=4)
def _open(endpoint: str) -> pafs.FileSystem:
    from huggingface_hub import HfFileSystem

    return pafs.PyFileSystem(HubHandler(HfFileSystem(endpoint=endpoint.rstrip("/"))))


class HubHandler(pafs.FSSpecHandler):
    """pyarrow's view of the hub's file system. It is read-only.

    The hub lists files without modification times. A number from the hash of the content takes their place, so that
    equal contents have equal versions, and a new commit changes only the versions of the files that it changes.
    """

    def get_file_info(self, paths: Sequence[str]) -> list[pafs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        try:
            with _errors(path):
                return _file_info(path, self.fs.info(path))
        except FileNotFoundError:
            return pafs.FileInfo(path, pafs.FileType.NotFound)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        folder = selector.base_dir.strip("/")
        try:
            with _errors(folder):
                depth = None if selector.recursive else 1
                found = self.fs.find(folder, maxdepth=depth, withdirs=True, detail=True)
        except FileNotFoundError:
            if selector.allow_not_found:
                return []
            raise
        return [_file_info(path, info) for path, info in found.items() if path.strip("/") != folder]

    def open_input_stream(self, path: str) -> pa.NativeFile:
        # Without blocks, the file is one request, which is repeated from where it broke off.
        return self._opened(path, block_size=0)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._opened(path)

    def _opened(self, path: str, **options: Any) -> pa.NativeFile:
        with _errors(path):
            return pa.PythonFile(_Stream(self.fs.open(path, "rb", **options), path), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("ktray does not write to hf://; `ktray export export.push=ORG/NAME` uploads a model")


class _Stream:
    """A file of the hub whose errors are OSErrors of one line."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        with _errors(self._path):
            return bytes(self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _file_info(path: str, info: dict[str, Any]) -> pafs.FileInfo:
    if info["type"] == "directory":
        return pafs.FileInfo(path, pafs.FileType.Directory)
    content = str(info.get("blob_id") or info.get("xet_hash") or "0")
    try:
        version = int(content[:_DIGITS], 16)
    except ValueError:
        version = 0
    return pafs.FileInfo(path, pafs.FileType.File, size=info["size"], mtime_ns=version)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """Turn errors of the hub's client, which are of many types and lines, into OSErrors of one line."""
    if ".." in path.split("/"):  # the URL of the file would lead out of its repository
        raise FileNotFoundError(f"'{path}' contains '..'")
    try:
        yield
    except _KNOWN:
        raise
    except Exception as error:
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

        first = str(scrub(" ".join(str(error).split("\n")[0].split())))[:150] or type(error).__name__
        if isinstance(error, GatedRepoError):
            raise PermissionError(f"the repository of hf://{path} is gated, and its terms are not accepted") from error
        if isinstance(error, EntryNotFoundError | RepositoryNotFoundError):
            raise FileNotFoundError(f"hf://{path}: {first}") from error
        raise OSError(f"the hub does not give hf://{path}: {first}") from error


SCHEMES.register("hf")(HuggingFace())
