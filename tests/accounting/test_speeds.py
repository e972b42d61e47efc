"""Speeds of runs: fitted lines against values worked out by hand, and their files in a store."""

import pytest

from ktray.accounting.speeds import Measured, Speed, Speeds, fit, shipped
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


def test_ktrays_own_table_is_used_where_the_store_knows_nothing(tmp_path):
    facts = {"stage": "transfer", "model": "vit_small_patch16_224", "size": 224, "device": "NVIDIA H200", "batch": 7}
    speeds = Speeds(Store(str(tmp_path)).sub("speeds"))
    assert speeds.known(facts) == Speed(0.0, pytest.approx(1 / 5603), 1, "table")
    assert shipped({**facts, "device": "NVIDIA L4"}) is None
    assert shipped({**facts, "size": 384}) is None
    speeds.record(facts, Measured(1_000, 1.0), "20260101-000000")
    assert speeds.known(facts).source == "store"
