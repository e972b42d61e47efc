"""The contract of a tracker: a destination for the events of a run, such as an MLflow server.

Each event of a run is a line of ``log.jsonl``. Each tracker that the run uses receives all events in order, in a
separate thread, so training never waits for a tracker and never fails because of one. The next job on the same run
sends the events that a tracker has not received. Trackers are registered in `ktray.recipe.registries.TRACKERS`.

Events are dictionaries with ``event`` and ``time`` (seconds since 1970), and

===============  =====================================================================================
``run``          ``name``, ``params``, ``tags``, ``run_id``: the run starts or continues
``stage``        ``stage``, optional ``params`` and ``tags``: a stage or trial starts or continues
``metrics``      ``stage`` (None: the run), ``step``, ``values``
``stage_end``    ``stage``, ``values`` (its cost), ``status``
``final``        ``values``: final results of the run; the latest value of each is valid
``artifact``     ``path``, ``folder``: a file or folder to keep
``student``      ``student``: (module, example batch), or None where the weights are gone
``run_end``      ``status``: ``FINISHED``, ``FAILED`` or ``KILLED``
===============  =====================================================================================
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.errors import KtrayError


@dataclass(frozen=True)
class Destination:
    """The settings of a run that a tracker receives.

    Attributes:
        uri: the resolved value of ``mlflow.uri``.
        experiment: ``mlflow.experiment``.
        folder: local folder of the run, with ``log.jsonl``.
        timeout: seconds after which a request fails.
        also: ``mlflow.also``, the names of the trackers that the recipe asks for in addition to MLflow.
    """

    uri: str
    experiment: str
    folder: Path
    timeout: float
    also: tuple[str, ...] = ()


class Sink(ABC):
    """An open connection. Only one thread uses it."""

    @abstractmethod
    def deliver(self, records: list[dict[str, Any]]) -> None:
        """Send one event, or several events ``metrics`` of one stage. The same event may be sent twice, after a failure
        or a restart of the job."""


def asked_for(name: str, package: str, destination: Destination) -> bool:
    """Whether the recipe asks for a tracker by its name.

    Args:
        package: name of the package that the tracker imports.

    Raises:
        KtrayError: it does, and the package is not installed.
    """
    if name not in destination.also:
        return False
    if importlib.util.find_spec(package) is None:
        raise KtrayError(
            f"mlflow.also has {name}, and the package '{package}' is not installed",
            f"Install it with 'pip install {package}', or remove {name} from mlflow.also.",
        )
    return True


class EventTracker(ABC):
    """A kind of tracker. Instances have no state and are registered in ``TRACKERS``."""

    label: str
    """Name of the tracker in messages."""

    def wanted(self, destination: Destination) -> bool:
        """Whether this run uses the tracker, for example depending on an environment variable. It is called once,
        first.

        Raises:
            KtrayError: the recipe asks for the tracker, and something that it needs is missing.
        """
        return True

    def address(self, destination: Destination) -> str:
        """The address that the tracker sends to. If it has changed since the last job, all events of the run are
        sent."""
        return ""

    @abstractmethod
    def open(self, destination: Destination, state: dict[str, Any]) -> Sink:
        """Connect. This may be slow.

        Args:
            state: JSON-like values that are stored with the run: ``run_id``, ``stages``, and what the sink adds.
        """

    def is_transient(self, error: BaseException) -> bool:
        """Whether sending the same event later may succeed. By default it may not, and the event is skipped."""
        return False

    def remedy(self, error: BaseException, destination: Destination) -> str:
        """What the user can change so that a failed attempt succeeds, as a sentence; empty if nothing is known."""
        return ""
