"""Connecting to Ray: settings of processes, authentication, what a job's workers are given."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

import ktray

# What worker processes are started with: glibc gives a large tensor's memory back to the kernel when it is freed, and a
# training step then waits for some 5,000 page faults. With these it keeps and reuses it: a step of the default student
# takes 15% less time on two cores.
TUNED = {
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


# How data is reached, and where it may be read from (`ktray.data.filesystem.ROOTS`).
DATA_SETTINGS = (
    "KTRAY_DATA_ROOTS",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)


def connect(debug: bool = False, object_store: int | None = None) -> None:
    """Join the cluster of ``RAY_ADDRESS`` (``ray job submit`` sets it), or start Ray on this machine.

    Args:
        object_store: bytes for the objects of a Ray that is started here; None: from the memory.
    """
    for name, value in {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # Between two looks at how many workers there is room for, after one that found less than it had thought.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "info" if debug else "fatal",
    }.items():
        os.environ.setdefault(name, value)
    _authenticate(os.environ.get("RAY_ADDRESS"))
    import ray.data  # before the levels below: importing it sets them

    if ray.is_initialized():
        return
    if not debug:
        from ktray.distributed.ray_internals import hide_log_level_line

        hide_log_level_line()
    level = logging.INFO if debug else logging.ERROR
    common: dict[str, Any] = {"log_to_driver": debug, "logging_level": level, "ignore_reinit_error": True}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # A job's workers already run in its working directory; a bare driver must bring the package along.
        env: dict[str, Any] = {} if inside_job() else {"py_modules": [str(Path(ktray.__file__).parent)]}
        env["env_vars"] = worker_settings()
        ray.init(address=address, runtime_env=env, **common)
    else:
        from ktray.accounting.device import memory_bytes, usable_cpus

        cores = max(2, int(usable_cpus()))
        # Ray ends idle worker processes after a second, and a new one imports for 5 to 10.
        idle = {"RAY_num_workers_soft_limit": str(cores + 4), "RAY_idle_worker_killing_time_threshold_ms": "600000"}
        for name, value in (TUNED | idle).items():  # the workers are started from here
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            include_dashboard=False,  # a tenth of one of two cores; `ray start --head` has one
            num_cpus=cores,
            object_store_memory=object_store or int(min(2_000_000_000, memory_bytes() * 0.15)),
            **common,
        )
    # Ray Data logs an error with its traceback and raises it too; the command line tells it in one line.
    for name, quiet in (("ray.data", logging.CRITICAL), ("ray.train", logging.ERROR), ("ray.tune", logging.ERROR)):
        logging.getLogger(name).setLevel(logging.INFO if debug else quiet)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.execution_options.verbose_progress = False


def authentication(address: str | None) -> dict[str, str]:
    """Variables that say what Ray would guess otherwise; none where ``RAY_AUTH_MODE`` and a token are given.

    A Ray that is started here asks for a token, since its ports are open to the network and to every user of the
    machine. Without one at hand it gets one that lives as long as this process: Ray itself would write one to
    ``~/.ray/auth_token``, readable by all, and from then on that file would decide how other clusters start. A cluster
    that is joined has been started by somebody else: as Ray does, a token that is at hand is sent to one that Ray finds
    on this machine (``auto``), and to an address only where ``RAY_AUTH_MODE=token`` says so.
    """
    joins = bool(address) and address != "local"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    at_hand = bool(os.environ.get("RAY_AUTH_TOKEN")) or (file.is_file() and file.stat().st_size > 0)
    found = {}
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        joined = "token" if address == "auto" and at_hand else "disabled"
        mode = found["RAY_AUTH_MODE"] = joined if joins else "token"
    if mode.lower() == "token" and not joins and not at_hand:
        found["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return found


def _authenticate(address: str | None) -> None:
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():  # by somebody else, and as it is it works
        return
    found = authentication(address)
    os.environ |= found
    if found and ray:  # it read the environment when it was imported
        from ktray.distributed.ray_internals import reload_authentication

        reload_authentication()


def worker_settings() -> dict[str, str]:
    """Variables for workers on other nodes: `TUNED`, and how this process reaches data, without credentials, which all
    could read there."""
    wanted = TUNED | {name: os.environ[name] for name in (*TUNED, *DATA_SETTINGS) if os.environ.get(name)}
    # What the job was submitted with reaches the workers by itself, and Ray takes no name twice.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    known = ((job.get("runtime_env") or {}).get("env_vars") or {}).keys()
    return {name: value for name, value in wanted.items() if name not in known}


def inside_job() -> bool:
    """Whether this driver was started by ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_id() -> str | None:
    """Ray's id of this driver's job; None where Ray is not connected."""
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else None


def lasting_store(store: str) -> str:
    """Where a relative store lies: in the home folder inside a job, whose working directory Ray deletes after it."""
    relative = "://" not in store and not Path(store).expanduser().is_absolute()
    return str(Path.home() / store) if relative and inside_job() else store
