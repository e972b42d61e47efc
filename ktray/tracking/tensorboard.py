"""TensorBoard: curves, costs and final results as event files in the folder of the run.

    python jobs/distill.py 'mlflow.also=[tensorboard]'
    tensorboard --logdir ktray-store/runs

The files are in ``tensorboard/`` of the run folder, with a folder for each stage; with a store on ``s3://``, in the
local folder of the run. They are written by tensorboardX, which Ray installs.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from ktray.recipe.registries import TRACKERS
from ktray.tracking.base import Destination, EventTracker, Sink, asked_for

FOLDER = "tensorboard"
_RUN = "run"  # the folder of the values that belong to no stage


class EventFiles(Sink):
    """The event files of one run.

    Args:
        folder: local folder, created if needed.
        state: ``steps`` (stage to last step that is written), which this class reads and updates, so that a step that a
            restarted job repeats is written once.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._folder, self._steps = folder, state.setdefault("steps", {})
        self._writers: dict[str, Any] = {}

    def deliver(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            handle = getattr(self, f"_on_{record['event']}", None)
            if handle is not None:
                handle(record)
        for writer in self._writers.values():
            writer.flush()

    def _writer(self, name: str) -> Any:
        from tensorboardX import SummaryWriter

        if name not in self._writers:
            folder = str(self._folder / name.replace(" ", "_"))
            # Two writers that start within a second would otherwise write the same file.
            self._writers[name] = SummaryWriter(folder, flush_secs=60, filename_suffix=f".{uuid.uuid4().hex[:8]}")
        return self._writers[name]

    def _scalars(self, where: str, values: dict[str, Any], step: int, time: float) -> None:
        for name, value in values.items():
            self._writer(where).add_scalar(name, float(value), step, walltime=time)

    def _on_run(self, record: dict[str, Any]) -> None:
        text = json.dumps({name: record.get(name) for name in ("name", "tags", "params")}, indent=1)
        self._writer(_RUN).add_text("recipe", f"    {text}".replace("\n", "\n    "), 0, walltime=record["time"])

    def _on_metrics(self, record: dict[str, Any]) -> None:
        stage, step = record["stage"] or _RUN, int(record["step"])
        if step > self._steps.get(stage, -1):
            self._scalars(stage, record["values"], step, record["time"])
            self._steps[stage] = step

    def _on_stage_end(self, record: dict[str, Any]) -> None:
        self._scalars(record["stage"], record["values"], max(0, self._steps.get(record["stage"], 0)), record["time"])

    def _on_final(self, record: dict[str, Any]) -> None:
        self._scalars(_RUN, record["values"], 0, record["time"])

    def _on_run_end(self, record: dict[str, Any]) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class TensorBoardTracker(EventTracker):
    """See the docstring of the module."""

    label = "TensorBoard"

    def wanted(self, destination: Destination) -> bool:
        return asked_for("tensorboard", "tensorboardX", destination)

    def open(self, destination: Destination, state: dict[str, Any]) -> Sink:
        return EventFiles(destination.folder / FOLDER, state)


TRACKERS.register("tensorboard")(TensorBoardTracker())
