"""SIGKILL of the driver during TRANSFER: the same command goes on and ends as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from heard import heard
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.pipeline.run import run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 160
BEFORE = ("labels", "adapt", "index", "curate", "hygiene", "teach")


def command(root, store):
    return [
        sys.executable,
        str(ROOT / "jobs/distill.py"),
        f"store={store}",
        *SMALL,
        f"task.data={root / 'task'}",
        f"gallery.data={root / 'gallery'}",
        f"train.steps={STEPS}",
        "train.checkpoint_seconds=1",
        "baselines.scratch=false",
        # One thread: beside a busy program a training takes fewer threads, which changes the last digits.
        "cluster.jobs=2",
    ]


def weights(store):
    (file,) = (store / "stages/transfer").glob("*/weights.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def result_of(store):
    (file,) = (store / "runs").glob("*/result.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_killed_driver_resumes_from_the_last_checkpoint_with_the_same_result(cluster, tmp_path):
    write_task(tmp_path / "task")
    write_gallery(tmp_path / "gallery")
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command(tmp_path, killed), env=environment, stdout=log, stderr=log)
        limit = time.monotonic() + 300
        while not list((killed / "stages/transfer").glob("*/train/**/state.pt")):
            assert job.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < limit, "no checkpoint in five minutes"
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not list((killed / "stages/transfer").glob("*/manifest.json"))
    before = {p: p.stat().st_mtime_ns for p in (killed / "stages").glob("*/*/manifest.json")}
    assert len(before) >= 4  # labels, adapt, index, curate, teach are whole
    done = subprocess.run(command(tmp_path, killed), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in before} == before, "a finished stage was redone"
    # The number format and layout are measured once a store; both runs must compute with the same. The stages before
    # TRANSFER are the same, too; to compute them again would test nothing.
    for part in ("precision", "exportable", "galleries", *(f"stages/{name}" for name in BEFORE)):
        shutil.copytree(killed / part, whole / part)
    heard([], run, recipes.load(None, command(tmp_path, whole)[2:]))
    assert weights(killed) == weights(whole)
    resumed, plain = result_of(killed), result_of(whole)
    assert resumed["metric"] == plain["metric"]
    stages = {s["name"]: s for s in resumed["stages"]}
    assert stages["transfer"]["attempts"] == 2
    # The killed attempt is on the bill: at least a whole run's steps, and what was lost besides.
    assert resumed["cost"]["flops"]["transfer"] >= plain["cost"]["flops"]["transfer"] * 0.99
    assert len(list((killed / "runs").iterdir())) == 1, "the run was continued, not begun anew"
