"""The lines below the closing table: images that could not be used, and a student far below its teacher."""

from __future__ import annotations

from typing import Any

import pytest

from ktray.reporting.report import closing_table


def result(student: float, teacher: float, **data: Any) -> dict[str, Any]:
    return {
        "metric": {"name": "top1", "val": student, "test": student},
        "teacher_metric": {"val": teacher, "test": teacher},
        "delivered": {"name": "student", "what": "the student", "validation": {"student": student, "scratch": 0.4}},
        "data": data,
    }


def test_images_that_could_not_be_used_are_counted_with_their_reasons_and_their_list() -> None:
    reasons = {"empty file (0 bytes)": 2, "truncated: the file is incomplete": 1}
    text = closing_table(result(0.8, 0.8, quarantined=3, quarantine_list="/runs/1/quarantine.parquet", reasons=reasons))
    assert (
        "images that could not be used: 3, such as empty file (0 bytes) (2), truncated: the file is incomplete (1). "
        "The report lists them, and so does /runs/1/quarantine.parquet." in text
    )
    assert "could not be used" not in closing_table(result(0.8, 0.8, quarantined=0))


@pytest.mark.parametrize(("student", "points"), [(0.5, 37), (0.71, 16), (0.73, None), (0.9, None)])
def test_a_student_far_below_its_teacher_gets_advice(student: float, points: int | None) -> None:
    text = closing_table(result(student, 0.87))
    assert (f"note: the student is {points} points below its teacher on validation." in text) == (points is not None)
    assert ("below its teacher" in text) == (points is not None)


def test_closing_table_adds_what_is_not_part_of_the_method() -> None:
    row = {"key": "k", "cached": False, "attempts": 1, "wall_seconds": 60.0, "flops": 1e12, "usd": 0.001}
    cost = {
        "flops": {"total": 1e12},
        "wall_seconds": 60.0,
        "usd": 0.001,
        "baselines": {"hygiene": {}, "scratch": {}},
        "with_baselines": {"flops": 3e12, "device_seconds": 180.0, "usd": 0.003},
    }
    stages = [{**row, "name": name} for name in ("transfer", "hygiene", "scratch")]
    lines = closing_table({"stages": stages, "cost": cost}).splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["total", "60", "s", "1", "TFLOP", "$0.001"],
        ["with", "hygiene", "and", "scratch", "3.0", "min", "3", "TFLOP", "$0.003"],
    ]
    reused = closing_table({"stages": [stages[0], {**stages[1], "cached": True}], "cost": cost})
    assert reused.splitlines()[-1].startswith("total")
