"""A tracker of another package gets the same events as MLflow, and what it could not take comes later."""

import json
from pathlib import Path
from typing import Any

import pytest
from outside import installed, write_package

from ktray.recipe.registries import TRACKERS
from ktray.tracking import mlflow_server
from ktray.tracking.tracker import Tracker

TOY = """
import json
import os

from ktray.recipe.registries import TRACKERS
from ktray.tracking.base import EventTracker, Sink


class File(Sink):
    def __init__(self, path):
        self.path = path

    def deliver(self, records):
        if os.environ.get("TOY_FAULT") == "away":
            raise ConnectionError("nobody there")
        if os.environ.get("TOY_FAULT") == "refuses":
            raise ValueError("no such thing")
        with open(self.path, "a") as file:
            file.writelines(json.dumps([r["event"], r.get("values")]) + "\\n" for r in records)


class Toy(EventTracker):
    label = "Toy"

    def wanted(self, destination):
        return "TOY_FILE" in os.environ

    def open(self, destination, state):
        state["opened"] = destination.experiment
        return File(os.environ["TOY_FILE"])

    def is_transient(self, error):
        return isinstance(error, ConnectionError)


TRACKERS.register("toy")(Toy())
"""


class Silent:
    """In MLflow's place."""

    def __init__(self, *_: Any) -> None: ...

    def deliver(self, records: list[dict[str, Any]]) -> None: ...


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow_server, "Server", Silent)
    monkeypatch.setenv("TOY_FILE", str(tmp_path / "toy.jsonl"))
    site = write_package(
        tmp_path / "site", "toytracker", {"sink.py": TOY}, {"ktray.trackers": {"toy": "toytracker.sink"}}
    )
    with installed(site, TRACKERS):
        yield tmp_path


def job(folder: Path, step: int) -> Tracker:
    tracker = Tracker(None, "exp", folder / "run/log.jsonl", folder / "run/mlflow.json", folder)
    tracker.start("r1", params={"lr": 0.1})
    tracker.stage("transfer").metrics(step, {"loss": 0.5 + step})
    tracker.finish()
    return tracker


def received(folder: Path) -> list[Any]:
    path = folder / "toy.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def test_it_gets_every_event_in_order(toy: Path) -> None:
    assert job(toy, 1).close(30) == 0
    assert received(toy) == [["run", None], ["stage", None], ["metrics", {"loss": 1.5}], ["run_end", None]]
    assert [line["event"] for line in logged(toy)] == ["run", "stage", "metrics", "run_end"]
    states = [json.loads((toy / "run" / name).read_text()) for name in ("mlflow.json", "toy.json")]
    assert [state["sent"] for state in states] == [4, 4]
    assert states[1]["opened"] == "exp"


def test_what_it_could_not_take_is_sent_by_the_next_job(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAULT", "away")
    assert job(toy, 1).close(30) == 0  # MLflow has everything
    assert received(toy) == []
    assert [line["text"] for line in logged(toy) if line["event"] == "note"] == [
        "Toy is not reachable; events wait in this log: ConnectionError: nobody there"
    ]
    monkeypatch.delenv("TOY_FAULT")
    job(toy, 2).close(30)
    assert [values["loss"] for event, values in received(toy) if event == "metrics"] == [1.5, 2.5]


def test_what_it_refuses_is_noted_and_left_out(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_FAULT", "refuses")
    assert job(toy, 1).close(30) == 0
    notes = {line["text"] for line in logged(toy) if line["event"] == "note"}
    assert "Toy refused 'metrics': ValueError: no such thing" in notes
    assert json.loads((toy / "run/mlflow.json").read_text())["sent"] > 0


def test_without_its_package_or_its_wish_nothing_is_there(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOY_FILE")
    assert job(toy, 1).close(30) == 0
    assert not (toy / "run/toy.json").exists()
