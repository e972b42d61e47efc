"""Small servers on the loopback that speak as Google Cloud Storage and as Azure Blob Storage do, for reading."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

WRITTEN = 1_700_000_000  # seconds; when all objects were written


@dataclass
class FakeCloud:
    """Objects by bucket (or container) and key.

    Attributes:
        asked: method and address of each request.
        tokens: what each request sent as its authorisation.
    """

    objects: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[FakeCloud]:
    """Serve a `FakeCloud` with `Google` or `Azure`."""
    cloud = FakeCloud()

    class Handler(handler):  # type: ignore[valid-type,misc]
        state = cloud

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    cloud.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield cloud
    finally:
        http.shutdown()
        http.server_close()


class _Cloud(BaseHTTPRequestHandler):
    state: FakeCloud
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.state.asked.append(f"{self.command} {unquote(self.path)}")
        self.state.tokens.append(self.headers.get("Authorization") or "")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.answer(url.path.lstrip("/"), query)

    def answer(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def listed(self, bucket: str, query: dict[str, str]) -> tuple[list[str], list[str]]:
        """Keys and common prefixes below a prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = [key for key in sorted(self.state.objects.get(bucket, {})) if key.startswith(prefix)]
        if not delimiter:
            return keys, []
        rest = {key: key[len(prefix) :] for key in keys}
        folders = {prefix + tail.partition("/")[0] + "/" for tail in rest.values() if "/" in tail}
        return [key for key, tail in rest.items() if "/" not in tail], sorted(folders)

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        asked = self.headers.get("x-ms-range") or self.headers.get("Range")
        status = 200
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            total, status = len(data), 206
            end = min(int(last) if last else total - 1, total - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
            data = data[int(first) : end + 1]
        self.send(status, data, headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


class Google(_Cloud):
    """The JSON API, and downloads by the XML API."""

    def answer(self, path: str, query: dict[str, str]) -> None:
        path = path.removeprefix("download/")
        if not path.startswith("storage/v1/b/"):
            bucket, _, key = unquote(path).partition("/")
            self._download(bucket, key)
            return
        bucket, _, rest = path.removeprefix("storage/v1/b/").partition("/")
        if bucket not in self.state.objects:
            self._json({"error": {"code": 404, "message": "The specified bucket does not exist."}}, 404)
        elif not rest:
            self._json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "EU"})
        elif rest == "o":
            keys, folders = self.listed(bucket, query)
            items = [self._object(bucket, key) for key in keys]
            self._json({"kind": "storage#objects", "items": items, "prefixes": folders})
        else:
            key = unquote(rest.removeprefix("o/"))
            if query.get("alt") == "media":
                self._download(bucket, key)
            elif key in self.state.objects[bucket]:
                self._json(self._object(bucket, key))
            else:
                self._json({"error": {"code": 404, "message": f"No such object: {bucket}/{key}"}}, 404)

    def _object(self, bucket: str, key: str) -> dict[str, Any]:
        data = self.state.objects[bucket][key]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        times = dict.fromkeys(("timeCreated", "updated"), "2023-11-14T22:13:20.000Z")
        return {
            "kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(data)), "generation": "1",
            "md5Hash": digest, **times,
        }  # fmt: skip

    def _download(self, bucket: str, key: str) -> None:
        data = self.state.objects.get(bucket, {}).get(key)
        if data is None:
            self.send(404, b"No such object")
            return
        self.content(data, {"x-goog-generation": "1", "x-goog-stored-content-length": str(len(data))})

    def _json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class Azure(_Cloud):
    """Blobs, and the answer of an account without a hierarchical namespace."""

    def answer(self, path: str, query: dict[str, str]) -> None:
        # An emulator has the account before the container.
        _, _, path = unquote(path).partition("/")
        container, _, key = path.partition("/")
        blobs = self.state.objects.get(container)
        if blobs is None:
            self._refuse("ContainerNotFound")
        elif query.get("comp") == "list":
            self._list(container, query)
        elif not key:
            self.send(200, b"", self._facts(b""))
        elif key in blobs:
            self.content(blobs[key], self._facts(blobs[key]))
        else:
            self._refuse("BlobNotFound")

    def _list(self, container: str, query: dict[str, str]) -> None:
        keys, folders = self.listed(container, query)
        entries = ""
        for key in keys:
            data = self.state.objects[container][key]
            facts = f"<Last-Modified>{formatdate(WRITTEN, usegmt=True)}</Last-Modified><Etag>0x1</Etag>"
            facts += f"<Creation-Time>{formatdate(WRITTEN, usegmt=True)}</Creation-Time>"
            facts += f"<Content-Length>{len(data)}</Content-Length><BlobType>BlockBlob</BlobType>"
            entries += f"<Blob><Name>{escape(key)}</Name><Properties>{facts}</Properties></Blob>"
        entries += "".join(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in folders)
        text = '<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint="x" '
        text += f'ContainerName="{container}"><Blobs>{entries}</Blobs><NextMarker /></EnumerationResults>'
        self.send(200, text.encode(), {"Content-Type": "application/xml", "x-ms-version": "2021-12-02"})

    def _facts(self, data: bytes) -> dict[str, str]:
        return {
            "Last-Modified": formatdate(WRITTEN, usegmt=True), "ETag": '"0x1"', "x-ms-blob-type": "BlockBlob",
            "x-ms-creation-time": formatdate(WRITTEN, usegmt=True), "x-ms-version": "2021-12-02",
            "x-ms-lease-state": "available", "x-ms-lease-status": "unlocked", "x-ms-server-encrypted": "true",
            "x-ms-has-immutability-policy": "false", "x-ms-has-legal-hold": "false",
        }  # fmt: skip

    def _refuse(self, code: str) -> None:
        text = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self.send(404, text.encode(), {"x-ms-error-code": code, "Content-Type": "application/xml"})
