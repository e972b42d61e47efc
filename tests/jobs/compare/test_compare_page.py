"""The table, the CSV and the pictures say what the rows say."""

import csv
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ktray.jobs.compare import figure as picture
from ktray.jobs.compare import page
from ktray.jobs.compare.rows import compare_rows


def row(name, objective, accuracy, flops, seeds=3, images=5000.0, **more):
    return {
        "name": name,
        "objective": objective,
        "source": "none" if objective == "scratch" else "retrieved",
        "images": None if objective == "scratch" else images,
        "accuracy": accuracy,
        "spread": 0.004 if seeds > 1 else None,
        "validation": accuracy - 0.01,
        "flops": flops,
        "device_seconds": 60.0,
        "usd": None,
        "stages": {"teach": flops / 4, "transfer": 3 * flops / 4},
        "teacher_share": 0.25,
        "seeds": seeds,
        "runs": ["r1"],
        "steps": 100,
        "lr": 0.02,
        "share": 1.0,
        "keys": {"objective.name": objective},
        "trials": [],
        **more,
    }


def content(rows, families):
    rng = np.random.default_rng(0)
    sample = np.stack([r["accuracy"] + 0.005 * rng.standard_normal(500) for r in rows], axis=1)
    cost = {"flops": 1e12, "flops_without_cache": 3e12, "device_seconds": 60.0, "device_seconds_without_cache": 180.0}
    none = dict.fromkeys(cost, 0.0)
    return {
        "task": "letters",
        "student": "s",
        "label_budget": 260,
        "test_images": 2600,
        "seeds": [0],
        "equal": "steps",
        "metric": "miou",
        "first": rows[0]["name"],
        "chosen_on_validation": rows[0]["name"],
        "lr_search": [],
        "teacher_metric": {"test": 0.95, "val": 0.94},
        "spent": {**cost, "ways": cost, "search": none, "calibration": none},
        "ways": compare_rows(rows, families, sample),
    }


@pytest.fixture
def found():
    rows = [
        row("oriented retrieved", "oriented", 0.90, 8e12),
        row("agnostic retrieved", "agnostic", 0.80, 9e12),
        row("scratch", "scratch", 0.30, 1e10, seeds=1),
        row("oriented retrieved, 1/4 steps", "oriented", 0.83, 3e12, share=0.25),
        row("oriented retrieved, 1,000 images", "oriented", 0.78, 7e12, images=1000.0),
    ]
    return content(rows, ["oriented retrieved", "agnostic retrieved", "scratch", *["oriented retrieved"] * 2])


def test_equal_accuracy_takes_the_first_ways_cheapest_run(found):
    by_name = {w["name"]: w for w in found["ways"]}
    reached = by_name["agnostic retrieved"]["reach"]
    assert reached["name"] == "oriented retrieved, 1/4 steps"
    assert reached["times"] == pytest.approx(3.0)
    assert by_name["scratch"]["reach"]["times"] == pytest.approx(1e10 / 3e12)
    assert by_name["oriented retrieved, 1/4 steps"]["reach"] is None, "its own family"
    mean, low, high = by_name["agnostic retrieved"]["lead"]
    assert mean == pytest.approx(0.10)
    assert low < 0.10 < high
    assert [w["name"] for w in found["ways"] if w["pareto"]] == [
        "oriented retrieved",
        "scratch",
        "oriented retrieved, 1/4 steps",
    ]


def test_words_for_ratios():
    ratio = {"name": "a", "times": 3.0, "low": 0.0, "high": 3.5}
    assert page.times(ratio) == "3.00x less compute (not reached to 3.50)"
    assert page.times({**ratio, "times": 0.01, "low": 0.005, "high": 0.02}) == "100x more compute (50.0 to 200)"
    assert page.times({**ratio, "times": 0.5, "low": 0.0, "high": 0.5}) == "2.00x more compute (2.00 to not reached)"
    same = {**ratio, "times": 1.001, "low": 1.0, "high": 1.0}
    assert page.times(same) == "the same compute"
    assert page.times({**same, "high": 1.4}) == "the same compute (1.00 to 1.40)"
    assert page.times(None) == "not reached"
    assert page.points([0.054, -0.011, 0.12]) == "+5.4 (-1.1 to +12.0)"
    assert page.accuracy({"accuracy": 0.3, "spread": None}) == "30.0%"
    assert page.accuracy({"accuracy": 0.3, "spread": 0.002}) == "30.0 ± 0.2%"


