"""A ktray job on a cluster that is empty when it starts: 0 to N nodes for it and back to 0, with Ray's autoscaler v2
and its fake provider (nodes are processes of this machine). Some minutes; run it by itself:

    python tests/cluster/autoscale.py
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEAD = "f" * 51 + "00000"  # by which the provider knows the head
CPUS = 4
JOB = [
    f"cluster.cpus={CPUS}",
    "cluster.wait_seconds=300",
    "transfer.size=200",
    "train.steps=20",
    "finetune.steps=10",
    "baselines.scratch=false",
]


def config(gcs: str) -> dict:
    nothing = [
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
    ]
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.25,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "head_node_id": HEAD,
            "gcs_address": gcs,  # else its nodes look for port 6379
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        },
        "head_node_type": "ray.head.default",
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in nothing},
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def workers() -> int:
    """Nodes that are up and have CPUs."""
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))


class Watch:
    """How many workers there are, told as it changes."""

    def __init__(self) -> None:
        self.began, self.seen = time.monotonic(), [0]
        print("    0 s  0 nodes, and a job", flush=True)

    def look(self) -> int:
        now = workers()
        if now != self.seen[-1]:
            self.seen.append(now)
            print(f"{time.monotonic() - self.began:5.0f} s  {now} nodes", flush=True)
        return now


def main() -> None:
    program = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory(prefix="kt-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch)
        port, dashboard = free_port(), free_port()
        (home / "token").write_text(secrets.token_hex(32))
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        import ray  # it looks for the token when it is imported

        (home / "fake.json").write_text(json.dumps(config(f"{ray.util.get_node_ip_address()}:{port}")))
        head_alone = os.environ | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        start = [program, "start", "--head", "--num-cpus=0", f"--port={port}"]
        start += [f"--dashboard-port={dashboard}", f"--autoscaling-config={home / 'fake.json'}"]
        start += [f"--temp-dir={home / 'ray'}", "--object-store-memory=500000000"]
        # Fixed by default, so that a second Ray on the machine would take no jobs.
        start += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        with open(home / "head.log", "w") as log:
            subprocess.run(start, stdout=log, stderr=log, check=True, env=head_alone)
        try:
            watch(port, dashboard, home)
        except BaseException:
            for name in ("head.log", "ray/session_latest/logs/monitor.log"):
                if (home / name).exists():
                    lines = [one for one in (home / name).read_text().splitlines() if "legacy field" not in one]
                    print(f"--- {name}", *lines[-40:], sep="\n", flush=True)
            raise
        finally:
            stop(str(home))


def stop(home: str) -> None:
    """End the processes that have this folder on their command line or in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            about = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            if home.encode() in about and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)


def submit(address: str, command: str) -> tuple[Any, str]:
    """The jobs' API and the job's name, once the head takes jobs."""
    from ray.job_submission import JobSubmissionClient

    until = time.monotonic() + 120
    while True:
        try:
            api = JobSubmissionClient(address)
            # No working_dir: all nodes here have one session folder, and the job's was gone from it once others had
            # joined.
            return api, api.submit_job(entrypoint=command, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
        except (ConnectionError, RuntimeError):  # no dashboard yet, or no agent of it
            if time.monotonic() > until:
                raise
            time.sleep(2)


def watch(port: int, dashboard: int, home: Path) -> None:
    """The job, from an empty cluster to an empty cluster."""
    import ray

    command = [sys.executable, str(ROOT / "jobs/distill.py"), *JOB, f"store={home / 'store'}"]
    api, job = submit(f"http://127.0.0.1:{dashboard}", shlex.join(command))
    nodes = Watch()
    ray.init(address=f"127.0.0.1:{port}", logging_level="ERROR", log_to_driver=False)
    while not api.get_job_status(job).is_terminal():
        nodes.look()
        time.sleep(1)
    ended = time.monotonic()
    print(api.get_job_logs(job))
    print(f"{ended - nodes.began:5.0f} s  the job {api.get_job_status(job)}", flush=True)
    assert api.get_job_status(job) == "SUCCEEDED"
    assert nodes.seen[-1] == max(nodes.seen) == CPUS // 2
    assert nodes.seen == sorted(nodes.seen), "a machine went while the job ran"
    while nodes.look() and time.monotonic() - ended < 120:
        time.sleep(1)
    assert nodes.seen[-1] == 0, "nodes stay"
    ray.shutdown()


if __name__ == "__main__":
    main()
