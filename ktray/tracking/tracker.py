"""Log a run to MLflow in the background: each event goes to ``log.jsonl`` immediately, and to the server when
reachable.

A run of the pipeline is a parent run with a nested run for each stage. A background thread imports MLflow, which takes
seconds, and communicates with the server; training never waits for the server and never fails because of it. Events
that the server has not received stay in the log. The next `Tracker` on the same files sends them before new events. A
step that a run already has is not logged again, so a job that restarts from a checkpoint has one continuous curve.
Other registered trackers (see `ktray.tracking.base`) receive the same events, each in a separate thread.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from ktray.errors import KtrayError
from ktray.recipe.registries import TRACKERS
from ktray.redact import scrub
from ktray.storage.store import Dir
from ktray.tracking.base import Destination
from ktray.tracking.delivery import Delivery, EventLog
from ktray.tracking.mlflow_server import MLFLOW

logger = logging.getLogger("ktray")

WAY = "way"  # tag of the runs of a comparison
# The parts of an event that people read, whose secrets are masked. The others name files, runs and stages.
_SHOWN = ("params", "tags")
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


def tracking_uri(uri: str | None, home: Path) -> str:
    """The tracking URI: ``uri``, else ``MLFLOW_TRACKING_URI``, else an SQLite file in the local folder ``home``.

    Raises:
        KtrayError: the URI is a folder or starts with ``file:``, which MLflow 3.13 and newer refuse.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.absolute()}/mlflow.db"
    scheme = urlsplit(chosen).scheme.split("+")[0].lower()
    if chosen != "databricks" and scheme not in _SCHEMES:
        raise KtrayError(
            f"MLflow cannot log into a plain folder ('{scrub(chosen)}')",
            "Set mlflow.uri (or MLFLOW_TRACKING_URI) to sqlite:///PATH/mlflow.db or to the http address of a server.",
        )
    return chosen


class StageRun:
    """The nested run of a stage."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step of the stage."""
        self._tracker._put("metrics", stage=self._name, step=int(step), values=_floats(values))

    def finish(self, cost: Mapping[str, Any] | None = None, status: str = "FINISHED") -> None:
        """End the run of the stage.

        Args:
            cost: numbers, which are logged as ``cost.<name>``.
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
        """
        values = {f"cost.{k}": v for k, v in _floats(cost or {}).items()}
        self._tracker._put("stage_end", stage=self._name, values=values, status=status)


