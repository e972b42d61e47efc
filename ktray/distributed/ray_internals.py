"""The private names of Ray that ktray uses, all in this file. They were verified with Ray 2.60.

``pyproject.toml`` allows no other version of Ray. An upgrade of Ray starts with this file: each function says what its
names are for.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.v2._internal.exceptions import (
        CheckpointManagerInitializationError,
        InsufficientClusterResourcesError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = [
    "CheckpointManagerInitializationError",
    "ControllerCallback",
    "InsufficientClusterResourcesError",
    "WorkerGroupStartupTimeoutError",
    "address_of_this_machine",
    "capture_executor",
    "dashboard_address",
    "hide_log_level_line",
    "reload_authentication",
    "remember_result",
    "remove_placement_groups",
    "rest_between_steps",
    "spilled_bytes",
]


# Imported on first use: with Ray Train come Ray Data and more, half a second in every worker.
_RAY_TRAIN = {
    "CheckpointManagerInitializationError": "exceptions",
    "ControllerCallback": "execution.callback",
    "InsufficientClusterResourcesError": "exceptions",
    "WorkerGroupStartupTimeoutError": "exceptions",
}

# The shortest and the longest rest of an executor. It waits up to 0.1 s for its tasks anyway, and a step handles all
# that are ready.
RESTS_S = 0.005, 0.04


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name not in _RAY_TRAIN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"ray.train.v2._internal.{_RAY_TRAIN[name]}"), name)


def address_of_this_machine() -> str:
    """``HOST:PORT`` of the cluster that ``RAY_ADDRESS=auto`` means; ConnectionError if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))  # None only for other arguments


def dashboard_address() -> str | None:
    """``host:port`` of the cluster's dashboard; None if it has no dashboard. Ray must be connected."""
    from ray._private.services import get_webui_url_from_internal_kv

    return get_webui_url_from_internal_kv() or None


def spilled_bytes() -> int:
    """Bytes that Ray's object stores have written to disk since they were started."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def remove_placement_groups(actor: Any) -> None:
    """Remove the placement groups that an actor has created. Ray does it only when its driver has ended, too; until
    then, it keeps machines for them and asks an autoscaler for more."""
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    table: Any = vars(gcs_pb2)["PlacementGroupTableData"]  # generated when it is imported
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = table.FromString(row)
        ended = group.state == table.REMOVED
        if group.creator_actor_id == actor._actor_id.binary() and not ended:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def reload_authentication() -> None:
    """Make Ray, which is already imported, read ``RAY_AUTH_MODE`` and the token from the environment again."""
    raylet: Any = sys.modules["ray._raylet"]
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def hide_log_level_line() -> None:
    """Keep Ray's C++ core quiet about the level that ``RAY_BACKEND_LOG_LEVEL`` sets. To be called before `ray.init`.

    ``ray.init`` reads the variable and first prints, at INFO, that it did (``logging.cc: Set ray log level from
    environment variable ...``); only then does the level hold. So the level at which the core starts is raised from
    INFO to WARNING. Where the library has no such symbol, nothing happens, and the line is printed.
    """
    import ray._raylet

    info, warning = 0, 1  # of the C++ enumeration RayLogLevel
    with contextlib.suppress(OSError, ValueError):
        library = ctypes.CDLL(ray._raylet.__file__)
        level = ctypes.c_int.in_dll(library, "_ZN3ray6RayLog19severity_threshold_E")
        if level.value == info:
            level.value = warning


def capture_executor(dataset: Any, created: Callable[[Any], None]) -> None:
    """Call ``created`` with the executor of a Ray Data dataset as soon as its execution begins.

    The dataset itself knows its executor only from the first block on, and tasks for which the cluster has no room
    never return a block.
    """
    create = dataset._create_executor

    def capture() -> Any:
        del dataset._create_executor  # otherwise this function and the dataset would keep each other alive
        executor = create()
        created(executor)
        return executor

    dataset._create_executor = capture


@lru_cache(maxsize=1)
def _resting() -> type:
    from ray.data._internal.execution.execution_callback import ExecutionCallback  # slow to import

    class Resting(ExecutionCallback):
        """Rests after a step of an executor that took less than the shortest rest, longer each time."""

        def before_execution_starts(self, executor: Any) -> None:
            self.rest, self.began = RESTS_S[0], time.perf_counter()

        def on_execution_step(self, executor: Any) -> None:
            if time.perf_counter() - self.began < RESTS_S[0]:
                time.sleep(self.rest)
                self.rest = min(2 * self.rest, RESTS_S[1])
            else:  # it has waited for its tasks
                self.rest = RESTS_S[0]
            self.began = time.perf_counter()

    return Resting


def rest_between_steps(dataset: Any) -> None:
    """Let the executor of a Ray Data dataset rest after steps that took no time.

    A step waits until all running tasks have something new. Where the consumer has no room for it, as a trainer that
    uses a window, they have, and the executor would ask again at once, for minutes: it would need a core of its own,
    and most of the time the interpreter lock of the process that trains.
    """
    others = [one for one in dataset.context.custom_execution_callback_classes if one is not _resting()]
    dataset.context.custom_execution_callback_classes = [*others, _resting()]


def remember_result(scheduler: Any, trial: Any, time: float, metric: float) -> None:
    """Add a result of an earlier process to Ray Tune's ASHA, which has no public method for this."""
    scheduler._brackets[0].on_result(trial, time, metric)
