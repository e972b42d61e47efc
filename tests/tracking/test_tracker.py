"""MLflow: a real sqlite store, a server that is away, restarts."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ktray.errors import KtrayError
from ktray.redact import HIDDEN, scrub
from ktray.storage.store import Dir
from ktray.tracking import mlflow_server as module
from ktray.tracking.metrics import stable_metrics
from ktray.tracking.mlflow_server import is_transient
from ktray.tracking.tracker import Tracker, catch_up, tracking_uri

DEAD = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def nobodys_server_and_folder(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def tracker(folder: Path, uri: str | None = None, **settings: Any) -> Tracker:
    return Tracker(uri, "exp", folder / "run" / "log.jsonl", folder / "run" / "mlflow.json", folder, **settings)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def runs(folder: Path) -> dict[str, Any]:
    """Runs of the experiment by name; fails on two of one name."""
    c = client(folder)
    found = c.search_runs([c.get_experiment_by_name("exp").experiment_id])
    assert len({r.info.run_name for r in found}) == len(found)
    return {r.info.run_name: r for r in found}


def steps(folder: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(folder).get_metric_history(run_id, key)]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_a_run_has_the_name_and_user_it_is_given_and_begins_when_it_began(tmp_path: Path) -> None:
    t = tracker(tmp_path)
    t.start("r1", tags={"mlflow.runName": "monday", "mlflow.user": "ada"})
    t.stage("adapt").finish()
    assert t.close() == 0
    found = runs(tmp_path)
    assert found["monday"].data.tags["ktray.run"] == "r1"
    assert {run.info.user_id for run in found.values()} == {"ada"}
    began, _, ended = (int(event["time"] * 1000) for event in events(tmp_path)[:3])
    assert found["monday"].info.start_time == began
    assert began <= found["adapt"].info.start_time <= found["adapt"].info.end_time == ended


def test_a_run_with_stages_results_artifacts_and_a_student(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()  # made on first use
    plot = tmp_path / "plot.txt"
    plot.write_text("a plot")
    model, example = Net().eval(), np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    t = tracker(tmp_path)
    t.start("r1", {"train.lr": 0.1, "task.name": "glyphs", **{f"p{i}": i for i in range(150)}}, {"kind": "test"})
    stage = t.stage("transfer")
    for step in range(5):
        stage.metrics(step, {"loss": 1 / (1 + step), "lr": float("nan")})
    stage.finish({"flops": 10**15, "usd": 0.5, "note": "text"})
    t.metrics(1, {"progress": 0.5})
    t.final({"cost.total_flops": 2e15, "test.top1": 0.75})
    t.artifact(plot, "plots")
    t.artifact(tmp_path / "gone.txt")
    t.log_student(model, example)
    with torch.no_grad():
        expected = model(torch.ones(3, 3, 8, 8))
        model.head.weight.zero_()  # what happens to the student after the call is not logged
    t.finish()
    assert t.close(60) == 0, t.problem
    assert not list(Path.cwd().iterdir())  # MLflow's defaults would put files into the current folder

    by_name = runs(tmp_path)
    parent, child = by_name["r1"], by_name["transfer"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id == t.info()["run_id"]
    assert (parent.info.status, child.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.params["train.lr"] == "0.1"
    assert len(parent.data.params) == 152
    assert parent.data.tags["kind"] == "test"
    assert parent.data.metrics == {"progress": 0.5, "cost.total_flops": 2e15, "test.top1": 0.75}
    assert steps(tmp_path, child.info.run_id, "loss") == [(s, 1 / (1 + s)) for s in range(5)]
    assert child.data.metrics["cost.flops"] == 1e15
    place = tmp_path / "mlflow-artifacts" / parent.info.run_id / "artifacts"
    assert (place / "plots" / "plot.txt").read_text() == "a plot"
    assert [e["text"] for e in events(tmp_path) if e["event"] == "note"] == [
        f"MLflow refused 'artifact': FileNotFoundError: artifact {tmp_path / 'gone.txt'} no longer exists"
    ]

    import mlflow

    (student,) = client(tmp_path).search_logged_models([parent.info.experiment_id])
    assert (student.name, student.source_run_id) == ("student", parent.info.run_id)
    folder = Path(student.artifact_location.removeprefix("file://"))
    assert (folder / "data" / "model.pt2").exists()
    assert not list(folder.rglob("*.pth"))  # no pickle
    loaded = mlflow.pytorch.load_model(str(folder))
    torch.testing.assert_close(loaded(torch.ones(3, 3, 8, 8)), expected)
    signature = mlflow.models.Model.load(str(folder)).signature
    assert signature.inputs.inputs[0].shape == (-1, 3, 8, 8)
    assert signature.outputs.inputs[0].shape == (-1, 5)


def test_what_lies_in_a_store_elsewhere_is_copied_until_it_is_sent(tmp_path: Path, s3: Any) -> None:
    far = Dir(f"{s3.home}/run")
    far.write("report.html", b"<html>")
    far.write("student/weights", b"12")
    t = tracker(tmp_path)
    t.start("r1")
    t.stored(far, "report.html")
    t.stored(far, "student", "files")
    t.stored(Dir(str(tmp_path)), "near.txt")  # gone, which is told as of any other artifact
    t.finish()
    assert t.close(60) == 0, t.problem
    place = tmp_path / "mlflow-artifacts" / runs(tmp_path)["r1"].info.run_id / "artifacts"
    assert (place / "report.html").read_bytes() == b"<html>"
    assert (place / "files" / "student" / "weights").read_bytes() == b"12"
    assert not (tmp_path / "run" / "artifacts").exists()
    assert "near.txt no longer exists" in next(e["text"] for e in events(tmp_path) if e["event"] == "note")


def test_a_restart_goes_on_with_the_same_runs_and_repeats_no_step(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.start("r1", {"a": 1})
    stage = first.stage("transfer")
    for step in (0, 1, 2):
        stage.metrics(step, {"loss": float(step)})
    first.final({"test.top1": 0.1})
    assert first.flush(60) == 0  # then the job is killed: no finish, no close
    assert first.close(30) == 0
    second = tracker(tmp_path)
    second.start("r1", {"a": 2, "b": 3})  # a parameter once written stays
    stage = second.stage("transfer")
    for step in (1, 2, 3):  # back to the checkpoint of step 0
        stage.metrics(step, {"loss": float(step)})
        stage.metrics(step, {"loss": -1.0})
    stage.finish({"flops": 7})
    second.final({"test.top1": 0.9})
    second.finish()
    assert second.close(60) == 0
    by_name = runs(tmp_path)
    assert set(by_name) == {"r1", "transfer"}
    assert first.run_id == second.run_id == by_name["r1"].info.run_id
    run_id = by_name["transfer"].info.run_id
    assert steps(tmp_path, run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert by_name["r1"].data.metrics["test.top1"] == 0.9
    assert by_name["r1"].data.params == {"a": "1", "b": "3"}

    # Even without the state file, the run is found again by its name.
    (tmp_path / "run" / "mlflow.json").unlink()
    third = tracker(tmp_path)
    third.start("r1")
    assert third.close(60) == 0
    assert third.run_id == first.run_id
    assert steps(tmp_path, run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    assert set(runs(tmp_path)) == {"r1", "transfer"}


def test_a_server_that_is_away_holds_nothing_up_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = tracker(tmp_path, DEAD, timeout=1)
    away.start("r1", {"a": 1})
    stage = away.stage("teach")
    for step in range(20):
        stage.metrics(step, {"loss": float(step)})
    deadline = time.monotonic() + 60
    while away.problem is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert away.problem is not None
    away.finish()
    assert away.close(60) == 23
    assert away.info() == {"tracking_uri": DEAD, "experiment": "exp", "run_id": None}
    logged = events(tmp_path)
    assert [e["event"] for e in logged].count("metrics") == 20
    assert [e["event"] for e in logged].count("note") == 1

    # The next job finds another server, and hands it all, with the times at which it happened.
    (tmp_path / "run" / "log.jsonl").open("a").write('{"time": 1, "event": "metr')
    later = tracker(tmp_path)
    assert later.close(60) == 0
    by_name = runs(tmp_path)
    assert steps(tmp_path, by_name["teach"].info.run_id, "loss") == [(s, float(s)) for s in range(20)]
    history = client(tmp_path).get_metric_history(by_name["teach"].info.run_id, "loss")
    assert [m.timestamp for m in history] == [int(e["time"] * 1000) for e in logged if e["event"] == "metrics"]
    assert by_name["r1"].info.status == "FINISHED"
    assert tracker(tmp_path).close(60) == 0
    assert len(steps(tmp_path, by_name["teach"].info.run_id, "loss")) == 20


def test_another_run_sends_what_an_earlier_one_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def __init__(self, *_: Any) -> None:
            raise ConnectionError("away")

    runs_folder = tmp_path / "runs"
    with monkeypatch.context() as m:
        m.setattr(module, "Server", Away)
        for name in ("r1", "r2"):
            folder = runs_folder / name
            t = Tracker(None, "exp", folder / "log.jsonl", folder / "mlflow.json", tmp_path)
            t.start(name)
            t.finish()
            assert t.close(60) == 2
        assert catch_up(runs_folder, None, "exp", tmp_path) == 2  # tried with the first, left there
    folder = runs_folder / "r2"
    in_use = Tracker(None, "exp", folder / "log.jsonl", folder / "mlflow.json", tmp_path)
    assert catch_up(runs_folder, None, "other experiment", tmp_path) == 0
    assert catch_up(runs_folder, None, "exp", tmp_path) == 0
    assert in_use.close(60) == 0
    assert {name: r.info.status for name, r in runs(tmp_path).items()} == {"r1": "FINISHED", "r2": "FINISHED"}


def test_a_run_that_a_wrong_address_never_got_is_sent_to_the_right_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(name: str, uri: str | None) -> None:
        folder = tmp_path / "runs" / name
        t = Tracker(uri, "exp", folder / "log.jsonl", folder / "mlflow.json", tmp_path, timeout=1.0)
        t.start(name)
        t.finish()
        assert t.close(60) == (2 if uri else 0)

    with caplog.at_level("INFO", "ktray"):
        leave("typo", DEAD)
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            f"mlflow    WARNING: {DEAD} does not take events (MlflowException). The job goes on and keeps them; the "
            "reason is in log.jsonl of the run."
        ]
        leave("right", None)
        assert catch_up(tmp_path / "runs", None, "exp", tmp_path) == 0
    assert f"typo is sent here; {DEAD} never took any of it" in caplog.text
    assert {name: r.info.status for name, r in runs(tmp_path).items()} == {"typo": "FINISHED", "right": "FINISHED"}
    assert catch_up(tmp_path / "runs", "sqlite:///" + str(tmp_path / "other.db"), "exp", tmp_path) == 0
    assert not (tmp_path / "other.db").exists()  # what a server has stays there


def test_events_do_not_wait_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    class Stuck:
        def __init__(self, *_: Any) -> None:
            free.wait(60)

        def deliver(self, records: list[dict[str, Any]]) -> None: ...

    monkeypatch.setattr(module, "Server", Stuck)
    t = tracker(tmp_path)
    t.start("r1")
    for step in range(100):
        t.metrics(step, {"loss": 1.0})
    assert len(events(tmp_path)) == 101  # all of them in the log while the server has not answered at all
    assert t.close(0.05) == 101
    free.set()
    assert t.close(60) == 0


def test_no_secret_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-private-value")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-9")
    values = {
        "aws_secret_access_key": "S3CR3TVALUE",
        "store": "s3://user:pass1234word@bucket/x",
        "gallery.data": ["s3://bucket/eu-central-9/a", "https://h/x?X-Amz-Signature=abcdef012345&y=1"],
        "nested": {"password": 1234, "auth_token": "tok-tok-tok"},
        "note": "key AKIAABCDEFGHIJKLMNOP and very-private-value, Bearer abc.def.ghi-jkl",
        "student.kwargs.class_token": True,
        "student.kwargs.global_pool": "token",
    }
    t = tracker(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    t.start("r1", values, {"who": "very-private-value"})
    assert t.close(60) == 0
    logged = (tmp_path / "run" / "log.jsonl").read_text()
    stored = str(runs(tmp_path)["r1"].data.params) + str(runs(tmp_path)["r1"].data.tags)
    secrets = ["S3CR3TVALUE", "pass1234word", "abcdef012345", "1234", "tok-tok", "AKIA", "very-private", "abc.def"]
    for secret in secrets:
        assert secret not in logged.replace("012345", ""), secret
        assert secret not in stored, secret
    assert "s3://bucket/eu-central-9/a" in stored
    assert runs(tmp_path)["r1"].data.params["student.kwargs.class_token"] == "True"
    assert runs(tmp_path)["r1"].data.params["student.kwargs.global_pool"] == "token"
    assert scrub("postgresql://u:p@h/db") == f"postgresql://{HIDDEN}@h/db"


def test_which_address_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracking_uri(None, tmp_path) == "http://127.0.0.1:1"
    assert tracking_uri("postgresql+psycopg2://h/db", tmp_path) == "postgresql+psycopg2://h/db"
    for folder in ("./mlruns", "file:///some/mlruns"):
        with pytest.raises(KtrayError, match="sqlite:///"):
            tracking_uri(folder, tmp_path)


def test_final_metrics_bear_stable_names() -> None:
    result = {
        "metric": {"name": "top1", "test": 0.5, "val": 0.6, "per_class": {"a": 1.0}},
        "teacher_metric": {"test": 0.8, "val": 0.9},
        "scratch_metric": {"test": 0.2},
        "cost": {
            "flops": {"adapt": 1, "transfer": 2, "total": 3},
            "device_seconds": {"transfer": 5.5, "total": 6.5},
            "usd": 0.25,
            "kwh": None,
            "wall_seconds": 9,
            "images_seen": 10,
            "peak_memory_bytes": 11,
            "without_cache": {"flops": 30, "device_seconds": 65, "usd": None},
        },
    }
    assert stable_metrics(result) == {
        "test.top1": 0.5,
        "val.top1": 0.6,
        "teacher.test": 0.8,
        "teacher.val": 0.9,
        "scratch.test": 0.2,
        "cost.adapt_flops": 1.0,
        "cost.transfer_flops": 2.0,
        "cost.total_flops": 3.0,
        "cost.transfer_device_seconds": 5.5,
        "cost.total_device_seconds": 6.5,
        "cost.device_seconds": 6.5,
        "cost.usd": 0.25,
        "cost.wall_seconds": 9.0,
        "cost.images_seen": 10.0,
        "cost.peak_memory_bytes": 11.0,
        "cost.without_cache_flops": 30.0,
        "cost.without_cache_device_seconds": 65.0,
    }
    assert stable_metrics({}) == {}


def test_which_errors_are_worth_another_try() -> None:
    import requests
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2 as codes

    assert is_transient(MlflowException("x", error_code=codes.TEMPORARILY_UNAVAILABLE))
    assert is_transient(MlflowException("x"))  # internal error: also what a refused connection becomes
    assert is_transient(requests.exceptions.ConnectionError())
    assert is_transient(TimeoutError())
    assert not is_transient(MlflowException("x", error_code=codes.INVALID_PARAMETER_VALUE))
    assert not is_transient(FileNotFoundError())
    assert not is_transient(TypeError())


def test_names_and_paths_are_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret of the environment may be a part of a name by chance, and a masked name names nothing."""
    monkeypatch.setenv("SOME_PASSWORD", "holidays")
    folder = tmp_path / "holidays" / "hf_photos"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("a report")
    t = tracker(tmp_path)
    t.start("20261127-holidays-oriented", params={"task.data": str(folder)}, tags={"note": "holidays"})
    t.stage("holidays").metrics(0, {"loss": 1.0})
    t.artifact(folder / "report.html")
    t.finish()
    assert t.close(60) == 0
    parent = runs(tmp_path)["20261127-holidays-oriented"]
    assert (tmp_path / "mlflow-artifacts" / parent.info.run_id / "artifacts" / "report.html").read_text() == "a report"
    assert "holidays" in runs(tmp_path)
    assert parent.data.params["task.data"] == f"{tmp_path}/[hidden]/hf_photos"
    assert parent.data.tags["note"] == "[hidden]"
