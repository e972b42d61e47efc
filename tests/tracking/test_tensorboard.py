"""Event files for TensorBoard hold what the run logged, once, and a missing package or name ends the start."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.tracking import base, mlflow_server
from ktray.tracking.tracker import Tracker


class Silent:
    """In MLflow's place."""

    def __init__(self, *_: Any) -> None: ...

    def deliver(self, records: list[dict[str, Any]]) -> None: ...


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mlflow_server, "Server", Silent)


def events(folder: Path) -> Iterator[tuple[str, Event]]:
    """(stage, event) of all files: records of length (8 bytes), its checksum (4), content, and its checksum (4)."""
    for path in sorted(folder.rglob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield path.parent.name, Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def scalars(folder: Path) -> dict[tuple[str, str, int], float]:
    found: dict[tuple[str, str, int], float] = {}
    for stage, event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                key = (stage, value.tag, event.step)
                assert key not in found, f"{key} is there twice"
                found[key] = value.simple_value
    return found


def job(folder: Path, steps: range, final: dict[str, float]) -> None:
    run = folder / "run"
    tracker = Tracker(None, "exp", run / "log.jsonl", run / "mlflow.json", folder, also=["tensorboard"])
    tracker.start("r1", params={"train.lr": 0.1}, tags={"task": "letters"})
    stage = tracker.stage("transfer")
    for step in steps:
        stage.metrics(step, {"loss": 1 / (1 + step), "val_map": float("nan") if step == 2 else 0.5})
    stage.finish({"flops": 3.0})
    tracker.final(final)
    tracker.finish()
    assert tracker.close(30) == 0


def test_curves_costs_and_results_are_written(tmp_path: Path) -> None:
    job(tmp_path, range(1, 4), {"test.map": 0.75})
    found = scalars(tmp_path / "run/tensorboard")
    assert found["transfer", "loss", 2] == pytest.approx(1 / 3)
    assert found["transfer", "val_map", 1] == 0.5
    assert found["transfer", "val_map", 2] != found["transfer", "val_map", 2]  # not a number
    assert found["transfer", "cost.flops", 3] == 3.0
    assert found["run", "test.map", 0] == 0.75
    texts = [
        v.tensor.string_val[0].decode()
        for _, e in events(tmp_path / "run/tensorboard")
        for v in e.summary.value
        if v.tensor.string_val
    ]
    assert any('"train.lr": 0.1' in text for text in texts)


def test_a_step_that_a_restarted_job_repeats_is_written_once(tmp_path: Path) -> None:
    job(tmp_path, range(1, 4), {})
    job(tmp_path, range(2, 6), {"test.map": 0.5})
    found = scalars(tmp_path / "run/tensorboard")
    assert sorted(step for stage, name, step in found if name == "loss") == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "run/tensorboard.json").read_text())["steps"] == {"transfer": 5}


def test_without_the_key_nothing_is_written(tmp_path: Path) -> None:
    Tracker(None, "exp", tmp_path / "run/log.jsonl", tmp_path / "run/mlflow.json", tmp_path).close(30)
    assert not list(tmp_path.rglob("tensorboard*"))


def test_a_wrong_name_and_a_missing_package_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (tmp_path / "run/log.jsonl", tmp_path / "run/mlflow.json", tmp_path)
    with pytest.raises(KtrayError, match=r"No tracker is named 'tensorbord' .*'tensorboard'\?"):
        Tracker(None, "exp", *place, also=["tensorbord"])
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        KtrayError, match=r"mlflow\.also has tensorboard, and the package 'tensorboardX' is not installed"
    ):
        Tracker(None, "exp", *place, also=["tensorboard"])
    assert recipes.load(None, ["mlflow.also=[tensorboard,wandb]"]).mlflow.also == ["tensorboard", "wandb"]
