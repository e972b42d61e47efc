"""S3 as a file system that waits: whatever a busy store answers (500, 503, "slow down", nothing) is asked again.

pyarrow by itself gives up after six seconds, and takes an answer that is three seconds late for none. Here the AWS
SDK tries a few times, and then `ktray.storage.retry`. Endpoint, region, credentials and the checksum mode come from the
environment, by the names that AWS gives them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from ktray.storage.retry import RetryPolicy, busy, code, line
from ktray.storage.s3_files import Reader, Writer

CONNECT_S, ANSWER_S = 5.0, 30.0
_SDK_ATTEMPTS = 3
_PAGE = 1000
_OPTION = re.compile(r"\?(endpoint_override|region|scheme|allow_\w+)=")


def endpoint() -> str | None:
    """Address of a store other than Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """File system and the path inside it. Keys of ``s3://bucket/key`` are taken as they are, spaces included.

    Raises:
        OSError, ValueError: no such scheme or bucket, or it cannot be reached.
    """
    scheme, _, path = uri.partition("://")
    if scheme != "s3":
        fs, path = pafs.FileSystem.from_uri(uri)
        return fs, path
    bucket = path.partition("/")[0]
    if "@" in bucket or _OPTION.search(path):
        raise ValueError("its address holds credentials or options, which are read from AWS_* in the environment alone")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise ValueError(f"'{bucket}' is no name of a bucket")
    return _open(bucket, endpoint()), path.rstrip("/")


@functools.lru_cache(maxsize=64)
def _open(bucket: str, server: str | None) -> pafs.FileSystem:
    return pafs.PyFileSystem(S3(bucket))


def handler(fs: pafs.FileSystem) -> S3 | None:
    """What stands behind the file system of an ``s3://`` uri."""
    found = fs.handler if isinstance(fs, pafs.PyFileSystem) else None
    return found if isinstance(found, S3) else None


def entries(fs: pafs.FileSystem, path: str, recursive: bool = False) -> Iterable[pafs.FileInfo]:
    """What lies in a folder, or, recursive, all files below it; nothing if it is not there. In pages on S3."""
    s3 = handler(fs)
    if s3:
        return s3.walk(path, recursive)
    found: list[pafs.FileInfo] = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    return found


def download(fs: pafs.FileSystem, path: str, target: Path) -> None:
    """One file's content into a local file; not by pyarrow's `copy_files`, see `store.Dir.put`."""
    with fs.open_input_stream(path, compression=None) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 23)


