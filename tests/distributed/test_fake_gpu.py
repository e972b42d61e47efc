"""The code for GPUs in every stage, on a machine without GPUs: Ray is started with some, and torch finds none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_task import SMALL, write_gallery, write_task

JOB = Path(__file__).parents[1] / "helpers" / "fake_gpu_job.py"


def job(folder: Path, gpus: int, name: str, *keys: str) -> Any:
    """What `fake_gpu_job.py` found, in a Ray of its own."""
    hidden = ("RAY_ADDRESS", "CUDA_VISIBLE_DEVICES")  # Ray checks the latter against its number of GPUs
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, str(JOB), str(gpus), str(folder), name, *keys]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("task")
    task, gallery = write_task(home / "task"), write_gallery(home / "gallery")
    short = ["train.steps=6", "finetune.steps=2", "baselines.scratch=false", "train.evals=2"]
    return [f"task.data={task}", f"gallery.data={gallery}", *SMALL, *short]


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_a_task_has_the_device_that_ray_assigned(tmp_path: Path, gpus: int) -> None:
    found = job(tmp_path, gpus, "devices")
    assert found["with a GPU"] == [True, found["torch"]]  # "cpu" where torch finds none
    assert found["without"] == [False, "cpu"]
    assert found["numbered"] == [[True], [True]]
    assert found["cpu shards"] == [False]
    assert (tmp_path / "died").exists()
    assert found["killed"] == [[0, [4]], [1, [5]], [2, [6]]], "a killed worker is started again and loses nothing"
    assert (tmp_path / "died with a model").exists()
    assert found["killed with a model"] == [[x, [x + 7], [4 // gpus]] for x in (4, 5, 6)], "threads, too, are the same"
    assert found["shared"] == [[i, [(i + 1) * 4999950000 + 5], [False]] for i in range(3)]


@pytest.mark.slow
def test_work_that_always_kills_its_process_ends_the_job_and_is_named(tmp_path: Path) -> None:
    found = job(tmp_path, 1, "deadly")
    # Both items are in the process when it dies, and nothing says which of them is the cause.
    for name, item in (("numbered", r"item [12] of 2"), ("shards", r'\{"x": [45]\}')):
        line, code = found[name]
        assert code == 3, "a fault of a machine, not of ktray"
        assert re.match(rf"A device worker died 4 times during {item} \(it computes 2 items at a time\)\. Most", line)
    line, code = found["alone"]
    assert code == 3
    assert line.startswith("The process of the worker ended 2 times (Actor"), line
    assert "Change it." in line


@pytest.mark.slow
def test_the_work_of_a_lost_machine_is_done_by_the_others(tmp_path: Path) -> None:
    found = job(tmp_path, 1, "lost")
    assert found["numbered"] == [[x, [x]] for x in range(12)]
    assert found["shards"] == [[x, [x + 7]] for x in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "jobs"), [pytest.param(1, 1, marks=pytest.mark.long), (1, 2), (2, 1)])
def test_a_whole_run_on_gpus_or_a_share_of_one(keys: list[str], tmp_path: Path, gpus: int, jobs: int) -> None:
    store = tmp_path / "store"
    # Workers that train together exchange gradients by NCCL, which needs real GPUs.
    keys = [f"store={store}", f"cluster.jobs={jobs}", "cluster.workers=1", *keys]
    result = job(tmp_path, gpus, "distill", *keys)
    assert result["cluster"]["gpus"] == gpus / jobs
    assert {row["name"] for row in result["stages"]} >= {"adapt", "index", "curate", "teach", "transfer", "evaluate"}
    assert result["metric"]["test_images"] == 45
    # One worker needs no Ray Train, and what a GPU computed is not taken for what a CPU computed.
    assert not list(store.rglob("checkpoint_manager_snapshot.json"))
    (adapt,) = (store / "stages/adapt").iterdir()
    assert json.loads((adapt / "manifest.json").read_text())["inputs"]["products"] == "bf16"


@pytest.mark.long
@pytest.mark.slow
def test_two_trials_of_a_search_share_a_gpu(keys: list[str], tmp_path: Path) -> None:
    search = [
        "tune.space={train.lr: [0.003, 0.004]}", "tune.search=grid", "tune.trials=3", "tune.rungs=[1]",
        "tune.stop=none", "tune.seeds=1", "budget.flops=1e13", "cluster.gpu_share=0.5",
    ]  # fmt: skip
    result = job(tmp_path, 1, "tune", f"store={tmp_path / 'store'}", *keys, *search)
    assert len(result["trials"]) == 3  # with the baseline
    assert {trial["state"] for trial in result["trials"]} == {"finished"}


@pytest.mark.long
@pytest.mark.slow
def test_every_row_of_the_benchmark_of_a_gpu_is_measured(tmp_path: Path) -> None:
    student, teacher = "mobilenetv3_small_050 at 64 px", "timm:vit_tiny_patch16_224"
    rows = job(tmp_path, 1, "bench")
    trained = ["cached", "cached, read from disk", "cached as JPEG, read from disk", "live"]
    assert [name for name, _, _ in rows] == [
        *(f"train {way}, {student}" for way in trained),
        f"timm's distillation task, {student}",
        f"INDEX, {teacher}",
        f"TEACH, {teacher}",
        "exact search",
        "default job (letters)",
    ]
    for name, limit, reached in rows:
        assert min(limit) > 0, name
        assert min(reached) > 0, name
