"""The MLflow part of `ktray.tracking.tracker`: a tracking server and its runs. Only one thread uses it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ktray.recipe.registries import TRACKERS
from ktray.storage.network import certificates, keep_loopback
from ktray.tracking.base import Destination, EventTracker, Sink

MLFLOW = "mlflow"
# An MLflow error with one of these codes occurs again whenever the same event is sent.
_PERMANENT = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "MALFORMED_REQUEST",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "NOT_IMPLEMENTED",
    "FEATURE_DISABLED",
}
_TAG_RUN, _TAG_STAGE, _TAG_PARENT = "ktray.run", "ktray.stage", "mlflow.parentRunId"
_PARAM_CHARACTERS = 1000
_PARAMS_PER_CALL = 100


def is_transient(error: BaseException) -> bool:
    """Whether sending the same event later may succeed."""
    code = getattr(error, "error_code", None)
    if code is not None:
        return code not in _PERMANENT
    if isinstance(error, FileNotFoundError | ImportError):
        return False
    module = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or module in ("requests", "urllib3", "sqlalchemy", "sqlite3", "botocore")


def remedy(error: BaseException, uri: str) -> str:
    """What to change after an error of MLflow, as a sentence; empty if nothing is known.

    Args:
        uri: the tracking URI.
    """
    text, code = str(error), getattr(error, "error_code", None)
    if "out-of-date database schema" in text:
        return f"Another version of MLflow made this database: copy it, then run `mlflow db upgrade {uri}`."
    if "locate revision" in text:
        return "A newer version of MLflow made this database: install that version, or set mlflow.uri to another."
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or re.search(r"\b(401|403)\b", text):
        return (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to a user who may "
            "write to the experiment."
        )
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "Set MLFLOW_TRACKING_SERVER_CERT_PATH (or REQUESTS_CA_BUNDLE) to the certificates of your authority."
    if "readonly database" in text or isinstance(error, PermissionError):
        return "Make the database and its folder writable, or set mlflow.uri to another."
    return ""


class MLflowTracker(EventTracker):
    """MLflow, which every run uses."""

    label = "MLflow"

    def remedy(self, error: BaseException, destination: Destination) -> str:
        return remedy(error, destination.uri)

    def address(self, destination: Destination) -> str:
        return destination.uri

    def open(self, destination: Destination, state: dict[str, Any]) -> Sink:
        return Server(destination.uri, destination.experiment, state, destination.timeout)

    def is_transient(self, error: BaseException) -> bool:
        return is_transient(error)


class Server(Sink):
    """A tracking server with one parent run and its stage runs.

    Args:
        uri: tracking URI.
        experiment: name of the experiment, which is created if it does not exist, and restored if it was deleted.
        state: ``run_id`` and ``stages`` (name to run id), which this class reads and updates.
        timeout: seconds after which a request fails.
    """

    def __init__(self, uri: str, experiment: str, state: dict[str, Any], timeout: float) -> None:
        prepare(timeout)
        from mlflow import MlflowClient

        self.uri, self.state = uri, state
        with _one_at_a_time(uri):  # two processes must not create the tables of a new SQLite file at the same time
            self.client = MlflowClient(tracking_uri=uri)
            self.experiment_id = self._experiment(experiment)
        self._logged: dict[tuple[str, str], set[int]] = {}
        self._new_runs: set[str] = set()
        self._checked: set[str] = set()
        self._owner: dict[str, str] = {}  # also used for the runs of stages

    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Send one event, or several events ``metrics`` of one run."""
        first = records[0]
        getattr(self, f"_on_{first['event']}")(records if first["event"] == "metrics" else first)

    # ------------------------------------------------------------------------------------------- events

    def _on_run(self, record: Mapping[str, Any]) -> None:
        if record.get("run_id"):
            self.state["run_id"] = record["run_id"]
        tags = {**record["tags"], _TAG_RUN: record["name"], "mlflow.source.name": "ktray"}
        self._owner = {k: str(v) for k, v in tags.items() if k == "mlflow.user"}
        run_id = self._parent(record["name"], tags, record["time"])
        self.client.update_run(run_id, status="RUNNING")
        self._describe(run_id, record["params"], tags)

    def _on_stage(self, record: Mapping[str, Any]) -> None:
        run_id = self._run_of(record["stage"], record["time"])
        self.client.update_run(run_id, status="RUNNING")
        if record.get("params") or record.get("tags"):
            self._describe(run_id, record.get("params", {}), record.get("tags", {}))

    def _describe(self, run_id: str, given: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Log the parameters that the run does not have yet, and the tags that differ from those of the run."""
        from mlflow.entities import Param, RunTag

        present = self.client.get_run(run_id).data
        params = [
            Param(_name(k), str(v)[:_PARAM_CHARACTERS]) for k, v in given.items() if _name(k) not in present.params
        ]
        for at in range(0, len(params), _PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=params[at : at + _PARAMS_PER_CALL])
        changed = [RunTag(k, str(v)) for k, v in tags.items() if present.tags.get(k) != str(v)]
        if changed:
            self.client.log_batch(run_id, tags=changed)

    def _on_metrics(self, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        run_id = self._run_of(records[0]["stage"])
        metrics = []
        for record in records:
            for name, value in record["values"].items():
                steps = self._steps(run_id, _name(name))
                if record["step"] not in steps:
                    steps.add(record["step"])
                    metrics.append(Metric(_name(name), float(value), int(record["time"] * 1000), record["step"]))
        try:
            for at in range(0, len(metrics), 1000):
                self.client.log_batch(run_id, metrics=metrics[at : at + 1000])
        except Exception:
            self._logged.clear()  # it is unknown how many arrived, so ask the server again
            self._new_runs.clear()
            raise

    def _on_final(self, record: Mapping[str, Any]) -> None:
        self._latest(self._run_of(None), record["values"], record["time"])

    def _on_stage_end(self, record: Mapping[str, Any]) -> None:
        run_id = self._run_of(record["stage"])
        self._latest(run_id, record["values"], record["time"])
        self.client.set_terminated(run_id, record["status"], int(record["time"] * 1000))

    def _on_run_end(self, record: Mapping[str, Any]) -> None:
        self.client.set_terminated(self._run_of(None), record["status"], int(record["time"] * 1000))

    def _on_artifact(self, record: Mapping[str, Any]) -> None:
        path, folder = Path(record["path"]), record["folder"]
        if path.is_dir():
            self.client.log_artifacts(self._run_of(None), str(path), "/".join(p for p in (folder, path.name) if p))
        elif path.exists():
            self.client.log_artifact(self._run_of(None), str(path), folder or None)
        else:
            raise FileNotFoundError(f"artifact {path} no longer exists")

    def _on_student(self, record: Mapping[str, Any]) -> None:
        run_id = self._run_of(None)
        if record["student"] is None or self.state.get("student") == run_id:
            return
        import mlflow
        import torch
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model, ModelSignature
        from mlflow.types import Schema, TensorSpec

        model, example = record["student"]
        with torch.no_grad():
            output = model(torch.from_numpy(example)).numpy()
        signature = ModelSignature(
            Schema([TensorSpec(example.dtype, (-1, *example.shape[1:]))]),
            Schema([TensorSpec(output.dtype, (-1, *output.shape[1:]))]),
        )
        # `mlflow.pytorch.log_model` depends on process-wide settings; without them it logs into the default experiment
        # and the current folder. So each step is done here.
        entry = self.client.create_logged_model(self.experiment_id, name="student", source_run_id=run_id)
        with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
            mlflow.pytorch.save_model(
                model,
                f"{folder}/model",
                mlflow_model=Model(
                    artifact_path=entry.artifact_location,
                    run_id=run_id,
                    model_uuid=entry.model_id,
                    model_id=entry.model_id,
                ),
                signature=signature,
                input_example=example,
                serialization_format="pt2",
                # Without this list, MLflow would load the model in a new process to find the requirements.
                pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"mlflow=={mlflow.__version__}"],
            )
            self.client.log_model_artifacts(entry.model_id, f"{folder}/model")
        self.client.finalize_logged_model(entry.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(run_id, [LoggedModelOutput(entry.model_id, step=0)])
        self.state["student"] = run_id

    # --------------------------------------------------------------------------------------------- runs

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                self.client.restore_experiment(experiment.experiment_id)
            return str(experiment.experiment_id)
        database = _sqlite_file(self.uri)
        place = None if database is None else (database.parent / "mlflow-artifacts").as_uri()
        return str(self.client.create_experiment(name, artifact_location=place))

    def _parent(self, name: str, tags: Mapping[str, str], began: float) -> str:
        run_id = self.state.get("run_id") or self._search(f"tags.`{_TAG_RUN}` = '{_quoted(name)}'")
        if run_id is None or not self._alive(run_id):
            run_id = self._create(tags.get("mlflow.runName", name), tags, began)
            self.state["stages"] = {}
        self.state["run_id"] = run_id
        return str(run_id)

    def _run_of(self, stage: str | None, began: float | None = None) -> str:
        parent = self.state["run_id"]
        if stage is None:
            return str(parent)
        run_id = self.state["stages"].get(stage) or self._search(
            f"tags.`{_TAG_PARENT}` = '{parent}' and tags.`{_TAG_STAGE}` = '{_quoted(stage)}'"
        )
        if run_id is None or not self._alive(run_id):
            run_id = self._create(stage, {**self._owner, _TAG_PARENT: parent, _TAG_STAGE: stage}, began)
        self.state["stages"][stage] = run_id
        return str(run_id)

    def _create(self, name: str, tags: Mapping[str, str], began: float | None) -> str:
        # The time of the event, not of sending it: the server may have been unreachable for hours.
        start = None if began is None else int(began * 1000)
        text = {k: str(v) for k, v in tags.items()}
        run = self.client.create_run(self.experiment_id, start_time=start, run_name=name, tags=text)
        run_id = str(run.info.run_id)
        self._new_runs.add(run_id)
        self._checked.add(run_id)
        return run_id

    def _search(self, filter_string: str) -> str | None:
        runs = self.client.search_runs([self.experiment_id], filter_string, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _alive(self, run_id: str) -> bool:
        """Whether the run is on the server and not deleted. The server is asked once for each run."""
        if run_id in self._checked:
            return True
        try:
            alive = bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if is_transient(error):
                raise
            return False
        if alive:
            self._checked.add(run_id)
        return alive

    def _steps(self, run_id: str, key: str) -> set[int]:
        """The steps that the run has for a metric. The server is asked only for runs that this process did not
        create."""
        if (run_id, key) not in self._logged:
            history = [] if run_id in self._new_runs else self.client.get_metric_history(run_id, key)
            self._logged[run_id, key] = {int(m.step) for m in history}
        return self._logged[run_id, key]

    def _latest(self, run_id: str, values: Mapping[str, Any], seconds: float) -> None:
        """Log final results at step 0; a value is logged again only if it has changed."""
        from mlflow.entities import Metric

        present = self.client.get_run(run_id).data.metrics if values else {}
        metrics = [
            Metric(_name(name), float(value), int(seconds * 1000), 0)
            for name, value in values.items()
            if present.get(_name(name)) != float(value)
        ]
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)


def prepare(timeout: float) -> None:
    """Set what MLflow reads when it is imported or used. Settings of the user take precedence."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print a line for each stage of each run
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    keep_loopback(os.environ)
    with contextlib.suppress(ValueError):  # the client that opens the file reports that it is missing
        trusted = certificates()
        if trusted and not os.environ.get("MLFLOW_TRACKING_INSECURE_TLS"):
            os.environ.setdefault("MLFLOW_TRACKING_SERVER_CERT_PATH", trusted)
    import mlflow  # noqa: F401  (its import resets the log levels)

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # the last one logs each retry
        logging.getLogger(name).setLevel(logging.ERROR)
    # This logger writes each error with a traceback and also raises it; the tracker reports it in one line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _sqlite_file(uri: str) -> Path | None:
    match = re.match(r"sqlite(?:\+\w+)?:///(?!:memory:)([^?]+)", uri)
    return Path(match.group(1)).absolute() if match else None


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    database = _sqlite_file(uri)
    if database is None:
        yield
        return
    import fcntl

    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _name(key: str) -> str:
    """A key in the characters that MLflow accepts."""
    return re.sub(r"[^\w.:/ -]", "_", key)[:250]


def _quoted(text: str) -> str:
    return text.replace("'", "\\'")


TRACKERS.register(MLFLOW)(MLflowTracker())
