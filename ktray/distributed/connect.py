"""The connection to Ray: settings of its processes, authentication, and the environment of a job's workers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ktray
from ktray.distributed.assigned import use_assigned_device
from ktray.distributed.explain import OOM_RETRIES
from ktray.distributed.surroundings import (
    LEAST_OBJECT_STORE,
    check_address,
    check_answers,
    give_a_home,
    not_reached,
    shared_memory,
    use_short_temporary_folder,
)
from ktray.distributed.termination import kept_sigterm
from ktray.errors import ResourceError

logger = logging.getLogger("ktray")

_SLOW_START_S = 15.0  # Ray starts in 3 to 8 seconds

# Environment of the worker processes. By default glibc returns the memory of a large tensor to the kernel when the
# tensor is freed, and a training step then waits for some 5,000 page faults. With these settings glibc keeps and reuses
# the memory: a step of the default student takes 15% less time on two cores.
TUNED = {
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}


# Variables that say how data is reached, from where it may be read (`ktray.data.filesystem.ROOTS`), and where a node
# keeps copies of it (`ktray.storage.node_cache`).
DATA_SETTINGS = (
    "KTRAY_DATA_ROOTS",
    "KTRAY_CACHE",
    "KTRAY_CACHE_BYTES",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "HF_ENDPOINT",
    "AZURE_STORAGE_ACCOUNT",
    "AZURE_STORAGE_BLOB_ENDPOINT",
    "GOOGLE_CLOUD_ANONYMOUS",
    "STORAGE_EMULATOR_HOST",
)


def connect(debug: bool = False, object_store: int | None = None) -> None:
    """Join the cluster of ``RAY_ADDRESS`` (``ray job submit`` sets it), or start Ray on this machine.

    Args:
        debug: show Ray's log and its progress bars.
        object_store: size in bytes of the object store of a Ray that is started here; None: derived from the memory.
    """
    for name, value in {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # After a start of workers that did not find the room it expected, Ray Train checks again after this time.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_task_oom_retries": str(OOM_RETRIES),
        "RAY_DEDUP_LOGS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "info" if debug else "fatal",
    }.items():
        os.environ.setdefault(name, value)
    check_address(os.environ.get("RAY_ADDRESS"))
    for done in (give_a_home(os.environ), use_short_temporary_folder(os.environ)):
        if done:
            logger.info(f"machine   {done}")
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
        # The workers of a submitted job already run in its working directory; other drivers must send the package.
        env: dict[str, Any] = {} if inside_job() else {"py_modules": [str(Path(ktray.__file__).parent)]}
        env["env_vars"] = worker_settings()
        try:
            found = _answering(address)
            with kept_sigterm(), _told_if_slow(f"waiting for the Ray cluster at {found}"):
                ray.init(address=address, runtime_env=env, **common)
        except (ConnectionError, TimeoutError, OSError) as error:
            raise not_reached(address, error) from error
    else:
        from ktray.accounting.device import memory_bytes, usable_cpus

        cores = max(2, int(usable_cpus()))
        # Ray ends idle worker processes after one second, and a new process needs 5 to 10 seconds for its imports.
        idle = {"RAY_num_workers_soft_limit": str(cores + 4), "RAY_idle_worker_killing_time_threshold_ms": "600000"}
        # By default, Ray starts its workers with niceness 15. Another program that shares a core with one of them then
        # gets 28 times its time; with equal priority, both get half.
        priority = {"RAY_worker_niceness": "0"}
        for name, value in (TUNED | idle | priority).items():  # the workers are started from here
            os.environ.setdefault(name, value)
        size = object_store or _object_store(memory_bytes())
        for problem in shared_memory(size, memory_bytes()):
            logger.warning(f"machine   {problem}")
        with kept_sigterm(), _slow_start_told():
            ray.init(
                address="local",
                include_dashboard=False,  # it would take a tenth of one of two cores; `ray start --head` starts one
                num_cpus=cores,
                object_store_memory=size,
                **common,
            )
    # Ray Data logs an error with its traceback and also raises it; the command line prints it in one line.
    for name, quiet in (("ray.data", logging.CRITICAL), ("ray.train", logging.ERROR), ("ray.tune", logging.ERROR)):
        logging.getLogger(name).setLevel(logging.INFO if debug else quiet)
    use_assigned_device()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = debug
    context.execution_options.verbose_progress = False


def _answering(address: str) -> str:
    """The address that ``RAY_ADDRESS`` means, for messages.

    Raises:
        ResourceError, ConnectionError: nothing listens there, or no Ray runs on this machine.
    """
    if address == "local":
        return address
    if address != "auto":
        check_answers(address)
        return address
    from ktray.distributed.ray_internals import address_of_this_machine

    found = address_of_this_machine()  # raises ConnectionError if there is none
    check_answers(found, within=5.0)
    return f"{found} (auto)"


@contextlib.contextmanager
def _told_if_slow(what: str) -> Iterator[None]:
    """Say what the job waits for if that takes long."""
    slow = threading.Timer(_SLOW_START_S, logger.info, [f"machine   {what}"])
    slow.daemon = True
    slow.start()
    try:
        yield
    finally:
        slow.cancel()


@contextlib.contextmanager
def _slow_start_told() -> Iterator[None]:
    """Say that Ray is still starting, which takes minutes on a busy machine, and explain it if Ray gives up."""
    try:
        with _told_if_slow("Ray is starting, which takes longer while other programs are busy"):
            yield
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not start in time on this machine",
            "The machine is probably overloaded: end other programs or wait, and start the job again.",
        ) from error


def _object_store(memory: float) -> int:
    """Size in bytes of the object store for a machine with ``memory`` bytes.

    Little passes through it on a small machine. On a large one, decoded images wait in it for the GPUs: it has Ray's
    own share, as far as the shared memory of the machine has room.
    """
    if memory < 32e9:
        return int(min(2e9, max(LEAST_OBJECT_STORE, 0.15 * memory)))
    with contextlib.suppress(OSError):
        shared = os.statvfs("/dev/shm")
        return int(max(2e9, min(0.3 * memory, 0.9 * shared.f_bavail * shared.f_frsize)))
    return int(2e9)


def authentication(address: str | None) -> dict[str, str]:
    """Environment variables that make Ray's authentication explicit; none if ``RAY_AUTH_MODE`` and a token are set.

    A Ray that is started here requires a token, because its ports are open to the network and to every user of the
    machine. If there is no token, a new one is made that is valid as long as this process runs. Ray itself would write
    a token to ``~/.ray/auth_token``, readable by all, and from then on that file would decide how other clusters start.

    A cluster that is joined was started by somebody else. As Ray does, ktray sends an existing token to a cluster that
    Ray finds on this machine (``auto``), and to an address only if ``RAY_AUTH_MODE=token`` is set.
    """
    joins = bool(address) and address != "local"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or (file.is_file() and file.stat().st_size > 0)
    variables = {}
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        joined_mode = "token" if address == "auto" and has_token else "disabled"
        mode = variables["RAY_AUTH_MODE"] = joined_mode if joins else "token"
    if mode.lower() == "token" and not joins and not has_token:
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return variables


def _authenticate(address: str | None) -> None:
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():  # other code has connected, so its authentication works
        return
    variables = authentication(address)
    os.environ |= variables
    if variables and ray:  # Ray read the environment when it was imported
        from ktray.distributed.ray_internals import reload_authentication

        reload_authentication()


def worker_settings() -> dict[str, str]:
    """Environment variables for workers on other nodes: `TUNED` and `DATA_SETTINGS`, with this process's values.

    Credentials are not among them: everyone who sees the cluster could read them.
    """
    settings = TUNED | {name: os.environ[name] for name in (*TUNED, *DATA_SETTINGS) if os.environ.get(name)}
    # Ray passes the variables that the job was submitted with to the workers, and refuses a name that is set twice.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    submitted = ((job.get("runtime_env") or {}).get("env_vars") or {}).keys()
    return {name: value for name, value in settings.items() if name not in submitted}


def inside_job() -> bool:
    """Whether this driver was started by ``ray job submit``."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_id() -> str | None:
    """Ray's id of this driver's job; None if Ray is not connected."""
    import ray

    return str(ray.get_runtime_context().get_job_id()) if ray.is_initialized() else None


def lasting_store(store: str) -> str:
    """The path of the store that outlives the job.

    Inside a submitted job, a relative path is relative to the home folder, because Ray deletes the job's working
    directory after the job. Other paths are returned unchanged.
    """
    relative = "://" not in store and not Path(store).expanduser().is_absolute()
    return str(Path.home() / store) if relative and inside_job() else store
