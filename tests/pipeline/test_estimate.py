"""Plans of stages, and what they took, against sums worked out by hand."""

from types import SimpleNamespace

import pytest

from ktray import recipe as recipes
from ktray.accounting.attempts import Entry
from ktray.accounting.roofline import gpu_seconds
from ktray.accounting.speeds import Speed, shipped_start
from ktray.pipeline.estimate import Estimate, PlannedDevice, compared, estimate, together
from ktray.pipeline.plan_gallery import missing_images
from ktray.pipeline.plan_stages import Line
from ktray.reporting.report import planned_line

CPU = PlannedDevice("some CPU, 2 cores", False, 2, 0.36)
GPU = PlannedDevice("NVIDIA L4", True, 16, 0.8)
TEACH = Line("teach", 6e12, 0, "views", images=1_000)


def test_a_measured_speed_comes_first_then_the_roofline():
    assert estimate(TEACH, 1e12, Speed(10.0, 0.05), GPU) == Estimate(60.0, "store", 10.0)
    assert estimate(TEACH, 1e12, Speed(0.0, 0.0, 1, "table", 2e-12), GPU) == Estimate(12.0, "table")
    assert estimate(TEACH, 1e12, None, GPU) == Estimate(gpu_seconds(6e12, 1e12, "NVIDIA L4"), "roofline")
    unknown = Line("index", 6e12, 0, "an unknown number of images")
    assert estimate(unknown, 0.0, Speed(10.0, 0.05), CPU).source == "cores"


def test_the_start_is_added_where_no_run_measured_it():
    start = shipped_start("teach")
    assert 0.5 < start < 60
    assert estimate(TEACH, 0.0, None, CPU) == Estimate(pytest.approx(100 + start), "cores", start)
    bench = Speed(0.0, 0.05, source="bench")
    assert estimate(TEACH, 0.0, bench, CPU) == Estimate(pytest.approx(50 + start), "bench", start)
    assert estimate(TEACH, 0.0, Speed(0.0, 0.05), CPU) == Estimate(pytest.approx(50), "store")
    # Nothing to do, and a stage that the table does not have.
    assert estimate(Line("teach", 0.0, 0, "a list", images=0), 0.0, None, CPU).device_seconds == 0
    assert estimate(Line("another", 6e12, 0, ""), 0.0, None, CPU).device_seconds == pytest.approx(100)


def entry(stage, **changed):
    return Entry(stage, "k", run="r", **{"device_seconds": 80.0, "wall_seconds": 40.0, "usd": 0.04, **changed})


def test_planned_and_taken_by_stage():
    """Two devices in TEACH: 60 device-seconds of 80 are 30 of 40 s, and 3 of 4 cents."""
    lines = [
        TEACH,
        Line("transfer", 6e11, 0, "steps", images=10),
        Line("index", 1e9, 0, ""),
        Line("curate", 1e9, 0, ""),
    ]
    entries = [
        entry("teach"),
        entry("transfer", device_seconds=5.0, wall_seconds=5.0, usd=0.01),
        entry("index", cached=True),
        entry("curate", attempt=2),  # resumed: a part of it is an earlier attempt's
    ]
    found = compared(lines, {}, {"teach": Speed(10.0, 0.05)}, CPU, entries)
    start = shipped_start("transfer")
    teach, transfer = found["stages"]
    assert (teach["name"], teach["source"], teach["seconds"], teach["usd"]) == ("teach", "store", 40.0, 0.04)
    assert (teach["planned_seconds"], teach["planned_usd"]) == (pytest.approx(30.0), pytest.approx(0.03))
    assert (transfer["source"], transfer["planned_seconds"]) == ("cores", pytest.approx(10.0 + start))
    assert (found["planned_seconds"], found["seconds"]) == (pytest.approx(40.0 + start), 45.0)
    assert (found["planned_usd"], found["usd"]) == (pytest.approx(0.05 + start * 0.002), pytest.approx(0.05))
    assert planned_line({"plan": found}).startswith(f"planned {40 + start:.0f} s, $")
    assert "; took 45 s, $0.05" in planned_line({"plan": found})
    assert "(teach, transfer)." in planned_line({"plan": found})
    assert planned_line({"plan": compared(lines, {}, {}, CPU, [])}) == ""
    assert compared(lines, {}, {}, CPU, [entry("teach", usd=None)])["usd"] is None


def test_the_plan_of_several_runs_is_the_sum_of_theirs_by_stage():
    lines = [TEACH, Line("transfer", 6e11, 0, "steps", images=10)]
    own = [entry("teach"), entry("transfer", device_seconds=5.0, wall_seconds=5.0, usd=0.01)]
    first = compared(lines, {}, {"teach": Speed(10.0, 0.05)}, CPU, own)
    found = together([first, compared(lines, {}, {}, CPU, [entry("teach")])])
    teach, transfer = found["stages"]
    assert (teach["name"], teach["source"]) == ("teach", "cores, store")
    # 30 of 40 s by the stored speed, and 100 and the start of 80 device-seconds, half as much of 40 s, by cores.
    planned = 80 + shipped_start("teach") / 2, 10 + shipped_start("transfer")
    assert (teach["planned_seconds"], teach["seconds"]) == (pytest.approx(planned[0]), pytest.approx(80.0))
    assert (transfer["planned_seconds"], transfer["usd"]) == (pytest.approx(planned[1]), pytest.approx(0.01))
    assert found["planned_seconds"] == pytest.approx(sum(planned))
    assert found["usd"] == pytest.approx(0.09)
    assert together([])["stages"] == []
    unpriced = compared(lines, {}, {}, CPU, [entry("teach", usd=None)])
    assert together([first, unpriced])["usd"] is None


def test_a_gallery_that_is_too_small_is_told():
    recipe = recipes.load(None, ["transfer.source=retrieved", "transfer.size=153600"])
    resolved = SimpleNamespace(recipe=recipe, task=SimpleNamespace(train=[], unlabeled=[]), gallery_images=48)
    assert "the gallery has 48 images, fewer than transfer.size=153,600" in missing_images(resolved)
    resolved.gallery_images = 153_600
    assert missing_images(resolved) == ""
    resolved.gallery_images = 48
    recipe.transfer.source = "target"
    assert missing_images(resolved) == ""
