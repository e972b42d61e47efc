"""SIGTERM ends a job as Ctrl-C does, also while it waits for Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ktray.distributed.termination import kept_sigterm

JOB = """
import sys, time
from ktray.cli import main
from ktray.jobs.definitions import Job

def run(recipe, debug):
    try:
        {wait}
    finally:
        print("closed", flush=True)

sys.exit(main(Job("distill", "waits", run, run), []))
"""
PLAIN = "print('ready', flush=True); time.sleep(60)"
WITH_RAY = """
        from ktray.distributed.connect import connect
        connect()
        import ray
        waiting = ray.remote(num_cpus=0)(lambda: time.sleep(60)).remote()
        print("ready", flush=True)
        ray.get(waiting)
"""


@pytest.mark.parametrize("wait", [PLAIN, pytest.param(WITH_RAY, marks=pytest.mark.slow)], ids=["plain", "ray"])
def test_sigterm_closes_the_job_and_says_how_to_resume(wait: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB.format(wait=wait.strip()))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.strip() == "ready":
            break
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 4, out
    assert out.splitlines()[:2] == ["closed", "terminated; the same command resumes this job"]
    assert "***" not in out


def test_a_programs_own_handler_is_kept() -> None:
    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with kept_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with kept_sigterm():
            signal.signal(signal.SIGTERM, own)
        assert signal.getsignal(signal.SIGTERM) is own  # without an own handler, the new one stays
    finally:
        signal.signal(signal.SIGTERM, before)
