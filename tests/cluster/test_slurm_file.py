"""The Slurm script, with small programs in the place of Slurm's and Ray's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/slurm/ktray.sbatch"
PROGRAMS = {
    "scontrol": '#!/bin/sh\necho "$@" >>"$CALLS/scontrol"\ncase $1 in show) echo node-7; echo node-8;; esac\n',
    # Ends the job, as Slurm's interrupt does. Here it must be TERM: children of a script in the background ignore INT.
    "scancel": '#!/bin/sh\necho "$@" >>"$CALLS/scancel"\nkill -TERM $(cat "$CALLS/pid")\n',
    # Runs once, as on the first node; options of srun are left out.
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    # Records its environment and arguments, then runs what is behind "--"; or fails to start.
    "ray": '#!/bin/bash\nenv | grep ^RAY_ | sort >"$CALLS/environment"\nprintf "%s\\n" "$@" >"$CALLS/ray"\n'
    '[[ -e $CALLS/broken ]] && exit 0\nwhile [[ $1 != -- ]]; do shift; done\nshift\nexec "$@"\n',
    "python": '#!/bin/bash\nprintf "%s\\n" "$@" >"$CALLS/python"\n'
    '[[ $2 == wait ]] && echo $$ >"$CALLS/pid" && exec sleep 60\nexit "${2:-0}"\n',
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/distill.py").touch()
    (tmp_path / "calls").mkdir()
    return tmp_path


def environment(checkout: Path) -> dict[str, str]:
    slurm = {
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "16",
        "CALLS": str(checkout / "calls"),
    }
    path = f"{checkout / '.venv/bin'}:{os.environ['PATH']}"
    return {name: v for name, v in os.environ.items() if not name.startswith("RAY_")} | slurm | {"PATH": path}


def submit(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment(checkout), capture_output=True, text=True, timeout=60)


def called(checkout: Path, name: str) -> list[str]:
    path = checkout / "calls" / name
    return path.read_text().splitlines() if path.exists() else []


def test_the_job_runs_on_the_first_node_with_its_arguments(checkout: Path) -> None:
    done = submit(checkout, "jobs/distill.py", "0", "task.data=a b")
    assert done.returncode == 0, done.stderr
    assert called(checkout, "python") == ["jobs/distill.py", "0", "task.data=a b"]
    ray = called(checkout, "ray")
    options = ray[: ray.index("--")]
    assert options[:5] == ["symmetric-run", "--address", "node-7:23456", "--min-nodes", "2"]
    assert {"--num-cpus=16", "--temp-dir=/tmp/ray-123456", "--include-dashboard=false"} <= set(options)
    values = dict(line.split("=", 1) for line in called(checkout, "environment"))
    assert values["RAY_ADDRESS"] == "node-7:23456"
    assert values["RAY_AUTH_MODE"] == "token"
    assert len(values["RAY_AUTH_TOKEN"]) == 48
    submit(checkout, "jobs/distill.py")
    assert values["RAY_AUTH_TOKEN"] not in "".join(called(checkout, "environment"))
    assert not list(checkout.glob(".ktray*"))


def test_the_exit_code_is_that_of_the_job(checkout: Path) -> None:
    assert submit(checkout, "jobs/distill.py", "3").returncode == 3


def test_a_ray_that_does_not_start_is_a_failure(checkout: Path) -> None:
    (checkout / "calls/broken").touch()
    done = submit(checkout, "jobs/distill.py")
    assert done.returncode == 1
    assert "did not run, because Ray did not start on all 2 nodes" in done.stderr


def test_what_is_missing_is_named_before_anything_starts(checkout: Path) -> None:
    for arguments in ((), ("jobs/nothing.py",)):
        done = submit(checkout, *arguments)
        assert done.returncode == 2
        assert "is not a job" in done.stderr
    (checkout / ".venv/bin/ray").unlink()
    done = submit(checkout, "jobs/distill.py")
    assert done.returncode == 2
    assert "Install ktray" in done.stderr
    assert not called(checkout, "ray")


def test_near_its_time_limit_it_is_queued_again(checkout: Path) -> None:
    command = ["bash", str(SCRIPT), "jobs/distill.py", "wait"]
    started = subprocess.Popen(command, env=environment(checkout), start_new_session=True, stdout=subprocess.PIPE)
    try:
        while not called(checkout, "pid"):
            assert started.poll() is None
            time.sleep(0.05)
        started.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 30
        while "requeue 123456" not in called(checkout, "scontrol") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "requeue 123456" in called(checkout, "scontrol")
        assert called(checkout, "scancel") == ["--signal=INT 123456.0"]
    finally:
        os.killpg(started.pid, signal.SIGKILL)  # as Slurm does with all processes of a job that it queues again
        started.wait()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_remark() -> None:
    subprocess.run(["shellcheck", SCRIPT], check=True)
