"""The part of a page about how much of a transfer set belongs to the task."""

import re

import pytest

from ktray.reporting.transfer_set import on_task_html, on_task_svg

ROW = {"name": "query_balanced", "images": 6000, "similarity": 0.58, "near": 0.7, "agree": 0.5, "confidence": 0.4,
       "shared": 1.0}  # fmt: skip


def facts(**more):
    curve = {"rank": [100, 3000, 6000], "similarity": [0.9, 0.6, 0.3], "agree": [1.0, 0.6, 0.1]}
    random = {**ROW, "name": "random", "near": None, "shared": 0.43}
    return {"floor": [0.481], "applied": True, "below": 2444, "curve": curve, "sets": [ROW, random], **more}


def test_the_curve_marks_the_floor_and_says_whether_it_was_applied():
    applied, suggested = on_task_svg(facts(), "a"), on_task_svg(facts(applied=False), "b")
    assert ">floor 0.481<" in applied
    assert ">calibrated floor, not applied 0.481<" in suggested
    for svg in (applied, suggested):
        assert svg.count("<svg") == 1
        assert "rank of the image" in svg
    no_classes = facts(curve={"rank": [1, 2], "similarity": [0.9, 0.3], "agree": None})
    assert "teacher predicts" in applied
    assert "teacher predicts" not in on_task_svg(no_classes, "c")


@pytest.mark.parametrize("nothing", [None, {}, facts(curve=None)])
def test_without_a_curve_nothing_is_drawn(nothing):
    assert on_task_svg(nothing, "a") == ""


def test_the_table_has_the_random_draw_and_leaves_out_what_is_unknown():
    html = str(on_task_html(facts()))
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)[1:]]
    assert rows == [
        ["query_balanced (this set)", "6,000", "0.580", "70.0%", "50.0%", "40.0%", "100.0%"],
        ["random", "6,000", "0.580", "–", "50.0%", "40.0%", "43.0%"],
    ]
    assert "2,444 of them are below the floor and were left out" in html
    assert "transfer.min_similarity=auto" in on_task_html(facts(applied=False))
    assert "no floor" in on_task_html(facts(floor=[], applied=False, below=0))


def test_an_older_run_has_no_such_part():
    assert on_task_html(None) == ""


def test_names_are_escaped():
    assert "<b>" not in on_task_html(facts(sets=[{**ROW, "name": "<b>mine"}]))
