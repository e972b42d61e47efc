"""``gs://``: Google Cloud Storage, with pyarrow's own client and Google's application default credentials.

``STORAGE_EMULATOR_HOST``, as for Google's own clients, names a server without credentials. Without credentials, only
public buckets can be read: set ``GOOGLE_CLOUD_ANONYMOUS=1`` for these.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ktray.recipe.registries import SCHEMES
from ktray.storage.schemes.base import Scheme

_RETRY = timedelta(minutes=2)
_EMULATOR, _ANONYMOUS = "STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_ANONYMOUS"


class GoogleCloud(Scheme):
    """Buckets of Google Cloud Storage."""

    form = "gs://BUCKET/KEY"
    remedy = (
        "Check the bucket and the key, and the credentials (`gcloud auth application-default login` or "
        f"GOOGLE_APPLICATION_CREDENTIALS; {_ANONYMOUS}=1 for public buckets)."
    )

    def open(self, bucket: str) -> pafs.FileSystem:
        return _open(os.environ.get(_EMULATOR, ""), bool(os.environ.get(_ANONYMOUS)))


@functools.lru_cache(maxsize=4)
def _open(emulator: str, anonymous: bool) -> pafs.FileSystem:
    if not emulator:
        return pafs.PyFileSystem(Folders(pafs.GcsFileSystem(anonymous=anonymous, retry_time_limit=_RETRY)))
    scheme, _, host = emulator.rpartition("://")
    inner = pafs.GcsFileSystem(
        anonymous=True,
        scheme=scheme or "http",
        endpoint_override=host.rstrip("/"),
        retry_time_limit=_RETRY,
    )
    return pafs.PyFileSystem(Folders(inner))


class Folders(pafs.FileSystemHandler):
    """A file system whose listings have folders that are only parts of keys.

    pyarrow's client of Google Cloud Storage lists a folder only if it has a marker object, which most tools do not
    write. Here, the folders come from all keys below the listed one, so that listing a large bucket takes a while.
    """

    def __init__(self, inner: pafs.FileSystem) -> None:
        self.inner = inner

    def get_type_name(self) -> str:
        return "gs"

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    def get_file_info(self, paths: Sequence[str]) -> list[pafs.FileInfo]:
        infos: list[pafs.FileInfo] = self.inner.get_file_info(list(paths))
        return infos

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        folder = selector.base_dir.rstrip("/")
        below = pafs.FileSelector(folder, recursive=True, allow_not_found=selector.allow_not_found)
        infos: list[pafs.FileInfo] = self.inner.get_file_info(below)
        if selector.recursive:
            return infos
        direct = {info.path: info for info in infos if "/" not in info.path[len(folder) + 1 :]}
        parts = {info.path[len(folder) + 1 :].partition("/")[0] for info in infos}
        folders = [f"{folder}/{name}" for name in sorted(parts) if f"{folder}/{name}" not in direct]
        return [*direct.values(), *(pafs.FileInfo(path, pafs.FileType.Directory) for path in folders)]

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.inner.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self.inner.open_output_stream(path, compression=None, metadata=metadata or None)

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError("Google Cloud Storage cannot append to a file")

    def create_dir(self, path: str, recursive: bool) -> None:
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise OSError("the contents of all buckets are not deleted at once")

    def delete_file(self, path: str) -> None:
        self.inner.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self.inner.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self.inner.copy_file(src, dest)


SCHEMES.register("gs")(GoogleCloud())
SCHEMES.register("gcs")(GoogleCloud())
