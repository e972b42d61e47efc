"""A small server on the loopback that speaks as the Hugging Face hub does: listing, reading in ranges, uploading."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """Repositories by name (``datasets/ORG/NAME`` or ``models/ORG/NAME``), each with the contents of its files.

    Attributes:
        files: the files of each repository on every revision in ``revisions``.
        gated: repositories whose files are refused.
        closed: repositories that need the token ``hf_test``.
        asked: method and path of each request.
        tokens: what each request sent as its authorisation.
        uploads: the message of each commit.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    gated: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve a `FakeHub`, and let ``HF_ENDPOINT`` and huggingface_hub's own constants name it."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    inside = template[template.index("{repo_id}") :]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.endpoint}/{inside}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        url = urlsplit(self.path)
        self.state.asked.append(f"{self.command} {unquote(url.path)}")
        self.state.tokens.append(self.headers.get("Authorization") or "")
        parts = unquote(url.path).strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if parts[:2] == ["api", "whoami-v2"]:
            self._json({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif (
            self.command == "POST"
            and "paths-info" not in parts
            and self.headers.get("Authorization") != "Bearer hf_test"
        ):
            self._refuse(403, "", "This token may not write.")
        elif parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.state.files.setdefault(f"models/{name}", {})
            self._json({"url": f"{self.state.endpoint}/{name}", "name": name, "id": name})
        elif parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif parts[0] == "api":
            self._api(parts[1], "/".join(parts[1:4]), parts[4:], query, body)
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            self._file(f"{kind}/{'/'.join(rest[:2])}", rest[3], "/".join(rest[4:]))

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _repository(self, name: str, revision: str) -> dict[str, bytes] | None:
        refused = name in self.state.closed and self.headers.get("Authorization") != "Bearer hf_test"
        if name not in self.state.files or refused:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return None
        if revision not in self.state.revisions:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return self.state.files[name]

    def _api(self, kind: str, name: str, rest: list[str], query: dict[str, str], body: bytes) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        files = self._repository(name, revision)
        if files is None:
            return
        action = rest[0] if rest else "revision"
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._json(facts | {"gated": "manual" if name in self.state.gated else False, "downloads": 0, "likes": 0})
        elif action == "tree":
            self._json(_tree(files, "/".join(rest[2:]), query.get("recursive", "").lower() in ("1", "true")))
        elif action == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            every = {entry["path"]: entry for entry in _tree(files, "", True)}
            self._json([every[path] for path in asked if path in every])
        elif action == "preupload":
            facts = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": file["path"], **facts} for file in json.loads(body)["files"]]})
        elif action == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.state.uploads.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"{self.state.endpoint}/{name.partition('/')[2]}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{address}/commit/{COMMIT}"})
        else:
            self._refuse(404, "", f"no such call: {action}")

    def _file(self, name: str, revision: str, path: str) -> None:
        files = self._repository(name, revision)
        if files is None:
            return
        if name in self.state.gated:
            self._refuse(403, "GatedRepo", "Access to it is restricted.")
            return
        if path not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        data = files[path]
        status, asked = 200, self.headers.get("Range")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"', "Accept-Ranges": "bytes"}
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            total, status = len(data), 206
            end = min(int(last) if last else total - 1, total - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{total}"
            data = data[int(first) : end + 1]
        self._send(status, data, headers)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    below = [path for path in sorted(files) if path.startswith(prefix)]
    folders = {prefix + "/".join(path[len(prefix) :].split("/")[:n]) for path in below
               for n in range(1, path[len(prefix) :].count("/") + 1)}  # fmt: skip
    entries = [{"type": "directory", "path": path, "size": 0, "oid": _oid(path.encode())} for path in sorted(folders)]
    entries += [{"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])} for path in below]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"])[len(prefix) :]]
