"""A package outside ktray adds a task kind; no file of ktray knows of it."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from outside import environment, installed, run_job
from outside_task import write_lights, write_regression
from small_task import SMALL

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.recipe.registries import TASKS
from ktray.tasks.base import metric_label, task_kind

KEYS = [
    "task.kind=regression",
    "train.steps=60",
    "train.lr=0.01",
    "finetune.steps=20",
    "baselines.scratch=false",
    "teacher.adapt=auto",
    "teacher.finetune.steps=3",
]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_regression(tmp_path / "site")


@pytest.mark.long
def test_the_whole_job_runs_with_it(toy: Path, tmp_path: Path) -> None:
    data, gallery = write_lights(tmp_path / "lights")
    store = tmp_path / "store"
    arguments = [*SMALL, *KEYS, f"task.data={data}", f"gallery.data={gallery}", f"store={store}"]
    done = run_job("distill", arguments, [toy])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = (store / "runs").glob("*/result.json")
    result = json.loads(file.read_text())
    assert result["metric"]["name"] == "r2"
    assert result["metric"]["per_class"] == {}
    assert result["metric"]["test_images"] == 15
    assert 0.3 < result["metric"]["test"] <= 1  # a student that always says the mean has 0
    assert result["teacher_metric"]["test"] > 0.3
    with data.open() as listed:
        test = [row for row in csv.DictReader(listed) if row["split"] == "test"]
    code = f"import json, ktray; student = ktray.load_student({str(file.parent / 'student')!r})\n"
    code += f"print(json.dumps(student.predict({[str(data.parent / row['path']) for row in test]!r})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environment(toy), capture_output=True, text=True, check=True
    )
    said, true = np.array(json.loads(loaded.stdout)), np.array([float(row["label"]) for row in test])
    r2 = 1 - ((said - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()
    assert r2 == pytest.approx(result["metric"]["test"], abs=1e-3)


def test_it_is_known_while_its_package_is_installed(toy: Path) -> None:
    with installed(toy, TASKS):
        assert TASKS.names() == ["classification", "multilabel", "regression", "segmentation"]
        assert recipes.load(None, ["task.kind=regression"]).task.kind == "regression"
        assert metric_label("r2") == "coefficient of determination"
        with pytest.raises(KtrayError, match=r"No task kind is named 'regresion' \(task\.kind\).*'regression'\?"):
            task_kind("regresion")
    with pytest.raises(KtrayError, match=r"No task kind is named 'regression' \(task\.kind\)"):
        recipes.load(None, ["task.kind=regression"])
