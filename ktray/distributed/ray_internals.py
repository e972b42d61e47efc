"""Everything private of Ray that ktray uses; verified with Ray 2.60 (``pyproject.toml`` allows no other).

An upgrade of Ray starts here: what each name is for, and what ktray would lose without it, stands beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any

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
    "capture_executor",
    "dashboard_address",
    "hide_log_level_line",
    "reload_authentication",
    "remember_result",
    "spilled_bytes",
]


def dashboard_address() -> str | None:
    """``host:port`` of the cluster's dashboard; None where there is none. Ray must be connected."""
    from ray._private.services import get_webui_url_from_internal_kv

    return get_webui_url_from_internal_kv() or None


def spilled_bytes() -> int:
    """Bytes that Ray's object stores have written to disk since they were started."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)


def reload_authentication() -> None:
    """Let a Ray that is imported already read ``RAY_AUTH_MODE`` and the token from the environment again."""
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

    The dataset itself knows its executor from the first block on, and tasks that nobody has room for give none.
    """
    create = dataset._create_executor

    def capture() -> Any:
        del dataset._create_executor  # or the two would hold each other
        executor = create()
        created(executor)
        return executor

    dataset._create_executor = capture


def remember_result(scheduler: Any, trial: Any, time: float, metric: float) -> None:
    """Count a result of an earlier process in Ray Tune's ASHA, which has no public way to be told of one."""
    scheduler._brackets[0].on_result(trial, time, metric)
