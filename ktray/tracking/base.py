"""What a tracker is: a place that the events of a run go to, such as an MLflow server.

Every event of a run is a line of ``log.jsonl``, and each tracker that is wanted gets all of them in order, in a thread
of its own: training never waits for a tracker and never fails through one. What a tracker could not take is sent by the
next job on the same run. A tracker is registered in `ktray.recipe.registries.TRACKERS`.

Events are dictionaries with ``event`` and ``time`` (seconds since 1970), and

===============  =====================================================================================
``run``          ``name``, ``params``, ``tags``, ``run_id``: the run begins or goes on
``stage``        ``stage``, perhaps ``params`` and ``tags``: a stage (or trial) of it begins or goes on
``metrics``      ``stage`` (None: the run), ``step``, ``values``
``stage_end``    ``stage``, ``values`` (its cost), ``status``
``final``        ``values``: the run's end results, of which the latest count
``artifact``     ``path``, ``folder``: a file or folder to keep
``student``      ``student``: (module, example batch), or None where the weights are gone
``run_end``      ``status``: ``FINISHED``, ``FAILED`` or ``KILLED``
===============  =====================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Destination:
    """What a tracker is told of the run's settings.

    Attributes:
        uri: ``mlflow.uri`` as it was resolved.
        experiment: ``mlflow.experiment``.
        folder: local folder of the run, with ``log.jsonl``.
        timeout: seconds for one request.
    """

    uri: str
    experiment: str
    folder: Path
    timeout: float


class Sink(ABC):
    """An open connection; used from one thread only."""

    @abstractmethod
    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Send one event, or several of ``metrics`` that belong to one stage. An event may come twice: after a failure,
        and when a job is restarted."""


class EventTracker(ABC):
    """A kind of tracker. Instances have no state and are registered in ``TRACKERS``."""

    label: str
    """Its name in messages."""

    def wanted(self, destination: Destination) -> bool:
        """Whether this run is sent to it; asked once, before anything else. An environment variable may decide."""
        return True

    def address(self, destination: Destination) -> str:
        """Where it sends to. A run that is sent to another address than before is sent whole."""
        return ""

    @abstractmethod
    def open(self, destination: Destination, state: dict[str, Any]) -> Sink:
        """Connect; may take its time.

        Args:
            state: JSON that is kept with the run, here ``run_id`` and ``stages``, and whatever the sink adds.
        """

    def is_transient(self, error: BaseException) -> bool:
        """Whether it makes sense to send the same event again later; by default it is left out."""
        return False
