"""S3 as a file system with retries: a request is repeated if the store is busy (500, 503, "slow down", no answer).

pyarrow alone fails after six seconds, and counts an answer that takes three seconds as no answer. Here the AWS SDK
makes a few attempts, and then `ktray.storage.retry` continues. Endpoint, region, credentials and the mode of checksums
are read from AWS's environment variables, proxies and certificates as `ktray.storage.network` says.
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

from ktray.storage import network
from ktray.storage.retry import RetryPolicy, busy, code, line
from ktray.storage.s3_files import Reader, Writer

CONNECT_S, ANSWER_S = 5.0, 30.0  # time limits in seconds for a connection and for an answer
_SDK_ATTEMPTS = 3
_AMAZON = "https://s3.amazonaws.com"
_PAGE = 1000  # files in one page of a listing
_OPTION = re.compile(r"\?(endpoint_override|region|scheme|allow_\w+)=")


def endpoint() -> str | None:
    """Address of an S3 store other than Amazon's; None for Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def open_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a uri, and the path inside it. Keys in ``s3://bucket/key`` are not decoded.

    Raises:
        OSError, ValueError: the scheme or bucket does not exist, or the store cannot be reached.
    """
    scheme, _, path = uri.partition("://")
    if scheme != "s3":
        fs, path = pafs.FileSystem.from_uri(uri)
        return fs, path
    bucket = path.partition("/")[0]
    if "@" in bucket or _OPTION.search(path):
        raise ValueError("its address contains credentials or options, which are only read from AWS_* variables")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        raise ValueError(f"'{bucket}' is not a valid bucket name")
    server = endpoint()
    return _open(bucket, server, network.certificates(), network.proxy_for(server or _AMAZON)), path.rstrip("/")


@functools.lru_cache(maxsize=64)
def _open(bucket: str, server: str | None, trusted: str | None, proxy: str | None) -> pafs.FileSystem:
    """The arguments after the first are those that `S3` reads from the environment."""
    return pafs.PyFileSystem(S3(bucket))


def handler(fs: pafs.FileSystem) -> S3 | None:
    """The `S3` behind a file system of an ``s3://`` uri; None for other file systems."""
    inner = fs.handler if isinstance(fs, pafs.PyFileSystem) else None
    return inner if isinstance(inner, S3) else None


def entries(fs: pafs.FileSystem, path: str, recursive: bool = False) -> Iterable[pafs.FileInfo]:
    """The entries of a folder, or, if ``recursive``, all files below it; empty if the folder does not exist.

    On S3, the listing is read page by page.
    """
    s3 = handler(fs)
    if s3:
        return s3.walk(path, recursive)
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=True)
    try:
        infos: list[pafs.FileInfo] = fs.get_file_info(selector)
    except FileNotFoundError:  # another process deleted the folder between pyarrow's check and its listing
        return []
    return infos


def download(fs: pafs.FileSystem, path: str, target: Path) -> None:
    """Copy a file into a local file. pyarrow's `copy_files` is not used; `ktray.storage.store.Dir.put` says why."""
    with fs.open_input_stream(path, compression=None) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 23)


def _time(text: str) -> datetime:
    """Parse a time in the format of S3's bodies (2026-01-31T12:00:00.000Z) or headers."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return parsedate_to_datetime(text)


class S3(pafs.FileSystemHandler):
    """pyarrow's file system for a bucket with `RetryPolicy`, listings in pages and conditional writes."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.retry = RetryPolicy(f"s3://{bucket}")
        self._conditional: bool | None = None
        server = endpoint()
        scheme, _, host = (server or "").rstrip("/").rpartition("://")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not (server or region):
            if network.proxy_for(_AMAZON):
                raise ValueError("behind a proxy the region of a bucket cannot be looked up: set AWS_REGION")
            region = self.retry.call(lambda: pafs.resolve_s3_region(bucket))
        self.region = region or "us-east-1"
        secured: dict[str, Any] = {}
        if trusted := network.certificates():
            secured["tls_ca_file_path"] = trusted
        self.inner = pafs.S3FileSystem(
            **secured,
            proxy_options=network.proxy_for(server or _AMAZON),
            region=self.region,
            endpoint_override=host or None,
            scheme=scheme or "https",
            connect_timeout=CONNECT_S,
            request_timeout=ANSWER_S,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
            allow_delayed_open=True,  # a small file needs one request instead of three
        )

    def __reduce__(self) -> tuple[type[S3], tuple[str]]:
        return S3, (self.bucket,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3) and other.bucket == self.bucket

    def __hash__(self) -> int:
        return hash(self.bucket)

    @functools.cached_property
    def client(self) -> Any:
        """A boto3 client; its methods may be called from several threads."""
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
        core = botocore.session.Session()
        # With botocore's own parser of times, most of the time of a listing would go into parsing.
        core.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
        session = boto3.session.Session(botocore_session=core)
        # Its proxies are those of `network.proxy_for`.
        return session.client("s3", endpoint_url=server, config=config, verify=network.certificates())

    # ---------------------------------------------------------------------------- the interface of pyarrow

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        infos: list[pafs.FileInfo] = self.retry.call(lambda: self.inner.get_file_info(paths))
        return infos

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        infos: list[pafs.FileInfo] = self.retry.call(lambda: self.inner.get_file_info(selector))
        return infos

    def create_dir(self, path: str, recursive: bool) -> None:
        self.retry.call(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._delete(lambda: self.inner.delete_dir(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.retry.call(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise OSError("ktray does not delete whole buckets")

    def delete_file(self, path: str) -> None:
        self._delete(lambda: self.inner.delete_file(path))

    def move(self, src: str, dest: str) -> None:
        self._delete(lambda: self.inner.move(src, dest))

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
        raise OSError("S3 cannot append to a file")

    def _delete(self, call: Callable[[], None]) -> None:
        """Run a deletion with retries. If an answer was lost, the next attempt finds nothing, which is no error."""
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

    # ------------------------------------------------------------------------------ what pyarrow does not have

    def walk(self, path: str, recursive: bool) -> Iterator[pafs.FileInfo]:
        """All files below a folder, or, without ``recursive``, the files and folders in it.

        They are yielded as they are listed, with one page in memory at a time.
        """
        bucket, _, prefix = path.partition("/")
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "MaxKeys": _PAGE}
        if not recursive:
            request["Delimiter"] = "/"
        while True:
            page = self.retry.call(lambda: self._call("list_objects_v2", **request))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # such a key marks an empty folder
                    mtime = item["LastModified"]
                    yield pafs.FileInfo(
                        f"{bucket}/{item['Key']}", pafs.FileType.File, size=int(item["Size"]), mtime=mtime
                    )
            for item in page.get("CommonPrefixes", ()):
                yield pafs.FileInfo(f"{bucket}/{item['Prefix'].rstrip('/')}", pafs.FileType.Directory)
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if it does not exist. If several jobs try at the same time, one of them succeeds.

        Args:
            data: must differ from what other jobs write: after an answer was lost, the content shows whose write
                succeeded.

        Returns:
            False if the file exists.
        """
        bucket, _, key = path.partition("/")

        def attempt() -> bool:
            try:
                self._call("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except FileExistsError:
                return self._content(bucket, key) == data
            return True

        return self.retry.call(attempt)

    def conditional(self, folder: str) -> bool:
        """Whether the store supports the condition of `create`; older stores ignore or refuse it.

        This is tried once per process.

        Args:
            folder: a folder that may be written to.
        """
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
        """Call a method of the client; errors of boto3 become Python's own, except those of a busy store."""
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