class Tracker:
    """The log of one run.

    Args:
        uri: tracking server; None: ``MLFLOW_TRACKING_URI``, else an SQLite file in ``home``.
        experiment: name of the experiment.
        buffer: ``log.jsonl`` of the run, a local file; each event is first appended here.
        state: local JSON file that stores the ids of the MLflow runs and the number of lines that are sent.
        home: local folder of the SQLite file and its artifacts.
        timeout: seconds after which a request to a server fails.
        also: names of trackers that get the same events, in addition to MLflow (``mlflow.also``).

    Raises:
        KtrayError: see `tracking_uri`; or there is no tracker of a name, or its package is not installed.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        buffer: Path,
        state: Path,
        home: Path,
        timeout: float = 10.0,
        also: Sequence[str] = (),
    ) -> None:
        self.uri, self.experiment, self.timeout = tracking_uri(uri, home), experiment, timeout
        self._copies = buffer.parent / "artifacts"
        self._log = EventLog(buffer)
        state.parent.mkdir(parents=True, exist_ok=True)
        self._hold = _lock(state)
        for name in also:
            TRACKERS.get(name)
        destination = Destination(self.uri, experiment, buffer.parent, timeout, tuple(also))
        # The result of the run names the MLflow run, and the caller chooses the state file of MLflow.
        self._main = Delivery(TRACKERS.get(MLFLOW), destination, self._log, state)
        others = [(name, tracker) for name, tracker in TRACKERS if name != MLFLOW and tracker.wanted(destination)]
        self._deliveries = [self._main]
        for name, tracker in others:
            self._deliveries.append(Delivery(tracker, destination, self._log, state.with_name(f"{name}.json")))

    # ------------------------------------------------------------------------------------------- events

    def start(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Open the parent run, or continue the run whose id is in ``state`` or whose name is ``name``.

        Args:
            name: ktray's run id, which is also the name of the run in MLflow.
            params: the resolved recipe, as dotted keys.
            tags: tags of the run.
            run_id: id of an MLflow run to continue, which takes precedence over that in ``state``.
        """
        self._put("run", name=name, params=dict(params or {}), tags=dict(tags or {}), run_id=run_id)

    def stage(
        self, name: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> StageRun:
        """Open or continue the nested run of a stage, or, in a search, of a trial."""
        more = {k: dict(v) for k, v in (("params", params), ("tags", tags)) if v}
        self._put("stage", stage=name, **more)
        return StageRun(self, name)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of the parent run at a step."""
        self._put("metrics", stage=None, step=int(step), values=_floats(values))

    def final(self, values: Mapping[str, float]) -> None:
        """Log final results of the parent run, such as those of `stable_metrics`. The latest value of each is valid."""
        self._put("final", values=_floats(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a file or folder with the run. It must stay in place until it is sent."""
        self._put("artifact", path=str(Path(path).absolute()), folder=folder)

    def stored(self, directory: Dir, name: str, folder: str = "") -> None:
        """`artifact` for a file or folder of the store. If the store is remote, a local copy is kept next to the log
        until it is sent."""
        if directory.is_local:
            self.artifact(Path(directory.path) / name, folder)
            return
        copied = self._copies / folder / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        with directory.local(name) as source:
            if source.is_dir():
                shutil.copytree(source, copied, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, copied)
        self.artifact(copied, folder)

    def log_student(self, model: Any, example: Any) -> None:
        """Log a student as an MLflow PyTorch model named ``student``, once for each run.

        The student is exported as a graph (``pt2``), not pickled, so loading it runs no code from the file. The export
        runs in the background on a copy. The log holds no weights, so if the server is not reachable, the next job must
        log the student again.

        Args:
            model: torch module, float image batch -> logits.
            example: numpy batch [N >= 2, C, H, W], float32; with one image the exported batch size would be fixed.
        """
        number = self._put("student")
        student = copy.deepcopy(model).cpu().eval(), example
        for delivery in self._deliveries:
            delivery.student(number, student)

    def finish(self, status: str = "FINISHED") -> None:
        """End the parent run: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._put("run_end", status=status)

    # ------------------------------------------------------------------------------------------ outcome

    @property
    def problem(self) -> str | None:
        """Why the last attempt to reach the server failed, and what to change; None: it succeeded."""
        return self._main.problem

    @property
    def run_id(self) -> str | None:
        """The MLflow id of the parent run; None until the server has assigned one."""
        run_id = self._main.state.get("run_id")
        return None if run_id is None else str(run_id)

    def info(self, timeout: float = 15.0) -> dict[str, Any]:
        """The object ``mlflow`` of ``result.json``. It waits for the run id as long as the server does not fail."""
        deadline, main = time.monotonic() + timeout, self._main
        with main.wake:
            while main.queue and self.run_id is None and main.problem is None and main.alive:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                main.wake.wait(left)
        return {"tracking_uri": scrub(self.uri), "experiment": self.experiment, "run_id": self.run_id}

    def flush(self, timeout: float = 10.0) -> int:
        """Wait until the server has all events, or fails, or the timeout ends; returns the number of pending events."""
        deadline, main = time.monotonic() + timeout, self._main
        with main.wake:
            while main.queue and main.alive and (left := deadline - time.monotonic()) > 0:
                if main.problem is not None:
                    break
                main.wake.wait(min(left, 0.5))
            return len(main.queue)

    def close(self, timeout: float = 30.0) -> int:
        """Send the remaining events, with one more attempt if the server fails; returns the number of pending events.

        Pending events stay in the log, and the next `Tracker` on the same files sends them.
        """
        deadline = time.monotonic() + timeout
        for delivery in self._deliveries:
            delivery.begin_close()
        pending = [delivery.join(max(0.0, deadline - time.monotonic())) for delivery in self._deliveries]
        if self._hold is not None and not any(delivery.alive for delivery in self._deliveries):
            self._hold.close()
        if not any(pending):
            shutil.rmtree(self._copies, ignore_errors=True)
        return pending[0]

    def tell(self, pending: int) -> None:
        """Warn of what the trackers did not take, with the reason and the remedy.

        Args:
            pending: the result of `close`.
        """
        for delivery in self._deliveries:
            if delivery.refused:
                some = "an event" if delivery.refused == 1 else f"{delivery.refused} events, first"
                logger.warning(f"mlflow    {delivery.label} refused {some} {delivery.first_refusal}")
        if pending:
            why = (self.problem or "the server is slow").rstrip(".")
            logger.warning(
                f"mlflow    {pending} events are not sent: {why}. They are kept in {self._log.path}, and the next run "
                "sends them once the server accepts them."
            )

    def _put(self, event: str, **content: Any) -> int:
        shown = {name: scrub(content[name]) for name in _SHOWN if name in content}
        record = {"time": round(time.time(), 3), "event": event, **content, **shown}
        with self._log.lock:
            self._log.append(record)
            number = self._log.lines
            for delivery in self._deliveries:
                delivery.put({**record, "line": number})
            return number


def _floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in ``values``; numbers that JSON does not have (nan, inf) as text."""
    numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) or hasattr(v, "__float__")}
    return {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}


def _lock(state: Path) -> IO[str] | None:
    """The open lock file of the log of a run; None if another process or tracker holds it."""
    handle = state.with_name(state.name + ".lock").open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    return handle


def catch_up(runs: Path, uri: str | None, experiment: str, home: Path, timeout: float = 30.0) -> int:
    """Send the pending events of earlier runs: those of each folder in ``runs`` that no job uses and that logs to the
    same server and experiment, or of which another server has nothing, as after a wrong address.

    Args:
        runs: folder of run folders with ``log.jsonl`` and ``mlflow.json``.
        uri, experiment, home: as in `Tracker`.
        timeout: seconds for all runs together.

    Returns:
        The number of events that are still pending.
    """
    deadline, pending = time.monotonic() + timeout, 0
    address = scrub(tracking_uri(uri, home))
    for state in sorted(runs.glob("*/mlflow.json")):
        log = state.with_name("log.jsonl")
        try:
            saved = json.loads(state.read_text())
            lines = len(log.read_text(encoding="utf-8", errors="replace").splitlines())
        except (OSError, ValueError):
            continue
        if saved.get("experiment") != experiment or saved.get("sent", 0) >= lines:
            continue
        if saved.get("uri") != address:
            # A local database always answers: what it does not have was never meant for a server.
            unreached = str(saved.get("uri")).startswith("http") and not saved.get("sent") and not saved.get("run_id")
            if not unreached:
                continue
        hold = _lock(state)
        if hold is None:
            continue
        hold.close()
        if saved.get("uri") != address:
            logger.info(f"mlflow    {log.parent.name} is sent here; {saved.get('uri')} never took any of it")
        tracker = Tracker(uri, experiment, log, state, home)
        left = tracker.close(max(0.0, deadline - time.monotonic()))
        pending += left
        if left:  # the server is not reachable, so the other folders would fail, too
            break
    return pending
