"""Weights & Biases: a run with the curves of all stages, the recipe, costs, final results and files.

    pip install 'ktray[wandb]'
    python jobs/distill.py 'mlflow.also=[wandb]'

The project is ``mlflow.experiment``. wandb itself decides about the account and the server (``wandb login``,
``WANDB_API_KEY``, ``WANDB_MODE=offline``); the key never passes through ktray. A job that is started again continues
the run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ktray.recipe.registries import TRACKERS
from ktray.tracking.base import Destination, EventTracker, Sink, asked_for

_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class Project(Sink):
    """A run of a project.

    Args:
        project: name of the project.
        folder: local folder, in which wandb keeps its files.
        state: ``run_id`` and ``steps`` (stage to last step that is sent), which this class reads and updates.
        timeout: seconds after which the first answer of the server fails.
    """

    def __init__(self, project: str, folder: Path, state: dict[str, Any], timeout: float) -> None:
        import wandb

        self._wandb: Any = wandb
        self._project, self._folder, self._state, self._timeout = project, folder, state, timeout
        self._steps = state.setdefault("steps", {})
        self._run: Any = None
        self._described: set[str] = set()

    def deliver(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            handle = getattr(self, f"_on_{record['event']}", None)
            if handle is not None:
                handle(record)

    @property
    def run(self) -> Any:
        return self._run if self._run is not None else self._open({})

    def _open(self, record: dict[str, Any]) -> Any:
        if self._state.get("run_id") is None:
            self._state["run_id"] = _plain(record.get("name") or self._folder.name)
        settings = self._wandb.Settings(console="off", silent=True, init_timeout=max(30.0, 3 * self._timeout))
        self._run = self._wandb.init(
            project=_plain(self._project),
            id=self._state["run_id"],
            name=record.get("name") or None,
            config=record.get("params") or {},
            tags=[f"{name}={value}"[:64] for name, value in (record.get("tags") or {}).items()],
            dir=str(self._folder),
            resume="allow",
            settings=settings,
        )
        return self._run

    def _on_run(self, record: dict[str, Any]) -> None:
        if self._run is None:
            self._open(record)

    def _on_metrics(self, record: dict[str, Any]) -> None:
        stage, step = record["stage"] or "run", int(record["step"])
        if step <= self._steps.get(stage, -1):
            return
        axis = f"{stage}/step"
        if stage not in self._described:
            self.run.define_metric(f"{stage}/*", step_metric=axis)
            self._described.add(stage)
        self.run.log({axis: step, **{f"{stage}/{name}": float(v) for name, v in record["values"].items()}})
        self._steps[stage] = step

    def _on_stage_end(self, record: dict[str, Any]) -> None:
        values = {f"{record['stage']}/{name}": value for name, value in record["values"].items()}
        self.run.summary.update({**values, f"{record['stage']}/status": record["status"]})

    def _on_final(self, record: dict[str, Any]) -> None:
        self.run.summary.update(record["values"])

    def _on_artifact(self, record: dict[str, Any]) -> None:
        path = Path(record["path"])
        kept = self._wandb.Artifact(_plain(f"{self._state['run_id']}-{path.name}"), type="result")
        (kept.add_dir if path.is_dir() else kept.add_file)(str(path))
        self.run.log_artifact(kept)

    def _on_run_end(self, record: dict[str, Any]) -> None:
        self.run.finish(exit_code=0 if record["status"] == "FINISHED" else 1)
        self._run = None


class WandbTracker(EventTracker):
    """See the docstring of the module."""

    label = "W&B"

    def wanted(self, destination: Destination) -> bool:
        return asked_for("wandb", "wandb", destination)

    def address(self, destination: Destination) -> str:
        return "wandb"

    def open(self, destination: Destination, state: dict[str, Any]) -> Sink:
        return Project(destination.experiment, destination.folder, state, destination.timeout)

    def is_transient(self, error: BaseException) -> bool:
        """Without a connection, wandb keeps the events itself; only its start can fail for a while."""
        return isinstance(error, OSError | TimeoutError) or type(error).__name__ == "CommError"


TRACKERS.register("wandb")(WandbTracker())


def _plain(name: str) -> str:
    return _NOT_IN_NAMES.sub("-", name)[:128]
