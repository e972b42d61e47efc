"""Names from folders cannot become markup, and unequal labels are said."""

import json
from pathlib import Path
from typing import Any

import pytest

from ktray import recipe as recipes
from ktray.data.labelled.labelled_set import LabelledExample, LabelledSet
from ktray.jobs.export import card
from ktray.jobs.export.run_source import find
from ktray.models.student.classifier import build_student

EVIL = "<script>|x|</script> `a` [b](http://c)"


@pytest.fixture
def found() -> dict[str, Any]:
    row = {"batch": 1, "threads": 1, "median_ms": 1.5, "p90_ms": 2.25, "runs": 10}
    models = {name: {"rows": [row, {**row, "batch": 4}], "memory_bytes": 2 * 10**6} for name in ("pytorch", "onnx")}
    values = {"metric": 0.75, "top1": 0.75, "per_class": {EVIL: 0.5, "dog": 1.0, "bird": None}}
    return {
        "student": {"name": "test_resnet", "kwargs": {}, "parameters": 1234567, "size": [32, 32], "classes": 3},
        "date": "2026-01-01",
        "device": {"cpu": "a processor", "cores": 2, "gpus": []},
        "files": {name: {"bytes": 1500} for name in ("model.safetensors", "student.onnx")},
        "latency": {"batch": 4, "busy_cores": None, "models": models},
        "metric": {"name": "top1", "val": {"pytorch": values, "onnx": values}, "test": None},
        "notes": ["One * two."],
        "calibration": {
            "temperature": 1.5,
            "val": {"ece_before": 0.12, "nll_before": 0.9, "ece": 0.03, "nll": 0.7},
            "test": None,
            "abstention": [
                {"share": 1.0, "threshold": 0.34, "val_accuracy": 0.75, "test_share": None, "test_accuracy": None},
                {"share": 0.5, "threshold": 0.81, "val_accuracy": 0.95, "test_share": None, "test_accuracy": None},
            ],
            "files": ["student.onnx"],
        },
        "onnx": {"agreement": {"val": {"images": 8, "top1_differs": 1, "max_difference": 2.5e-6}}},
    }


def test_names_are_not_markup_and_rare_classes_are_said(run: Path, found: dict[str, Any], tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    del result["transfer_set"], result["teacher_metric"]
    (run / "result.json").write_text(json.dumps({**result, "teacher": None}))
    source = find(recipes.load(None, [f"store={run.parents[1]}"]))
    classes = [EVIL, "dog", "bird"]
    train = [LabelledExample("x", label) for label in [0] * 2 + [1] * 9 + [2] * 5]
    task = LabelledSet(classes, train, [], [])
    card.write(tmp_path, source, build_student("test_resnet", {}, 3, 32), task, found)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert r"\<script\>\|x\|" in text
    assert r"> One \* two." in text
    assert "2 to 9 a class" in text
    assert "The classes are unbalanced: 2 images of " in text
    assert "| Teacher | none |" in text
    assert "| Transfer set | none |" in text
    assert "Licence of the teacher" not in text
    assert "inherits the teacher's errors" not in text
    assert "| `student.onnx` | 1.5 kB | 2 MB | 1.50 / 2.25 | 1.50 / 2.25 |" in text
    assert "split: validation" in text
    assert "same class as PyTorch for 7 of 8 validation images; logits differ by at most 2.5e-06" in text
    assert "| dog | 100.0% |" in text
    assert "divided by 1.5," in text
    assert "| validation | 12.0% | 3.0% |" in text
    assert "| none | 100.0% | 75.0% |\n| 0.810 | 50.0% | 95.0% |" in text
    assert "bird |" not in text.partition("By class")[2].partition("</details>")[0]
    assert card.closing(found).splitlines()[2].split() == [
        "model.safetensors",
        "1.5",
        "kB",
        "75.0%",
        "–",
        *["1.50", "ms"] * 2,
    ]
