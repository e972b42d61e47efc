"""Speeds of runs: fitted lines against values worked out by hand, and their files in a store."""

import pytest
import timm
import torch
import yaml

from ktray.accounting import speeds as module
from ktray.accounting.speeds import Measured, Speed, Speeds, fit, shipped
from ktray.models.flops import forward_flops, train_flops
from ktray.storage.store import Store

FACTS = {"stage": "teach", "model": "miniverse", "size": 32, "device": "some CPU, 2 cores", "targets": ["logits"]}


def test_two_runs_on_a_line_give_the_line():
    """12 s of start-up, and 0.05 s an image."""
    found = fit([Measured(100, 17.0), Measured(1_000, 62.0), Measured(4_000, 212.0)])
    assert (found.fixed, found.per_image, found.runs) == (pytest.approx(12.0), pytest.approx(0.05), 3)
    assert found.device_seconds(2_000) == pytest.approx(112.0)


def test_one_run_is_scaled():
    assert fit([Measured(100, 17.0)]) == Speed(0.0, pytest.approx(0.17), 1)
    # Equal counts have no slope of their own: 0.1 and 0.4 s an image, where both errors count relatively,
    # r = (1 / 0.1 + 1 / 0.4) / (1 / 0.1**2 + 1 / 0.4**2).
    assert fit([Measured(100, 10.0), Measured(100, 40.0)]).per_image == pytest.approx(12.5 / 106.25)


def test_the_start_of_a_single_run_is_a_part_of_its_own():
    assert fit([Measured(100, 17.0, start=12.0)]) == Speed(pytest.approx(12.0), pytest.approx(0.05), 1)
    # Runs on a line show their start themselves.
    assert fit([Measured(100, 17.0, start=1.0), Measured(1_000, 62.0, start=1.0)]).fixed == pytest.approx(12.0)
    # Runs of equal length: the starts 2 and 4 weighted by 1 / 10**2 and 1 / 20**2.
    assert fit([Measured(100, 10.0, start=2.0), Measured(100, 20.0, start=4.0)]).fixed == pytest.approx(2.4)
    assert fit([Measured(100, 5.0, start=5.0)]) == Speed(pytest.approx(5.0), 0.0, 1)


def test_neither_part_is_negative():
    faster = fit([Measured(100, 20.0), Measured(1_000, 15.0)])  # the larger run was faster
    assert faster.fixed == 0
    assert faster.per_image > 0
    steep = fit([Measured(100, 1.0), Measured(1_000, 100.0)])  # a line would start below zero
    assert steep.fixed == 0
    assert 0.01 < steep.per_image < 0.1


def test_nothing_is_made_of_nothing():
    assert fit([]) is None
    assert fit([Measured(0, 5.0), Measured(10, 0.0)]) is None


def test_a_store_keeps_the_last_runs_by_facts(tmp_path):
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    assert speeds.known(FACTS) is None
    for number in range(25):
        slow = number < 5  # too old to count
        speeds.record(FACTS, Measured(10 + number, 99.0 if slow else 2.0 * (10 + number)), f"20260101-0000{number:02d}")
    found = speeds.known(FACTS)
    assert (found.runs, found.source) == (20, "store")
    assert found.device_seconds(100) == pytest.approx(200.0)
    assert speeds.known({**FACTS, "device": "another"}) is None
    assert speeds.known({**FACTS, "size": 64}) is None


def test_the_parts_of_a_runs_stage_count_as_one(tmp_path):
    """LABELS of a run decodes the images twice, and only the first time starts processes."""
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    for run, start in (("first", 8.0), ("second", 6.0)):
        speeds.record(FACTS, Measured(200, 2.0 + start, start), f"{run}-1", part_of=f"{run}-labels")
        speeds.record(FACTS, Measured(200, 2.0), f"{run}-2", part_of=f"{run}-labels")
    found = speeds.known(FACTS)
    assert found.runs == 2
    # Equal lengths: the starts 8 and 6, weighted by 1 / 12**2 and 1 / 10**2.
    assert found.fixed == pytest.approx((8 / 144 + 6 / 100) / (1 / 144 + 1 / 100))
    assert 10 < found.device_seconds(400) < 12
    speeds.record(FACTS, Measured(200, 9.0), "third")
    speeds.record(FACTS, Measured(200, 9.0), "third")
    assert speeds.known(FACTS).runs == 4, "without a name, each is a measurement of its own"


def test_ktrays_own_table_is_used_where_the_store_knows_nothing(tmp_path):
    facts = {"stage": "transfer", "model": "vit_small_patch16_224", "size": 224, "device": "NVIDIA H200", "batch": 7}
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    found = speeds.known(facts)
    assert found.source == "table"
    # 27.478 GFLOP are a step of one image, of which the H200 did 5,603 a second. Two steps an image take twice as long.
    assert found.device_seconds(5_603, 5_603 * 27.478e9) == pytest.approx(1.0)
    assert found.device_seconds(5_603, 2 * 5_603 * 27.478e9) == pytest.approx(2.0)
    assert shipped({**facts, "device": "NVIDIA L4"}) is None
    assert shipped({**facts, "size": 384}) is None
    assert shipped({**facts, "mode": "cached"}) == found
    assert shipped({**facts, "mode": "live"}) is None  # a teacher works in each step
    assert shipped({**facts, "model": "vit_small_patch16_224.augreg_in21k"}) == found
    assert shipped({**facts, "model": "vit_small_patch16_224_dino"}) is None
    speeds.record(facts, Measured(1_000, 1.0), "20260101-000000")
    assert speeds.known(facts).source == "store"


def test_the_bench_is_used_until_a_run_has_measured(tmp_path):
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    speeds.record(FACTS, Measured(1_000, 50.0), "20260101-000000", bench=True)
    assert speeds.known(FACTS) == Speed(0.0, pytest.approx(0.05), 1, "bench")
    speeds.record(FACTS, Measured(100, 17.0), "20250101-000000")
    assert speeds.known(FACTS) == Speed(0.0, pytest.approx(0.17), 1, "store")


def test_a_family_of_gpus_stands_for_its_members(tmp_path):
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    for number, (name, seconds) in enumerate(
        [("NVIDIA L4", 100.0), ("NVIDIA L40S", 30.0), ("NVIDIA H100 80GB HBM3", 10.0), ("NVIDIA H100 PCIe", 20.0)]
    ):
        speeds.record({**FACTS, "device": name}, Measured(100, seconds), f"20260101-00000{number}")
    assert speeds.known({**FACTS, "device": "L4"}).per_image == pytest.approx(1.0)
    assert speeds.known({**FACTS, "device": "L40S"}).per_image == pytest.approx(0.3)
    assert speeds.known({**FACTS, "device": "H100"}).runs == 2
    assert speeds.known({**FACTS, "device": "NVIDIA H100 PCIe"}).per_image == pytest.approx(0.2)
    assert speeds.known({**FACTS, "device": "H200"}) is None


def test_the_table_counts_flops_as_ktray_does():
    rows = yaml.safe_load((module.resources.files("ktray.accounting") / "speeds.yaml").read_text())["speeds"]
    assert len(rows) >= 3
    for row in rows:
        library, _, model = row["model"].rpartition(":")
        assert library in ("", "timm")
        with torch.device("meta"):
            built = timm.create_model(model, img_size=row["size"]) if library else timm.create_model(model)
        count = train_flops if "transfer" in row["stages"] else forward_flops
        flops = count(built, (3, row["size"], row["size"]))
        assert row["flops_per_image"] == pytest.approx(flops, rel=0.01), row["model"]
