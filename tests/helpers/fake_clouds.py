"""Small servers on the loopback that speak as Google Cloud Storage and as Azure Blob Storage do, for reading."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

WRITTEN = 1_700_000_000  # seconds; when all objects were written


@contextmanager
def served(kind: str, folder: Path) -> Iterator[str]:
    """Serve the files of a folder, whose subfolders are the buckets (or containers); gives the address.

    Args:
        kind: ``google`` or ``azure``.
    """
    # In a process of its own, because pyarrow's client holds the interpreter while it waits for an answer.
    server = subprocess.Popen([sys.executable, __file__, kind, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


class _Cloud(BaseHTTPRequestHandler):
    objects: ClassVar[dict[str, dict[str, bytes]]] = {}
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.answer(url.path.lstrip("/"), query)

    def answer(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def listed(self, bucket: str, query: dict[str, str]) -> tuple[list[str], list[str]]:
        """Keys and common prefixes below a prefix."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = [key for key in sorted(self.objects.get(bucket, {})) if key.startswith(prefix)]
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
        if bucket not in self.objects:
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
            elif key in self.objects[bucket]:
                self._json(self._object(bucket, key))
            else:
                self._json({"error": {"code": 404, "message": f"No such object: {bucket}/{key}"}}, 404)

    def _object(self, bucket: str, key: str) -> dict[str, Any]:
        data = self.objects[bucket][key]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        times = dict.fromkeys(("timeCreated", "updated"), "2023-11-14T22:13:20.000Z")
        return {
            "kind": "storage#object", "name": key, "bucket": bucket, "size": str(len(data)), "generation": "1",
            "md5Hash": digest, **times,
        }  # fmt: skip

    def _download(self, bucket: str, key: str) -> None:
        data = self.objects.get(bucket, {}).get(key)
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
        blobs = self.objects.get(container)
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
            data = self.objects[container][key]
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


if __name__ == "__main__":
    root = Path(sys.argv[2])
    for path in (path for path in root.rglob("*") if path.is_file()):
        bucket, *key = path.relative_to(root).parts
        _Cloud.objects.setdefault(bucket, {})["/".join(key)] = path.read_bytes()
    http = ThreadingHTTPServer(("127.0.0.1", 0), {"google": Google, "azure": Azure}[sys.argv[1]])
    print(f"http://127.0.0.1:{http.server_address[1]}", flush=True)
    http.serve_forever()
