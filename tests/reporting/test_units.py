"""Numbers for people, and nested values as rows of one table."""

from typing import Any

import pytest

from ktray.reporting import units
from ktray.reporting.units import flatten


def test_nested_values_get_dotted_names_in_order():
    value = {"a": {"b": [1, None], "c": "x"}, "d": (True,), "empty": {}, "none": []}
    assert list(flatten(value).items()) == [("a.b.0", 1), ("a.b.1", None), ("a.c", "x"), ("d.0", True)]
    assert flatten("alone") == {"": "alone"}


def test_what_is_kept_stays_whole_and_is_asked_for_by_its_full_name():
    value = {"student": {"kwargs": {"depth": 2}, "more": {"kwargs2": {"x": []}}}, "kwargs": {}}
    found = flatten(value, keep=lambda name, node: name in ("student.kwargs", "kwargs") or node == [])
    assert found == {"student.kwargs": {"depth": 2}, "student.more.kwargs2.x": [], "kwargs": {}}


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.flops, 1.2e12, "1.2 TFLOP"),
        (units.flops, 0, "0 FLOP"),
        (units.flops, 999.96e9, "1 TFLOP"),
        (units.flops, 999.4e9, "999 GFLOP"),
        (units.flops, 4.4e17, "440 PFLOP"),
        (units.flops, None, "–"),
        (units.size, 1_900_000_000, "1.9 GB"),
        (units.seconds, 0.04, "0.0 s"),
        (units.seconds, 9.96, "10 s"),
        (units.seconds, 35, "35 s"),
        (units.seconds, 119.6, "2.0 min"),
        (units.seconds, 7300, "2.0 h"),
        (units.seconds, 216_000, "2.5 d"),
        (units.seconds, None, "–"),
        (units.usd, 0, "$0"),
        (units.usd, 0.0004, "$0.0004"),
        (units.usd, 0.000_063_4, "$0.000063"),
        (units.usd, 0.0123, "$0.012"),
        (units.usd, 0.5, "$0.50"),
        (units.usd, 1234.5, "$1,234.50"),
        (units.usd, None, "–"),
        (units.percent, 0.7814, "78.1%"),
        (units.percent, None, "–"),
        (units.count, 12345, "12,345"),
    ],
)
def test_numbers_for_people(write: Any, value: float | None, text: str) -> None:
    assert write(value) == text
