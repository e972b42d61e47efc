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
