"""Gauges reach Ray's metrics port, with their labels; without Ray nothing happens."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ktray.accounting.attempts import Entry
from ktray.accounting.ledger import Ledger
from ktray.distributed import gauges
from ktray.distributed.gauges import GAUGES, StageGauges

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster/grafana/ktray.json"


class Heard:
    """In the place of `put`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float | None, dict[str, str]]] = []

    def __call__(self, name: str, value: float | None, **labels: str) -> None:
        assert set(labels) == set(GAUGES[name][1])
        self.rows.append((name, value, labels))

    def values(self, name: str) -> list[float | None]:
        return [value for found, value, _ in self.rows if found == name]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found = Heard()
    monkeypatch.setattr(gauges, "put", found)
    return found


def test_rates_are_those_between_two_looks(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: clock[0])
    stage = StageGauges("r", "transfer")
    for clock[0], total in ((102.0, 50), (110.0, 200), (112.0, 210), (120.0, 200)):
        stage.training(int(total / 10), total, 0.25)
    # 200 images in 10 s; then the total fell, because workers started again at an earlier step.
    assert heard.values("images_per_second") == [20.0, 0.0]
    stage.resume(1000)
    clock[0] = 130.0
    stage.images(1100)
    assert heard.values("images_per_second")[-1] == pytest.approx(10.0)
    assert heard.values("step") == [5, 20, 21, 20]
    assert set(heard.values("data_wait_ratio")) == {0.25}
    stage.end()
    assert heard.values("images_per_second")[-1] == 0


def test_money_is_counted_now_and_then_and_only_with_prices(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(gauges.time, "monotonic", lambda: clock[0])
    stage, ledger = StageGauges("r", "teach"), Ledger({}, "r")
    ledger.entries = [Entry("index", "k", 1, "r", usd=0.5), Entry("teach", "k", 1, "r", usd=0.25)]
    for clock[0] in (100.0, 105.0, 111.0):
        stage.spent(ledger)
    assert heard.rows == [("spent_usd", 0.75, {"run": "r"})] * 2
    ledger.entries.append(Entry("teach", "k", 2, "r", usd=None))
    clock[0] = 130.0
    stage.spent(ledger)
    assert len(heard.rows) == 2


def test_evaluations_are_told_by_metric(heard: Heard) -> None:
    StageGauges("r", "finetune").evaluation({"loss": 0.5, "seconds": 3.0, "val_top1": 0.75, "val_loss": 0.6})
    assert heard.rows == [
        ("loss", 0.5, {"run": "r", "stage": "finetune"}),
        ("validation", 0.75, {"run": "r", "stage": "finetune", "metric": "top1"}),
        ("validation", 0.6, {"run": "r", "stage": "finetune", "metric": "loss"}),
    ]


def test_values_arrive_at_the_metrics_port(cluster: Any) -> None:
    import ray

    gauges.put("loss", float("nan"), run="port", stage="x")
    gauges.put("spent_usd", None, run="port")
    gauges.put("spent_usd", 1.25, run="port")
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
    for _ in range(120):
        with urllib.request.urlopen(
            f"http://{ray.nodes()[0]['NodeManagerAddress']}:{port}/metrics", timeout=20
        ) as page:
            text = page.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_ktray_") and 'run="port"' in line]
        if lines:
            break
        time.sleep(0.5)
    assert [re.sub(r"\{.*\}", "", line) for line in lines] == ["ray_ktray_spent_usd 1.25"]


def test_the_dashboard_shows_every_gauge_and_no_other() -> None:
    board = json.loads(DASHBOARD.read_text())
    text = json.dumps([panel["targets"] for panel in board["panels"]])
    assert set(re.findall(r"ray_ktray_(\w+?)\{", text)) == set(GAUGES)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(target["datasource"]["uid"] == "${source}" for panel in board["panels"] for target in panel["targets"])