def _time(text: str) -> datetime:
    """A time as S3 writes it in bodies (2026-01-31T12:00:00.000Z) or in headers."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return parsedate_to_datetime(text)


class S3(pafs.FileSystemHandler):
    """pyarrow's file system with `RetryPolicy`, and what pyarrow lacks: pages of listings, conditional writes."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.retry = RetryPolicy(f"s3://{bucket}")
        self._conditional: bool | None = None
        server = endpoint()
        scheme, _, host = (server or "").rstrip("/").rpartition("://")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not server:
            region = self.retry.call(lambda: pafs.resolve_s3_region(bucket))
        self.region = region or "us-east-1"
        self.inner = pafs.S3FileSystem(
            region=self.region,
            endpoint_override=host or None,
            scheme=scheme or "https",
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
            allow_delayed_open=True,  # a small file is one request and not three
        )

    def __reduce__(self) -> tuple[type[S3], tuple[str]]:
        return S3, (self.bucket,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3) and other.bucket == self.bucket

    def __hash__(self) -> int:
        return hash(self.bucket)

    @functools.cached_property
    def client(self) -> Any:
        """boto3's client; its methods may be called from several threads."""
        import boto3
        import botocore.session
        from botocore.config import Config

        server = endpoint()
        config = Config(
            region_name=self.region,
            connect_timeout=CONNECT_S,
            read_timeout=ANSWER_S,
            retries={"mode": "standard", "total_max_attempts": _SDK_ATTEMPTS},
            s3={"addressing_style": "path" if server else "auto"},
        )
        session = botocore.session.Session()
        # botocore's own parser of times takes most of the time of a listing.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
        return boto3.session.Session(botocore_session=session).client("s3", endpoint_url=server, config=config)

    # ------------------------------------------------------------------------------ what pyarrow asks for

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self.retry.call(lambda: self.inner.get_file_info(paths))
        return found

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        found: list[pafs.FileInfo] = self.retry.call(lambda: self.inner.get_file_info(selector))
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self.retry.call(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._gone(lambda: self.inner.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.retry.call(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise OSError("all buckets are not deleted")

    def delete_file(self, path: str) -> None:
        self._gone(lambda: self.inner.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._gone(lambda: self.inner.move(src, dest))

    def copy_file(self, src: str, dest: str) -> None:
        self.retry.call(lambda: self.inner.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(Reader(lambda: self.inner.open_input_file(path), self.retry.call), mode="r")

    def open_output_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        return pa.PythonFile(
            Writer(lambda: self.inner.open_output_stream(path, metadata=metadata), self.retry.call), mode="w"
        )

    def open_append_stream(self, path: str, metadata: dict[str, str] | None) -> pa.NativeFile:
        raise OSError("S3 has no appending")

    def _gone(self, call: Callable[[], None]) -> None:
        """A deletion whose answer was lost finds nothing the next time."""
        tried = False

        def attempt() -> None:
            nonlocal tried
            try:
                call()
            except FileNotFoundError:
                if not tried:
                    raise
            finally:
                tried = True

        self.retry.call(attempt)

    # ------------------------------------------------------------------------------ what pyarrow lacks

    def walk(self, path: str, recursive: bool) -> Iterator[pafs.FileInfo]:
        """Files below a folder (and, not recursive, its folders) as they are listed, a page in memory at a time."""
        bucket, _, prefix = path.partition("/")
        ask: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": _PAGE}
        if not recursive:
            ask["Delimiter"] = "/"
        while True:
            page = self.retry.call(lambda: self._call("list_objects_v2", **ask))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # the mark of an empty folder
                    mtime = item["LastModified"]
                    yield pafs.FileInfo(
                        f"{bucket}/{item['Key']}", pafs.FileType.File, size=int(item["Size"]), mtime=mtime
                    )
            for item in page.get("CommonPrefixes", ()):
                yield pafs.FileInfo(f"{bucket}/{item['Prefix'].rstrip('/')}", pafs.FileType.Directory)
            if not page.get("IsTruncated"):
                return
            ask["ContinuationToken"] = page["NextContinuationToken"]

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; False if there is. Of several that try at once one succeeds.

        Args:
            data: differs from what others write: by it an answer that was lost is told from another's success.
        """
        bucket, _, key = path.partition("/")
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                self._call("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except FileExistsError:
                return self._content(bucket, key) == data
            return True

        return self.retry.call(attempt)

    def conditional(self, folder: str) -> bool:
        """Whether the store heeds the condition of `create`; older ones pass over it, or refuse it. Tried in a folder
        that may be written to, once a process."""
        if self._conditional is None:
            probe = f"{folder}/.probe-{uuid.uuid4().hex}"
            try:
                self._conditional = self.create(probe, b"1") and not self.create(probe, b"2")
            except NotImplementedError:
                self._conditional = False
            with contextlib.suppress(OSError):
                self.delete_file(probe)
        return self._conditional

    def _content(self, bucket: str, key: str) -> bytes | None:
        try:
            return bytes(self._call("get_object", Bucket=bucket, Key=key)["Body"].read())
        except FileNotFoundError:
            return None

    def _call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """A method of the client, with Python's own errors in place of boto3's, but for those of a busy store."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer: dict[str, Any] = getattr(self.client, name)(**arguments)
            return answer
        except (BotoCoreError, ClientError) as error:
            status = 0
            if isinstance(error, ClientError):
                status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
            if status == 412:
                raise FileExistsError(line(error)) from error
            if status == 404:
                raise FileNotFoundError(line(error)) from error
            if status == 501 or (status == 400 and code(error) in ("NotImplemented", "InvalidArgument")):
                raise NotImplementedError(line(error)) from error
            if status == 403:
                raise PermissionError(line(error)) from error
            if busy(error):
                raise
            raise OSError(line(error)) from error
