"""Jobs on the containers of cluster/local/ whose workers and driver are killed. Some 16 minutes on two cores:

    python tests/cluster/containers.py [--only NAME ...] [--keep]

It starts that cluster (images and settings as cluster/local/up.sh takes them from the environment), runs the default
recipe undisturbed, and then each case of `CASES` on the same store without the stages that it disturbs and those
after them. Each has to end with a finished run that says the same as the undisturbed one, with all
attempts on the bill and one MLflow run whose curves have every step once. It prints a line for each and takes the
cluster down. Not for a machine on which cluster/local/ is in use: it is refused where its secrets are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "cluster" / "local"
PORTS = {"DASHBOARD_PORT": "18265", "MLFLOW_PORT": "15000", "S3_PORT": "19000"}
RECIPE = ["cluster.workers=2"]  # the default one
SEED_NOISE = 0.05  # of the test accuracy; runs with other seeds differ by up to this much
BUCKET = "ktray"
DRIVER = "import os, signal; [os.kill(int(p), signal.SIGKILL) for p in os.listdir('/proc') if p.isdigit() and "
DRIVER += "b'jobs/distill.py' in open(f'/proc/{p}/cmdline', 'rb').read().split(b'\\0')]"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Cluster:
    """What cluster/local/up.sh started."""

    def __init__(self) -> None:
        self.tool = "docker" if _works("docker", "compose", "version") else "podman"
        lines = (LOCAL / ".env").read_text().split()
        self.secrets = dict(line.split("=", 1) for line in lines)
        self.s3: Any = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{PORTS['S3_PORT']}",
            aws_access_key_id="ktray",
            aws_secret_access_key=self.secrets["S3_SECRET"],
            region_name="us-east-1",
        )
        os.environ |= {
            "MLFLOW_TRACKING_USERNAME": "ktray",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["MLFLOW_PASSWORD"],
            # Else the server names an address in the bucket, which this machine cannot resolve.
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        }
        self.runs = mlflow.MlflowClient(f"http://127.0.0.1:{PORTS['MLFLOW_PORT']}")

    def call(self, *command: str) -> str:
        done = subprocess.run([self.tool, *command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        label = f"label=com.docker.compose.service={service}"
        return sorted(self.call("ps", "--filter", label, "--format", "{{.Names}}").split())

    def running(self, process: str) -> list[str]:
        """Workers in which there is a process whose title has ``process``."""
        return [name for name in self.containers("worker") if process in self.call("top", name, "args")]

    def kill(self, name: str) -> None:
        self.call("kill", "--signal", "KILL", name)

    def start(self, name: str) -> None:
        self.call("start", name)

    def head(self) -> str:
        return self.containers("head")[0]

    # --------------------------------------------------------------------------------------- the job API

    def ask(self, path: str) -> Any:
        """JSON of the dashboard."""
        request = urllib.request.Request(f"http://127.0.0.1:{PORTS['DASHBOARD_PORT']}{path}")
        request.add_header("Authorization", f"Bearer {self.secrets['RAY_AUTH_TOKEN']}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def submit(self, name: str) -> None:
        job = ["ray", "job", "submit", "--no-wait", "--submission-id", name, "--", "python", "jobs/distill.py"]
        self.call("exec", self.head(), *job, *RECIPE, f"store=s3://{BUCKET}/store")

    def status(self, name: str) -> str:
        return str(self.ask(f"/api/jobs/{name}")["status"])

    def log(self, name: str) -> str:
        return str(self.ask(f"/api/jobs/{name}/logs")["logs"])

    def finish(self, name: str, limit: float = 1800) -> str:
        """Wait for the job's end; returns its last status."""
        deadline = time.monotonic() + limit
        while (now := self.status(name)) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, f"{name} is still {now} after {limit:.0f} s:\n{self.log(name)[-3000:]}"
            time.sleep(2)
        return now

    def wait(self, name: str, there: Callable[[], Any], what: str, limit: float = 600) -> Any:
        """Wait until ``there`` gives something, while the job runs."""
        deadline = time.monotonic() + limit
        while not (found := there()):
            assert self.status(name) in ("PENDING", "RUNNING"), f"ended before {what}:\n{self.log(name)[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} in {limit:.0f} s:\n{self.log(name)[-3000:]}"
            time.sleep(0.3)
        return found

    # ----------------------------------------------------------------------------------------- the store

    def keys(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", [])]

    def read(self, key: str) -> Any:
        return json.loads(self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def forget(self, *stages: str) -> None:
        """Delete stages, and the runs, so that the next job makes them again."""
        for part in ("runs", *(f"stages/{stage}" for stage in stages)):
            for key in self.keys(f"store/{part}/"):
                self.s3.delete_object(Bucket=BUCKET, Key=key)

    def results(self) -> list[dict[str, Any]]:
        return [self.read(key) for key in self.keys("store/runs/") if key.endswith("/result.json")]


def _works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def checked(cluster: Cluster) -> dict[str, Any]:
    """The one result in the store, after a look at MLflow: one finished run with a run for each stage, its report, and
    curves in which each step stands once."""
    (result,) = cluster.results()
    logged = cluster.runs.get_run(result["mlflow"]["run_id"])
    experiment = logged.info.experiment_id
    same = cluster.runs.search_runs(experiment, f"attributes.run_name = '{result['run_id']}'")
    assert [run.info.run_id for run in same] == [logged.info.run_id], "the run was begun anew in MLflow"
    assert logged.info.status == "FINISHED"
    assert abs(logged.data.metrics["test.top1"] - result["metric"]["test"]) < 1e-9
    assert "report.html" in str(cluster.runs.list_artifacts(logged.info.run_id)), "no artifacts"
    nested = cluster.runs.search_runs(experiment, f"tags.`mlflow.parentRunId` = '{logged.info.run_id}'")
    names = Counter(run.info.run_name for run in nested)
    assert set(names.values()) == {1}, f"stages twice, or none: {names}"
    assert all(run.info.status == "FINISHED" for run in nested)
    for run in nested:
        # A cost is no curve: a stage that is asked for again says it again.
        for metric in (name for name in run.data.metrics if not name.startswith("cost.")):
            steps = [point.step for point in cluster.runs.get_metric_history(run.info.run_id, metric)]
            assert len(steps) == len(set(steps)), f"{run.info.run_name}: {metric} has steps twice: {sorted(steps)}"
    return result


def attempts(result: dict[str, Any]) -> dict[str, int]:
    return {stage["name"]: stage["attempts"] for stage in result["stages"] if not stage["cached"]}


# -------------------------------------------------------------------------------------------------- cases


def undisturbed(cluster: Cluster) -> dict[str, Any]:
    cluster.submit("undisturbed")
    assert cluster.finish("undisturbed") == "SUCCEEDED", cluster.log("undisturbed")[-3000:]
    result = checked(cluster)
    assert set(attempts(result).values()) == {1}
    return result


def worker_in_transfer(cluster: Cluster) -> dict[str, Any]:
    """The container of a training worker dies after a checkpoint and comes back; Ray Train goes on inside the job."""
    name = "worker-in-transfer"
    cluster.forget("transfer", "finetune", "evaluate")
    cluster.submit(name)
    saved = lambda: [k for k in cluster.keys("store/stages/transfer/") if "/train/" in k and k.endswith("state.pt")]  # noqa: E731
    cluster.wait(name, saved, "checkpoint of TRANSFER")
    both = cluster.running("RayTrainWorker")
    say(f"training workers in {both}")
    assert len(both) == 2, "the training workers share a machine"
    killed(cluster, both[-1])
    assert cluster.finish(name) == "SUCCEEDED", cluster.log(name)[-3000:]
    result = checked(cluster)
    (row,) = (stage for stage in result["stages"] if stage["name"] == "transfer")
    say(f"transfer: {row['restarts']} restarts, {row['lost_flops'] / row['flops']:.0%} of its compute was done again")
    assert row["restarts"] >= 1
    assert 0 < row["lost_flops"] < row["flops"] / 2
    return result


def worker_in_teach(cluster: Cluster) -> dict[str, Any]:
    """A container dies in which the teacher's outputs are made; Ray Data makes the lost ones again."""
    name = "worker-in-teach"
    cluster.forget("teach", "transfer", "finetune", "evaluate")
    cluster.submit(name)
    cluster.wait(name, lambda: re.search(r"^teach: ", cluster.log(name), re.M), "start of TEACH")
    busy = cluster.wait(name, lambda: cluster.running("ray::"), "tasks of TEACH")
    killed(cluster, busy[0])
    log = cluster.log(name)
    assert "transfer: " not in log, "TEACH was over before the kill"
    assert cluster.finish(name) == "SUCCEEDED", cluster.log(name)[-3000:]
    return checked(cluster)


def driver_in_finetune(cluster: Cluster) -> dict[str, Any]:
    """The driver dies; the same command, submitted again, goes on."""
    name = "driver-in-finetune"
    cluster.forget("finetune", "evaluate")
    cluster.submit(name)
    cluster.wait(name, lambda: re.search(r"^finetune: [1-9]", cluster.log(name), re.M), "step of FINETUNE")
    cluster.call("exec", cluster.head(), "python", "-c", DRIVER)
    assert cluster.finish(name) == "FAILED"
    cluster.submit(f"{name}-again")
    assert cluster.finish(f"{name}-again") == "SUCCEEDED", cluster.log(f"{name}-again")[-3000:]
    result = checked(cluster)
    assert attempts(result)["finetune"] == 2
    return result


def killed(cluster: Cluster, container: str, back_after: float = 5.0) -> None:
    """SIGKILL, and a machine in its place some seconds later."""
    cluster.kill(container)
    say(f"killed {container}")
    time.sleep(back_after)
    cluster.start(container)


def two_at_once(cluster: Cluster) -> dict[str, Any]:
    """The same command twice at the same time: one makes a stage, the other waits for it and reuses it."""
    cluster.forget("curate", "teach", "transfer", "finetune", "evaluate")
    for name in ("first", "second"):
        cluster.submit(name)
    for name in ("first", "second"):
        assert cluster.finish(name) == "SUCCEEDED", cluster.log(name)[-3000:]
    found = cluster.results()
    for key in cluster.keys("store/stages/"):
        if key.endswith("/ledger.jsonl"):
            lines = cluster.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read().decode().splitlines()
            assert len({json.loads(line)["attempt"] for line in lines}) == 1, f"{key}: made twice"
    return found[0]


def answer(url: str, token: str | None = None, data: bytes | None = None) -> int:
    """The HTTP status of a GET, or of a POST of ``data``."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as page:
            return int(page.status)
    except urllib.error.HTTPError as error:
        return error.code


def without_token(cluster: Cluster) -> None:
    """Dashboard, job API and MLflow refuse who has no token or a wrong one."""
    board = f"http://127.0.0.1:{PORTS['DASHBOARD_PORT']}"
    job = json.dumps({"entrypoint": "id"}).encode()
    for path, data in (("/api/jobs/", None), ("/api/jobs/", job), ("/nodes?view=summary", None)):
        codes = answer(board + path, None, data), answer(board + path, "0" * 48, data)
        say(f"{'POST' if data else 'GET'} {path}: {codes[0]} without a token, {codes[1]} with a wrong one")
        assert codes == (401, 403)
    assert answer(f"{board}/api/jobs/", cluster.secrets["RAY_AUTH_TOKEN"]) == 200
    runs = f"http://127.0.0.1:{PORTS['MLFLOW_PORT']}/api/2.0/mlflow/experiments/search?max_results=1"
    code = answer(runs)
    say(f"MLflow: {code} without a password")
    assert code == 401


@dataclass(frozen=True)
class Case:
    run: Callable[[Cluster], dict[str, Any]]
    stage: str  # that was disturbed


CASES = {
    "worker-in-transfer": Case(worker_in_transfer, "transfer"),
    "worker-in-teach": Case(worker_in_teach, "teach"),
    "driver-in-finetune": Case(driver_in_finetune, "finetune"),
    "two-at-once": Case(two_at_once, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="cases to run")
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    chosen = parser.parse_args()
    if (LOCAL / ".env").exists():
        sys.exit("cluster/local/ is in use on this machine; take it down first: cluster/local/down.sh --volumes")
    os.environ |= PORTS
    try:
        began = time.monotonic()
        subprocess.run([LOCAL / "up.sh"], check=True)
        say(f"the cluster is up after {time.monotonic() - began:.0f} s")
        cluster = Cluster()
        without_token(cluster)
        plain = {}
        for name, run in {"undisturbed": undisturbed, **{name: CASES[name].run for name in chosen.only}}.items():
            began = time.monotonic()
            result = run(cluster)
            plain = plain or result
            top1, took = result["metric"]["test"], time.monotonic() - began
            say(f"{name}: test {top1:.4f}, attempts {attempts(result)}, {took:.0f} s")
            assert abs(top1 - plain["metric"]["test"]) <= SEED_NOISE, "another accuracy than undisturbed"
    finally:
        if not chosen.keep:
            subprocess.run([LOCAL / "down.sh", "--volumes"])


if __name__ == "__main__":
    main()
