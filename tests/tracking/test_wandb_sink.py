"""What the W&B tracker calls, on a module in wandb's place: one run, continued after a restart, each step once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ktray.errors import KtrayError
from ktray.tracking import base, mlflow_server
from ktray.tracking.tracker import Tracker


class Silent:
    """In MLflow's place."""

    def __init__(self, *_: Any) -> None: ...

    def deliver(self, records: list[dict[str, Any]]) -> None: ...


class CommError(Exception):
    """As wandb's error of the same name."""


class Fake(ModuleType):
    """The part of wandb that is used; ``calls`` is what was done with it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.fault: Exception | None = None
        self.summary: dict[str, Any] = {}

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **arguments: Any) -> Any:
        if self.fault:
            raise self.fault
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("axis", (name, step_metric)))

    def log(self, values: dict[str, float]) -> None:
        self.calls.append(("log", values))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))

    def Artifact(self, name: str, type: str) -> Any:
        self.calls.append(("artifact", name))
        return self

    def add_file(self, path: str) -> None:
        self.calls.append(("file", path))

    def log_artifact(self, artifact: Any) -> None:
        assert artifact is self

    def of(self, kind: str) -> list[Any]:
        return [content for name, content in self.calls if name == kind]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow_server, "Server", Silent)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    return fake


def job(folder: Path, steps: range, status: str = "FINISHED") -> None:
    run = folder / "run"
    tracker = Tracker(None, "my exp", run / "log.jsonl", run / "mlflow.json", folder, also=["wandb"])
    tracker.start("2026 r/1", params={"train.lr": 0.1}, tags={"task": "letters"})
    stage = tracker.stage("transfer")
    for step in steps:
        stage.metrics(step, {"loss": 0.5 * step})
    stage.finish({"usd": 0.01})
    tracker.final({"test.map": 0.75})
    (folder / "result.json").write_text("{}")
    tracker.artifact(folder / "result.json")
    tracker.finish(status)
    tracker.close(30)


def test_a_run_has_its_curves_costs_results_and_files(wandb: Fake, tmp_path: Path) -> None:
    job(tmp_path, range(1, 3))
    (started,) = wandb.of("init")
    assert (started["project"], started["id"], started["resume"]) == ("my-exp", "2026-r-1", "allow")
    assert started["config"] == {"train.lr": 0.1}
    assert started["tags"] == ["task=letters"]
    assert started["dir"] == str(tmp_path / "run")
    assert wandb.of("axis") == [("transfer/*", "transfer/step")]
    assert wandb.of("log") == [{"transfer/step": 1, "transfer/loss": 0.5}, {"transfer/step": 2, "transfer/loss": 1.0}]
    assert wandb.summary == {"transfer/cost.usd": 0.01, "transfer/status": "FINISHED", "test.map": 0.75}
    assert wandb.of("artifact") == ["2026-r-1-result.json"]
    assert wandb.of("file") == [str(tmp_path / "result.json")]
    assert wandb.of("finish") == [0]


def test_a_restarted_job_continues_the_run_and_repeats_no_step(wandb: Fake, tmp_path: Path) -> None:
    job(tmp_path, range(1, 4), "KILLED")
    job(tmp_path, range(2, 6))
    assert [started["id"] for started in wandb.of("init")] == ["2026-r-1", "2026-r-1"]
    assert [values["transfer/step"] for values in wandb.of("log")] == [1, 2, 3, 4, 5]
    assert wandb.of("finish") == [1, 0]


def test_what_did_not_arrive_is_sent_by_the_next_job(wandb: Fake, tmp_path: Path) -> None:
    wandb.fault = CommError("no route")
    job(tmp_path, range(1, 2))
    assert wandb.calls == []
    wandb.fault = None
    job(tmp_path, range(2, 3))
    assert [values["transfer/step"] for values in wandb.of("log")] == [1, 2]


def test_without_the_package_the_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KtrayError, match=r"mlflow\.also has wandb, .*pip install wandb"):
        Tracker(None, "exp", tmp_path / "run/log.jsonl", tmp_path / "run/mlflow.json", tmp_path, also=["wandb"])
