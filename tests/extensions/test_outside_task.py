"""A package that is no part of ktray adds a task kind, and jobs/distill.py runs with it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from outside_task import install, write_lights
from small_task import SMALL

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    "task.kind=regression",
    "train.steps=60",
    "train.lr=0.01",
    "finetune.steps=20",
    "baselines.scratch=false",
    "teacher.adapt=auto",
    "teacher.finetune.steps=3",
    "mlflow.uri=null",
]


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has the package installed."""
    (tmp_path / "site").mkdir()
    install(tmp_path / "site")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_a_task_kind_of_another_package_runs(outside: dict[str, str], tmp_path: Path) -> None:
    data, gallery = write_lights(tmp_path / "lights")
    store = tmp_path / "store"
    keys = [*SMALL, *KEYS, f"task.data={data}", f"gallery.data={gallery}", f"store={store}"]
    outside.pop("RAY_ADDRESS", None)
    job = [sys.executable, str(ROOT / "jobs/distill.py"), *keys]
    done = subprocess.run(job, env=outside, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (run,) = (store / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["metric"]["name"] == "r2"
    assert result["metric"]["per_class"] == {}
    assert 0.3 < result["metric"]["test"] <= 1  # the mean of the labels has 0
    assert result["teacher_metric"]["test"] > 0.3
    assert [s["name"] for s in result["stages"]][-1] == "evaluate"
    with data.open() as file:
        test = [row for row in csv.DictReader(file) if row["split"] == "test"]
    code = f"import json, ktray; s = ktray.load_student({str(run / 'student')!r})\n"
    code += f"print(json.dumps(s.predict({[str(data.parent / row['path']) for row in test]!r})))"
    loaded = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=True)
    said, true = np.array(json.loads(loaded.stdout)), np.array([float(row["label"]) for row in test])
    assert 1 - ((said - true) ** 2).sum() / ((true - true.mean()) ** 2).sum() == pytest.approx(
        result["metric"]["test"], abs=1e-3
    )


def test_a_kind_that_nobody_has_is_named_with_the_nearest(outside: dict[str, str], tmp_path: Path) -> None:
    code = "from ktray.tasks.base import task_kind; task_kind('regresion')"
    done = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True)
    assert "No task kind is named 'regresion' (task.kind)" in done.stderr
    assert "Did you mean 'regression'?" in done.stderr
