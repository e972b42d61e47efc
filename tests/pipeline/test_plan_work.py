"""The plan of a recipe on several devices: stored speeds, ktray's table, rooflines; each said with its source."""

import pytest

from ktray import recipe as recipes
from ktray.accounting.roofline import gpu_seconds
from ktray.accounting.speeds import Measured, Speeds, shipped_start
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.plan_stages import Line
from ktray.pipeline.plan_work import PlannedWork, explain, named_facts
from ktray.storage.store import Store

TEACH = {"stage": "teach", "model": "timm:vit_large_patch14_dinov2.lvd142m", "size": 224}
LINES = [Line("teach", 324e12, 0, "", images=2_000), Line("hygiene", 1e12, 0, "", images=10)]


def test_each_device_has_its_own_speeds(tmp_path):
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    speeds.record({**TEACH, "device": "NVIDIA A100-SXM4-80GB"}, Measured(100, 1.0), "20260101-000000")
    work = PlannedWork(LINES, {"teach": 1e12}, {"teach": TEACH}, speeds)
    assert work.on(PlannedDevice.named("A100", {}))["teach"].device_seconds == pytest.approx(20.0)
    assert work.on(PlannedDevice.named("A100", {}))["teach"].source == "store"
    table = work.on(PlannedDevice.named("H200", {}))["teach"]
    assert (table.source, table.device_seconds) == ("table", pytest.approx(2_000 / 2_308, rel=0.001))
    line = work.on(PlannedDevice.named("L4", {}))
    assert line["teach"].source == line["hygiene"].source == "roofline"
    assert line["teach"].device_seconds == pytest.approx(gpu_seconds(324e12, 1e12, "L4"))
    here = work.on(PlannedDevice("some CPU, 2 cores", False, 2, 0.1))
    expected = pytest.approx(1e12 / 60e9 + shipped_start("hygiene"))
    assert (here["hygiene"].source, here["hygiene"].device_seconds) == ("cores", expected)


def test_prices_of_named_gpus_can_be_overridden():
    assert PlannedDevice.named("L4", {}).hourly == 0.805
    assert PlannedDevice.named("L4", {"L4": 0.5}).hourly == 0.5


def test_the_recipe_names_what_the_table_needs():
    keys = ["teacher.name=timm:a", "teacher.image_size=224", "student.name=b", "image_size=160", "train.steps=1"]
    found = named_facts(recipes.load(None, [*keys, "teach.mode=live", "transfer.source=retrieved"]))
    assert found["teach"] == {"stage": "teach", "model": "timm:a", "size": 224}
    assert found["transfer"] == {"stage": "transfer", "model": "b", "size": 160, "mode": "live"}
    assert found["scratch"] == {"stage": "scratch", "model": "b", "size": 160}
    alone = named_facts(recipes.load(None, [*keys, "objective.name=scratch"]))
    assert "teach" not in alone or alone["transfer"]["mode"] == "cached"


def test_it_is_said_where_speeds_are_from():
    text = "\n".join(explain([("L4", {"roofline", ""}), ("this CPU", {"store", "cores"})]))
    assert "on L4: roofline" in text
    assert "on this CPU: cores, store" in text
    assert "store: measured by runs with this store" in text
    assert "roofline: from FLOPs and memory traffic" in text
    assert "table:" not in text
