"""The ledger, against sums worked out by hand."""

import json
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ktray.accounting.attempts import DirLog, Entry, attempts
from ktray.accounting.energy import gpu_joules
from ktray.accounting.held import Held
from ktray.accounting.ledger import Ledger, Meter
from ktray.accounting.prices import hourly_price
from ktray.accounting.summary import cost_summary
from ktray.errors import KtrayError
from ktray.storage.store import Dir

CPU = {"cpu": "any", "cores": 4, "memory_bytes": 1, "gpus": []}
A100 = {**CPU, "gpus": [{"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 1}] * 8}
STAGE_KEYS = {"adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate", "total"}


class Lines:
    """A log in memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def append(self, line: str) -> None:
        self.lines.append(line)

    def read(self) -> list[str]:
        return list(self.lines)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter(log: Lines, clock: Clock, **settings: object) -> Meter:
    defaults: dict[str, object] = {"held": Held(1, 3.6), "clock": clock, "interval": 1e6}
    return Meter(log, Entry("teach", "k"), **{**defaults, **settings})  # type: ignore[arg-type]


def test_an_attempt_costs_what_was_counted() -> None:
    log, clock = Lines(), Clock()
    with meter(log, clock, held=Held(2, 7.2)) as m:
        m.add(flops=1e9, images=10)
        m.add(flops=2e9, images=5, peak_memory_bytes=10**15)
        clock.now += 50
    e = m.entry
    assert (e.flops, e.images, e.peak_memory_bytes) == (3_000_000_000, 15, 10**15)
    assert (e.wall_seconds, e.device_seconds, e.state) == (50, 100, "done")
    assert e.usd == pytest.approx(7.2 * 50 / 3600)  # USD an hour for both devices, 50 s
    assert e.kwh is None
    assert attempts(log.lines) == [e]


def test_each_time_costs_what_was_held_then() -> None:
    """10 s of two devices at 3.6 USD an hour each, 20 s of one at 1.8, 5 s of three at 36 together."""
    log, clock = Lines(), Clock()
    with meter(log, clock, held=Held(9, 99.0)) as m:
        clock.now += 4
        m.correct(Held(2, 7.2))  # what was meant from the start
        clock.now += 6
        m.hold(Held(1, 1.8))
        clock.now += 20
        m.hold(Held(3, 36.0))
        clock.now += 5
    assert m.entry.device_seconds == 2 * 10 + 1 * 20 + 3 * 5
    assert m.entry.usd == pytest.approx((7.2 * 10 + 1.8 * 20 + 36.0 * 5) / 3600)
    with meter(Lines(), clock) as m:
        m.hold(Held(1, None))  # a device without a price
        clock.now += 1
    assert m.entry.usd is None


def test_the_start_is_what_passed_before_the_work_on_images():
    """Two devices; the first 10 images after 30 s, then 10 images every 5 s: they began 5 s before the first count."""
    log, clock = Lines(), Clock()
    with meter(log, clock, held=Held(2, 7.2)) as m:
        clock.now += 30
        m.add(images=10)
        for _ in range(3):
            clock.now += 5
            m.add(images=10)
    assert m.entry.start_seconds == pytest.approx(2 * 25)
    with meter(log, clock) as m:  # all at once: the start is not seen
        clock.now += 30
        m.add(images=10)
        clock.now += 5
    assert m.entry.start_seconds == 0
    with meter(log, clock) as m:  # slower in the end than at first
        clock.now += 1
        m.add(images=10)
        clock.now += 20
        m.add(images=10)
    assert m.entry.start_seconds == 0


def test_energy_is_the_counters_difference_plus_what_workers_hand_in() -> None:
    log, clock = Lines(), Clock()
    joules = iter([5_000.0, 3_605_000.0, 7_205_000.0])
    with meter(log, clock, joules=lambda: next(joules)) as m:  # read on entry, for the first record, at the end
        m.add(joules=3_600_000)
    assert m.entry.kwh == pytest.approx(2 + 1)


def test_a_killed_attempt_costs_its_last_heartbeat_and_the_next_one_says_so() -> None:
    log, clock = Lines(), Clock()
    killed = meter(log, clock)
    killed.__enter__()
    killed.add(flops=100, images=4)
    clock.now += 30
    killed.beat()
    killed.add(flops=900)  # after the last heartbeat: lost
    log.lines.append('{"stage": "teach", "key": "k", "att')  # killed while it wrote
    killed._stop.set()

    ledger = Ledger(CPU, run="second")
    with ledger.attempt(log, "teach", "k") as m:
        m.add(flops=7)
    assert [(e.attempt, e.flops, e.state) for e in ledger.entries] == [(1, 100, "running"), (2, 7, "done")]
    cost = ledger.summary()
    assert cost["flops"]["teach"] == cost["flops"]["total"] == cost["without_cache"]["flops"] == 107
    assert cost["device_seconds"]["teach"] >= 30
    (row,) = ledger.stages()
    assert (row["attempts"], row["cached"], row["flops"]) == (2, False, 107)


def test_heartbeats_come_by_themselves_and_outlive_a_store_that_is_away() -> None:
    class Flaky(Lines):
        failures = 3

        def append(self, line: str) -> None:
            if len(self.lines) == 1 and self.failures:
                self.failures -= 1
                raise OSError("away")
            super().append(line)

    log = Flaky()
    with meter(log, Clock(), interval=0.01) as m:
        m.add(flops=1)
        deadline = time.monotonic() + 10
        while len(log.lines) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert log.failures == 0
    records = [json.loads(line) for line in log.lines]
    assert len(records) >= 5
    assert [r["state"] for r in records] == ["running"] * (len(records) - 1) + ["done"]


def test_a_failed_attempt_is_kept_and_its_exception_is_not_hidden() -> None:
    class Full(Lines):
        def append(self, line: str) -> None:
            if '"failed"' in line:
                raise OSError("no space")
            super().append(line)

    for log in (Lines(), Full()):
        ledger = Ledger(CPU)

        def work(ledger: Ledger = ledger, log: Lines = log) -> None:
            with ledger.attempt(log, "teach", "k") as m:
                m.add(flops=5)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            work()
        assert [(e.state, e.flops) for e in ledger.entries] == [("failed", 5)]


def test_reused_stages_cost_nothing_and_keep_their_worth() -> None:
    made = Entry("teach", "k", run="first", flops=100, device_seconds=10, wall_seconds=5, images=3, usd=2.0)
    log = Lines()
    log.append(json.dumps({**made.__dict__, "unknown": "from a newer version"}))
    other = Ledger(CPU, run="second")
    other.reuse(log, "teach", "k")
    other.entries.append(Entry("transfer", "t", flops=11, device_seconds=1, wall_seconds=1, images=1, usd=0.5))
    cost = other.summary()
    assert cost["flops"]["teach"] == cost["device_seconds"]["teach"] == 0
    assert cost["flops"]["total"] == 11
    assert (cost["usd"], cost["wall_seconds"], cost["images_seen"]) == (0.5, 1, 1)
    assert cost["without_cache"] == {"flops": 111, "device_seconds": 11, "usd": 2.5}
    assert [(r["name"], r["cached"], r["flops"]) for r in other.stages()] == [
        ("teach", True, 0),
        ("transfer", False, 11),
    ]
    # The same run, restarted after its teach stage was whole, did spend it.
    again = Ledger(CPU, run="first")
    again.reuse(log, "teach", "k")
    assert again.summary()["flops"]["total"] == 100
    # Two parts of one run that use a stage pay for it once.
    again.reuse(log, "teach", "k")
    assert again.summary()["flops"]["total"] == 100


def test_a_stage_is_booked_as_the_run_that_uses_it_says() -> None:
    log = Lines()
    log.append(json.dumps(Entry("scratch", "k", run="first", flops=100, usd=2.0).__dict__))
    as_floor, as_way = Ledger(CPU, run="second"), Ledger(CPU, run="third")
    as_floor.reuse(log, "scratch", "k")
    as_way.reuse(log, "finetune", "k")
    assert as_floor.summary()["without_cache"]["flops"] == 0
    assert as_floor.summary()["baselines"]["scratch"]["flops"] == 100
    assert as_way.summary()["without_cache"]["flops"] == 100
    broken = Lines()
    broken.append(json.dumps(Entry("scratch", "k", run="first", flops=40, state="running").__dict__))
    with as_way.attempt(broken, "finetune", "k") as meter:
        meter.add(flops=1)
    assert [(e.stage, e.attempt, e.flops) for e in as_way.entries[-2:]] == [("finetune", 1, 40), ("finetune", 2, 1)]


def test_the_summary_is_the_sum_by_stage() -> None:
    entries = [
        Entry("adapt", "a", flops=1, device_seconds=1.5, wall_seconds=1, images=10, peak_memory_bytes=7, kwh=0.25),
        Entry("adapt", "a", attempt=2, flops=2, device_seconds=2.5, wall_seconds=2, images=20, peak_memory_bytes=5),
        Entry("evaluate", "e", flops=4, device_seconds=4, wall_seconds=4, images=40, kwh=0.5, usd=3.0),
        Entry("scratch", "s", flops=1000, device_seconds=1000, wall_seconds=1000, peak_memory_bytes=99, usd=9.0),
    ]
    cost = cost_summary(entries)
    assert set(cost["flops"]) == set(cost["device_seconds"]) == STAGE_KEYS
    assert (cost["flops"]["adapt"], cost["flops"]["evaluate"], cost["flops"]["total"]) == (3, 4, 7)
    assert cost["device_seconds"]["total"] == 8
    assert (cost["wall_seconds"], cost["usd"], cost["kwh"], cost["images_seen"]) == (7, 3.0, 0.75, 70)
    assert cost["peak_memory_bytes"] == 7
    assert cost["baselines"] == {"scratch": {"flops": 1000, "device_seconds": 1000, "usd": 9.0}}
    assert cost["with_baselines"]["flops"] == cost["flops"]["total"] + 1000
    assert cost["with_baselines"]["usd"] == pytest.approx(cost["usd"] + 9.0)
    unpriced = cost_summary([*entries, replace(entries[0], usd=None, kwh=None)])
    assert unpriced["usd"] is None
    assert cost_summary([])["kwh"] is None
    json.dumps(cost)


def test_prices_of_accelerators_machines_and_cores() -> None:
    assert hourly_price(CPU) == pytest.approx(4 * 0.0446)
    assert hourly_price(A100) == 3.43  # the longer name, not "A100"
    assert hourly_price({**CPU, "gpus": [{"name": "NVIDIA L40S"}]}) == 1.861  # not "L4"
    assert hourly_price({**CPU, "gpus": [{"name": "Unheard-of 9000"}]}) is None
    assert hourly_price({**A100, "instance": "p4d.24xlarge"}) == pytest.approx(21.96 / 8)
    assert hourly_price({**CPU, "instance": "c7i.xlarge"}) == 0.1785
    assert hourly_price({**CPU, "instance": "unknown"}) == hourly_price(CPU)
    assert hourly_price(A100, {"A100": 1.0}) == 1.0
    assert hourly_price({**CPU, "instance": "mine"}, {"mine": 0.2}) == 0.2
    spot = {**CPU, "instance": "c7i.xlarge", "market": "spot"}
    assert hourly_price(spot) == 0.1785  # the on-demand price is an upper limit
    assert hourly_price(spot, {"spot:c7i.xlarge": 0.06}) == 0.06
    assert hourly_price({**spot, "market": "on-demand"}, {"spot:c7i.xlarge": 0.06}) == 0.1785
    assert hourly_price({**A100, "market": "spot"}, {"spot:A100": 1.2, "A100": 3.0}) == 1.2
    with pytest.raises(KtrayError, match=r"Set prices"):
        hourly_price(A100, {"A100": -1})


def test_the_log_lies_in_the_stages_folder(tmp_path: Path) -> None:
    ledger = Ledger(CPU, run="r")
    for _ in range(2):
        with ledger.attempt(DirLog(Dir(str(tmp_path))), "index", "k") as m:
            m.add(images=1)
    assert (tmp_path / "ledger.jsonl").exists()
    found = attempts(DirLog(Dir(str(tmp_path))).read())
    assert [(e.attempt, e.images, e.run) for e in found] == [(1, 1, "r"), (2, 1, "r")]


def test_gpu_energy_is_read_from_nvmls_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_joules() is None or torch.cuda.is_available()
    millijoules = {"GPU-a": 1_500, "GPU-b": 500}
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid="ab"[i]))
    read = gpu_joules()
    assert read is not None
    assert read() == 2.0
    millijoules["GPU-b"] += 3_000
    assert read() == 5.0
    del millijoules["GPU-a"]  # a card that has no counter: no energy rather than a part of it
    assert gpu_joules() is None
