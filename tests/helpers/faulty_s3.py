"""An S3 server in memory (moto), and a proxy before it that answers 500, 503, late or not at all when told to."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# ``lost``: the request is obeyed, and its answer is a 500.
FAULTS = ("500", "503", "501", "411", "slow", "reset", "lost")
_ERRORS = {"500": "InternalError", "503": "SlowDown", "501": "NotImplemented", "411": "MissingContentLength"}


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """The address of a server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


class Proxy(ThreadingHTTPServer):
    """Passes requests on, but for ``fault``: one of `FAULTS`, or "" for none. It also takes the requests that clients
    send to a proxy, whatever host they name.

    Attributes:
        fault: what befalls each request now; a callable is asked with method and path.
        slow_s: by how much a slow answer is late.
        seen: requests by method and fault.
        sent: bytes of the answers to GET.
        hide: names of headers (lower case) that the server shall not see, as an older one ignores them.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.fault: str | Callable[[str, str], str] = ""
        self.slow_s = 8.0
        self.seen: Counter[tuple[str, str]] = Counter()
        self.sent = 0
        self.hide: set[str] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def first(self, count: int, fault: str, method: str = "", part: str = "") -> None:
        """The fault for the first requests of a method (all if empty) whose path contains a part."""
        left = [count]
        lock = threading.Lock()

        def chosen(asked: str, path: str) -> str:
            with lock:
                if left[0] and method in ("", asked) and part in path:
                    left[0] -= 1
                    return fault
            return ""

        self.fault = chosen

    def during(self, seconds: float, *faults: str) -> threading.Thread:
        """The faults one after the other, in so many seconds all together; returns the thread that does it."""

        def work() -> None:
            for fault in faults:
                self.fault = fault
                time.sleep(seconds / len(faults))
            self.fault = ""

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _answer(self) -> None:
        proxy = self.server
        body = self._body()
        fault = proxy.fault if isinstance(proxy.fault, str) else proxy.fault(self.command, self.path)
        proxy.seen[self.command, fault] += 1
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(proxy.slow_s)
        if fault in _ERRORS:
            self._refuse(fault)
            return
        drop = {"transfer-encoding", "content-length", "connection", "expect"} | proxy.hide
        if self.path.startswith("http://"):
            drop.add("host")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
        upstream = http.client.HTTPConnection(proxy.target, timeout=60)
        # moto looks, then writes: of two conditional writes at once both may succeed there.
        alone = proxy.lock if "if-none-match" in (name.lower() for name in headers) else contextlib.nullcontext()
        with alone, contextlib.closing(upstream):
            upstream.request(self.command, _local(self.path), body, headers | {"Content-Length": str(len(body))})
            answer = upstream.getresponse()
            data = answer.read()
        if self.command == "GET":
            with proxy.lock:
                proxy.sent += len(data)
        if fault == "lost":
            self._refuse("500")
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, fault: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{_ERRORS[fault]}</Code><Message>planted</Message></Error>'.encode()
        self.send_response(int(fault))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer


def _local(path: str) -> str:
    """The path of a request, without the host that a client names to a proxy."""
    return "/" + path.split("/", 3)[3] if path.startswith("http://") else path


@contextlib.contextmanager
def proxy(target: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    server = Proxy(target)
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
