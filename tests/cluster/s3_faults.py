"""Whole runs on S3 (moto, in memory) while it fails, and while two jobs make the same stages, on one Ray cluster whose
nodes know the keys and not the address of the store. Some minutes:

    python tests/cluster/s3_faults.py [FOLDER [faults] [together] [killed]]

1. A run without faults. 2. The same on an empty store, with ten seconds each of 500, 503 and late answers once its
first stage is whole: it has to end by itself with the same result. 3. Two jobs of that recipe, started together on an
empty store: each stage is made once, both end with that result too. 4. The same, but the job that makes the targets is
killed over it: the other goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from faulty_s3 import KEYS, Proxy, moto, proxy  # noqa: E402
from small_task import SMALL, write_gallery, write_task  # noqa: E402

BUCKET = "ktray-faults"
FAULTS_S = 30.0


class Job:
    """A distillation in a process of its own."""

    def __init__(self, home: Path, name: str, store: str, server: str, address: str) -> None:
        self.name, self.log = name, home / f"{name}.log"
        self.home = home / name
        self.home.mkdir()
        words = [f"store=s3://{BUCKET}/{store}", f"task.data={home / 'task'}", f"gallery.data=s3://{BUCKET}/gallery"]
        environment = {**os.environ, "AWS_ENDPOINT_URL": server, "RAY_ADDRESS": address}
        command = [sys.executable, str(ROOT / "jobs/distill.py"), *words, *SMALL, "train.steps=40"]
        self.began = time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=self.home, env=environment, stdout=log, stderr=log)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self, limit: float = 900) -> float:
        """Wait for its end; returns the seconds that it took."""
        code = self.process.wait(limit)
        assert code == 0, f"{self.name} ended with {code}:\n{self.text[-3000:]}"
        return time.monotonic() - self.began


def keys(client, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def read(client, key: str) -> str:
    return client.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode()


def wait_for(client, prefix: str, part: str, *jobs: Job) -> None:
    while not any(part in key for key in keys(client, prefix)):
        for job in jobs:
            assert job.process.poll() is None, f"{job.name} ended before '{part}' was there:\n{job.text[-3000:]}"
        time.sleep(0.3)


def results(client, store: str) -> list[dict]:
    return [json.loads(read(client, key)) for key in keys(client, f"{store}/runs/") if key.endswith("/result.json")]


def attempts(client, store: str) -> dict[str, int]:
    """By stage directory, how often it was begun."""
    found = {}
    for key in keys(client, f"{store}/stages/"):
        if key.endswith("/ledger.jsonl"):
            lines = [json.loads(line) for line in read(client, key).splitlines()]
            found[key.split("/stages/")[1].rsplit("/", 1)[0]] = len({(e["stage"], e["attempt"]) for e in lines})
    return found


def faults(client, server: Proxy, home: Path, address: str, wanted: float) -> None:
    job = Job(home, "faults", "faults", server.url, address)
    wait_for(client, "faults/stages/", "manifest.json", job)
    server.seen.clear()
    server.during(FAULTS_S, "500", "503", "slow").join()
    hit = {fault: sum(n for (_, f), n in server.seen.items() if f == fault) for fault in ("500", "503", "slow")}
    took = job.end()
    (result,) = results(client, "faults")
    assert all(hit.values()), f"a fault met no request: {hit}"
    assert result["metric"]["test"] == wanted, "the result is another one"
    told = [line for line in job.text.splitlines() if line.startswith("s3 ")]
    assert told, "nobody was told"
    print(f"2 faults: requests met {hit}; ended by itself after {took:.0f} s with the same result; told:", flush=True)
    print("\n".join(f"    {line[:160]}" for line in told), flush=True)


def together(client, server: Proxy, home: Path, address: str, wanted: float, kill: bool) -> None:
    store = "killed" if kill else "together"
    jobs = [Job(home, f"{store}-{i}", store, server.url, address) for i in range(2)]
    if kill:
        wait_for(client, f"{store}/stages/teach/", "ledger.jsonl", *jobs)  # the attempt has begun
        (key,) = [k for k in keys(client, f"{store}/stages/teach/") if k.endswith("lease/00000001.json")]
        holder = json.loads(read(client, key))["pid"]
        (dead,) = [job for job in jobs if job.process.pid == holder]
        dead.process.send_signal(signal.SIGKILL)
        dead.process.wait()
        jobs.remove(dead)
    took = [job.end() for job in jobs]
    found = results(client, store)
    assert [r["metric"]["test"] for r in found] == [wanted] * len(jobs), "a result is missing or another one"
    begun = attempts(client, store)
    expected = {name: 2 if kill and name.startswith("teach/") else 1 for name in begun}
    assert begun == expected, begun
    waited = sum("waiting" in job.text for job in jobs)
    what = "one killed over teach, the other took over" if kill else f"each of {len(begun)} stages begun once"
    print(f"{4 if kill else 3} two jobs: {what}; {waited} waited; {[round(t) for t in took]} s", flush=True)


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[str]:
    """The address of a Ray cluster of one node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    start += ["--include-dashboard=false", "--object-store-memory=500000000"]
    with open(home / "ray.log", "w") as log:
        head = subprocess.Popen(start, stdout=log, stderr=log, start_new_session=True)
    try:
        time.sleep(30)
        assert head.poll() is None, (home / "ray.log").read_text()[-2000:]
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def main() -> None:
    import boto3

    parts = sys.argv[2:] or ["faults", "together", "killed"]
    os.environ |= {**KEYS, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="kt-s3-") as scratch, contextlib.ExitStack() as until:
        home = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        target = until.enter_context(moto())
        server, address = until.enter_context(proxy(target)), until.enter_context(cluster(home))
        client = boto3.client("s3", endpoint_url=target)
        client.create_bucket(Bucket=BUCKET)
        write_task(home / "task")
        for path in write_gallery(home / "gallery").iterdir():
            client.upload_file(str(path), BUCKET, f"gallery/{path.name}")
        plain = Job(home, "plain", "plain", server.url, address)
        took = plain.end()
        (result,) = results(client, "plain")
        wanted = result["metric"]["test"]
        print(f"1 without faults: {wanted:.3f} on test, {took:.0f} s", flush=True)
        if "faults" in parts:
            faults(client, server, home, address, wanted)
        for name in ("together", "killed"):
            if name in parts:
                together(client, server, home, address, wanted, kill=name == "killed")


if __name__ == "__main__":
    main()
