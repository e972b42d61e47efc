"""Nested values as rows of one table."""

from ktray.reporting.units import flatten


def test_nested_values_get_dotted_names_in_order():
    value = {"a": {"b": [1, None], "c": "x"}, "d": (True,), "empty": {}, "none": []}
    assert list(flatten(value).items()) == [("a.b.0", 1), ("a.b.1", None), ("a.c", "x"), ("d.0", True)]
    assert flatten("alone") == {"": "alone"}


def test_what_is_kept_stays_whole_and_is_asked_for_by_its_full_name():
    value = {"student": {"kwargs": {"depth": 2}, "more": {"kwargs2": {"x": []}}}, "kwargs": {}}
    found = flatten(value, keep=lambda name, node: name in ("student.kwargs", "kwargs") or node == [])
    assert found == {"student.kwargs": {"depth": 2}, "student.more.kwargs2.x": [], "kwargs": {}}