def test_files_say_what_the_rows_say(found, tmp_path):
    files = page.write(tmp_path, found)
    names = ["compare.png", "compare-sizes.png", "compare-shares.png", "compare.csv", "compare.html"]
    assert [f.name for f in files] == names
    html = (tmp_path / "compare.html").read_text()
    text = page.table(found)
    for method in found["ways"]:
        assert page.accuracy(method) in html
        assert page.accuracy(method) in text
    sentence = "reaches its 80.0% with 3.00x less compute (3.00 to 3.00): oriented retrieved, 1/4 steps"
    assert sentence in html
    assert sentence in text
    assert "mean IoU" in html
    assert html.count("data:image/png") == 3
    assert "http" not in html
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    assert float(rows["agnostic retrieved"]["times_less"]) == pytest.approx(3.0)
    assert rows["agnostic retrieved"]["reached_by"] == "oriented retrieved, 1/4 steps"
    assert rows["scratch"]["spread"] == ""
    assert rows["oriented retrieved"]["lead"] == ""


def test_without_several_sizes_there_is_no_picture_of_them(found):
    rows = [w for w in found["ways"] if "images" not in w["name"]]
    assert picture.sizes({**found, "ways": rows}) is None


@pytest.mark.parametrize("high", [1.05e12, 3e12, 2e13, 4e15, 1e18])
def test_ticks_do_not_touch_each_other(high):
    figure = Figure(figsize=(9.6, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot([1e12, high], [0, 1])
    figure.legend(
        handles=axes.plot([], [], label="a way with a rather long name, 1/8 steps 88.8%"), loc="outside right"
    )
    picture._log_axis(axes, 1e12, high, picture.EngFormatter(unit="FLOP"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    low, top = axes.get_xlim()
    shown = [t for t, at in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True) if low <= at <= top]
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in shown if t.get_text()]
    assert len(boxes) >= 2
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_ways_look_different(found):
    more = [row(n, "oriented", 0.5, 1e12) for n in ("mine", "yours")]
    methods = [*found["ways"], *({**w, "family": w["name"]} for w in more)]
    heads = [picture.styles(methods)[w["name"]] for w in methods if w["name"] == w["family"]]
    assert len(set(heads)) == len(heads)
    colour, marker, filled = picture.styles(methods)["oriented retrieved"]
    assert picture.styles(methods)["oriented retrieved, 1/4 steps"] == (colour, marker, False)
    assert filled


def test_names_cannot_break_out(tmp_path):
    """Ways, tasks and runs have the names that users and class folders give them."""
    wicked = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>'
    rows = [row(wicked, "oriented", 0.9, 1e12), row("plain", "scratch", 0.8, 2e12, runs=[wicked])]
    found = content(rows, [wicked, "plain"])
    found |= {"task": wicked, "student": wicked}
    found["ways"][0]["keys"] = {wicked: wicked}
    page.write(tmp_path, found)
    html = (tmp_path / "compare.html").read_text()
    assert html.count("alert(1)") >= 10
    assert "<script" not in html
    assert "<img src=x" not in html


def test_starts_are_named_unless_all_students_start_at_random():
    rows = [row("a", "oriented", 0.9, 1e12), row("b", "scratch", 0.8, 1e12)]
    assert "start of the students" not in page.table(content(rows, ["a", "b"]))
    named = [{**rows[0], "start": "published (lite)"}, {**rows[1], "start": "random"}]
    assert "start of the students: published (lite): a; random: b" in page.table(content(named, ["a", "b"]))
    same = [{**one, "start": "checkpoint"} for one in rows]
    assert "start of the students: checkpoint: all" in page.table(content(same, ["a", "b"]))


def test_the_page_and_the_csv_file_have_the_starts(tmp_path):
    rows = [row("a", "oriented", 0.9, 1e12, start="published (lite)"), row("b", "scratch", 0.8, 1e12, start="random")]
    page.write(tmp_path, content(rows, ["a", "b"]))
    with open(tmp_path / "compare.csv", newline="") as stream:
        assert [line["start"] for line in csv.DictReader(stream)] == ["published (lite)", "random"]
    assert "<td>published (lite)</td>" in (tmp_path / "compare.html").read_text()


def test_a_retrieved_set_is_compared_with_the_random_draw_beside_it(found, tmp_path):
    draw = row("oriented generic", "oriented", 0.84, 6e12, images=2_000.0, like=["oriented retrieved"])
    rows = [row("oriented retrieved", "oriented", 0.90, 8e12, images=2_000.0), draw]
    drawn = content(rows, ["oriented retrieved", "oriented generic"])
    (line,) = page.against_random(drawn)
    assert line.startswith("oriented retrieved (2,000 images): +6.0 points on test compared with oriented generic")
    assert line in page.table(drawn)
    assert page.against_random(found) == []
    assert "random draws" not in page.table(found)
