"""A ktray job on workers that come and go: it starts on the head alone; a second node joins, is used, and dies without
notice; then the head dies with the driver, and the same command on a new head ends the run. Some minutes on two cores;
run it by itself:

    python tests/cluster/elastic.py [--notice] [STEPS]

STEPS are to last for some minutes on one core (3,000 by default), so that everything happens before they are over. With
``--notice`` the second node is drained first, as a spot machine is, which is no failure (none is allowed), and the head
lives.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/helpers"))
from small_task import SMALL, write_gallery, write_task  # noqa: E402

NOTICE = "--notice" in sys.argv
STEPS = next((int(word) for word in sys.argv[1:] if word.isdigit()), 3000)
JOB = [
    *SMALL,
    "cluster.workers=1..2",
    "cluster.resize_seconds=3",
    "cluster.stall_minutes=5",
    f"train.steps={STEPS}",
    "train.checkpoint_seconds=3",
    "baselines.scratch=false",
    "finetune.steps=0",
    "teach.mode=cached",
    f"cluster.max_failures={0 if NOTICE else 3}",
]
LIMIT = 900.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_node(*arguments: str, log: Path) -> subprocess.Popen:
    ray = str(Path(sys.executable).with_name("ray"))
    own = [] if any(argument.startswith("--num-cpus=") for argument in arguments) else ["--num-cpus=2"]
    command = [ray, "start", "--block", "--object-store-memory=300000000", *own, *arguments]
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)


def end(node: subprocess.Popen, how: signal.Signals) -> None:
    """The node's processes, all of which are in one group."""
    os.killpg(node.pid, how)
    try:
        node.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(node.pid, signal.SIGKILL)


def drain(address: str, seconds: int) -> None:
    """Tell the cluster, as a cloud's agent does, that the node which is not the head will be taken away."""
    ask = f"import ray; ray.init(address={address!r}, logging_level='ERROR'); "
    ask += (
        "print([n['NodeID'] for n in ray.nodes() if n['Alive'] and 'node:__internal_head__' not in n['Resources']][0])"
    )
    node = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout.split()[-1]
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={address}", f"--node-id={node}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    subprocess.run([*command, f"--deadline-remaining-seconds={seconds}"], check=True)


class Job:
    """The driver, and what it has said."""

    def __init__(self, address: str, store: Path, log: Path) -> None:
        environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "jobs/distill.py"), *JOB, f"store={store}"]
        command += [f"task.data={log.parent / 'task'}", f"gallery.data={log.parent / 'gallery'}"]
        self.log, self.began = log, time.monotonic()
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str, limit: float = LIMIT) -> re.Match[str]:
        stop = time.monotonic() + limit
        while (found := re.search(pattern, self.said)) is None:
            assert self.process.poll() is None, f"the job ended:\n{self.said[-3000:]}"
            assert time.monotonic() < stop, f"not within {limit:g} s: {pattern}\n{self.said[-3000:]}"
            time.sleep(0.2)
        return found

    def work(self) -> None:
        """Wait for some lines of progress, one each five seconds."""
        seen = self.said.count("transfer: ")
        self.until(rf"(?s)(?:transfer: .*?){{{seen + 3}}}")

    def tell(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)


def steps_of_transfer(store: Path) -> Counter:
    """How often MLflow has the validation of each step of TRANSFER."""
    with sqlite3.connect(store / "mlflow.db") as database:
        rows = database.execute(
            "SELECT m.step FROM metrics m JOIN runs r ON m.run_uuid = r.run_uuid "
            "WHERE m.key = 'val_top1' AND r.name LIKE '%transfer%'"
        ).fetchall()
    return Counter(step for (step,) in rows)


def start_head(home: Path, nodes: list[subprocess.Popen]) -> str:
    """The address of a new cluster of one node."""
    port = free_port()
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={home / f'ray{port}'}"]
    nodes.append(start_node(*head, log=home / f"head{port}.log"))
    time.sleep(20)
    return f"127.0.0.1:{port}"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kt-") as scratch:
        home = Path(scratch)
        write_task(home / "task")
        write_gallery(home / "gallery")
        (home / "token").write_text(secrets.token_hex(32))
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            # The head is to notice within seconds that a node has died without a word.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }
        nodes: list[subprocess.Popen] = []
        try:
            address, store = start_head(home, nodes), home / "store"
            job = Job(address, store, home / "job.log")
            job.until(r"transfer: [1-9][\d,]*/")
            job.tell("the first steps, by one worker")
            nodes.append(start_node(f"--address={address}", log=home / "node.log"))
            job.tell("a second node starts")
            grown = job.until(r"transfer\s+resumed at step (\d+) with 2 workers")
            job.tell(f"two workers from step {grown[1]}")
            job.work()
            if NOTICE:
                drain(address, seconds=10)
                job.tell("notice that the second node will be gone in 10 s")
                time.sleep(10)
            end(nodes.pop(), signal.SIGKILL)
            job.tell("SIGKILL of the second node")
            left = job.until(r"transfer\s+resumed at step (\d+) with 1 worker")
            job.tell(f"one worker from step {left[1]}")
            if not NOTICE:
                job.work()
                end(nodes.pop(), signal.SIGKILL)
                job.process.kill()
                job.tell("SIGKILL of the head and the driver")
                job.process.wait()
                job = Job(start_head(home, nodes), store, home / "again.log")
            assert job.process.wait(LIMIT) == 0, job.said[-3000:]
            job.tell("done" if NOTICE else "the same command on a new head is done")
            check(store)
        finally:
            for node in reversed(nodes):
                end(node, signal.SIGTERM)


def check(store: Path) -> None:
    """Nothing was lost but what lay between a checkpoint and a death, and all of it is on the bill."""
    (file,) = store.glob("runs/*/result.json")
    (kept,) = store.glob("stages/transfer/*/manifest.json")
    result, manifest = json.loads(file.read_text()), json.loads(kept.read_text())
    starts = manifest["starts"]
    (row,) = (s for s in result["stages"] if s["name"] == "transfer")
    names = ("attempts", "restarts", "lost_flops", "flops", "device_seconds", "wall_seconds")
    print("starts of the last attempt", starts, {name: row[name] for name in names})
    assert [start["workers"] for start in starts] == ([1, 2, 1] if NOTICE else [1])
    assert starts[-1]["step"] > 0
    assert (row["attempts"], row["restarts"]) == (1 if NOTICE else 2, 2)
    assert manifest["steps"] == STEPS
    done = row["flops"] / manifest["flops_per_step"]
    again = row["lost_flops"] / manifest["flops_per_step"]
    print(f"{done:.0f} steps were done for {STEPS}; {again:.0f} again while the job lived")
    assert done >= STEPS
    assert row["wall_seconds"] < row["device_seconds"] < 2 * row["wall_seconds"]
    logged = steps_of_transfer(store)
    print(f"MLflow has validation at {sorted(logged)}")
    assert set(logged.values()) == {1}
    print("accuracy on test: student", result["metric"]["test"], "teacher", result["teacher_metric"]["test"])
    assert result["metric"]["test"] > 0.6  # chance is a third


if __name__ == "__main__":
    main()
