"""Who has no token gets nothing: a real head, asked over HTTP and by Ray, without, with a wrong and with the right one.

    .venv/bin/python tests/cluster/auth.py

Half a minute to a minute. It starts a head on 127.0.0.1 with `RAY_AUTH_MODE=token` and a token of its own, and asks its
dashboard and job API as an attacker would: to read, to upload code, to run a command, to stop a job. A command leaves a
file, so that what has run is seen and not believed. Then ktray itself: Ray that `connect` starts without any setting,
and who else may join it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASKED = [
    ("GET", "/api/version"),
    ("GET", "/api/jobs/"),
    ("GET", "/nodes?view=summary"),
    ("GET", "/api/v0/actors"),
    ("GET", "/api/cluster_status"),
    ("GET", "/api/v0/logs"),
    ("POST", "/api/jobs/"),
    ("PUT", "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip"),
    ("POST", "/api/jobs/none/stop"),
    ("DELETE", "/api/jobs/none"),
]
# Whether the process lives, which a load balancer or the kubelet asks. They tell nothing else.
OPEN = ["/api/gcs_healthz"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(url: str, method: str, token: str | None, body: bytes | None = None, told: list[bytes] | None = None) -> int:
    """The answer's status; -1 where nobody answers. An error's text goes into ``told``."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        if told is not None:
            told[:] = [error.read()]
        return error.code
    except OSError:
        return -1


def wait(what: str, holds: Callable[[], bool], told: list[bytes] | None = None) -> None:
    end = time.time() + 120
    while not holds():
        assert time.time() < end, f"not within 120 s: {what}; {told}"
        time.sleep(0.5)


def join(address: str, environment: dict[str, str]) -> bool:
    """Whether a driver of its own process comes in."""
    code = f"import ray; ray.init({address!r}, logging_level='CRITICAL'); print('in', len(ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180)
    return done.returncode == 0 and "in 1" in done.stdout


def without_ray(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith("RAY_AUTH") and k != "RAY_ADDRESS"}


def head(home: Path) -> None:
    right, wrong = secrets.token_hex(32), secrets.token_hex(32)
    (home / "token").write_text(right)
    port, dashboard = free_port(), free_port()
    environment = without_ray(dict(os.environ)) | {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(home)}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    # Of their own, so that another Ray of this machine is in nobody's way.
    for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"):
        command.append(f"--{name}={free_port()}")
    command += [f"--temp-dir={home / 'ray'}", "--object-store-memory=200000000"]
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
    with open(home / "head.log", "w") as log:
        ray = subprocess.Popen(command, env=environment | mode, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        wait("the dashboard answers", lambda: ask(f"{url}/api/version", "GET", right) == 200)
        body = {
            who: json.dumps({"entrypoint": f"touch {home}/ran-{who}", "submission_id": who}).encode()
            for who in ("none", "wrong", "right")
        }
        # Its agent, which runs jobs, comes up after it.
        submit, told = json.dumps({"entrypoint": "true"}).encode(), list[bytes]()
        wait("the job API answers", lambda: ask(f"{url}/api/jobs/", "POST", right, submit, told) == 200, told)
        print(f"{'':62}{'no token':>10}{'wrong':>10}{'right':>10}")
        for method, path in ASKED:
            runs = (method, path) == ("POST", "/api/jobs/")
            answers = [
                ask(url + path, method, token, body[who] if runs else b"{}" if method in ("POST", "PUT") else None)
                for who, token in (("none", None), ("wrong", wrong), ("right", right))
            ]
            print(f"{method:<7}{path:<55}" + "".join(f"{code:>10}" for code in answers), flush=True)
            assert set(answers[:2]) <= {401, 403}, f"{method} {path} is not refused"
            assert answers[2] not in (401, 403, -1), f"{method} {path} is refused with the right token"
        for path in OPEN:
            print(f"GET    {path:<55}{ask(url + path, 'GET', None):>10}    (whether it lives)", flush=True)
        wait("the job of the right token has run", lambda: (home / "ran-right").exists())
        assert sorted(p.name for p in home.glob("ran-*")) == ["ran-right"]
        address = f"127.0.0.1:{port}"
        assert not join(address, environment | {"RAY_AUTH_MODE": "disabled"}), "a driver without token came in"
        assert not join(address, environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": wrong})
        assert join(address, environment | mode), "the driver with the right token did not come in"
        print("drivers: without and with a wrong token refused, with the right one in", flush=True)
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        logged = [p for p in (home / "ray").rglob("*") if p.is_file() and right.encode() in p.read_bytes()]
        assert right not in shown, "the token is in a command line"
        assert not logged, f"the token is in {logged}"
        print("the token is in no command line and in no log of the head", flush=True)
    finally:
        os.killpg(ray.pid, signal.SIGTERM)
        try:
            ray.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(ray.pid, signal.SIGKILL)


LOCAL = """
import json, os, sys
from ktray.distributed.connect import connect
connect()
import ray
seen = ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote())
print(json.dumps([ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_MODE"], seen]), flush=True)
sys.stdin.read()
"""


def local(home: Path) -> None:
    """Ray as a plain ``python jobs/distill.py`` starts it."""
    environment = without_ray(dict(os.environ)) | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    errors = home / "driver.log"
    with open(errors, "w") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        driver = subprocess.Popen([sys.executable, "-c", LOCAL], env=environment, text=True, **pipes)
    try:
        assert driver.stdout is not None
        line = driver.stdout.readline()
        assert line, f"the driver ended: {errors.read_text()[-2000:]}"
        address, mode, seen = json.loads(line)
        assert (mode, seen) == ("token", "token")
        assert not join(address, environment | {"RAY_AUTH_MODE": "disabled"}), "a stranger came in"
        assert not (home / ".ray" / "auth_token").exists(), "a token was left behind"
        print(f"Ray of a plain job at {address}: others are refused, and no token is left behind", flush=True)
    finally:
        driver.communicate(timeout=60)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kt-") as scratch:
        for part in (head, local):
            (home := Path(scratch) / part.__name__).mkdir()
            part(home)


if __name__ == "__main__":
    main()
