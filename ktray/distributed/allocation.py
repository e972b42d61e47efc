"""Where work runs: connecting to Ray, and a plan of CPUs and GPUs that cannot deadlock.

Ray never reports that a stage waits for a CPU that its own workers hold; it just hangs. So each stage asks for
shares that were checked to fit beforehand, and one that cannot fit ends with the arithmetic.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ktray
from ktray.errors import KtrayError


@dataclass(frozen=True)
class Plan:
    """Shares of the cluster. CPU figures are Ray's logical CPUs.

    Attributes:
        least, workers: the fewest and the most training workers.
        streaming: teachers that may work beside each training worker; 0 where its GPUs are all in training.
    """

    total_cpus: float
    total_gpus: float
    least: int
    workers: int
    worker_cpus: float
    worker_gpus: float
    actors: int
    actor_cpus: float
    actor_gpus: float
    decode_cpus: float
    worker_threads: int
    actor_threads: int
    streaming: int

    @property
    def line(self) -> str:
        """One line for the terminal."""
        device = "GPU" if self.worker_gpus else "CPU"
        teachers = f"{self.actors} teacher {'actors' if self.actor_gpus else 'tasks'} of {self.actor_cpus:g} CPU"
        return (
            f"cluster   {self.total_cpus:g} CPUs, {self.total_gpus:g} GPUs: "
            f"{self.workers if self.least == self.workers else f'{self.least}..{self.workers}'} training worker(s) "
            f"on {device} "
            f"with {self.worker_cpus:g} CPUs each, {teachers}, "
            f"decode tasks of {self.decode_cpus:g} CPU"
        )


# For each copy of a teacher on a CPU: torch, the model (a ViT-L takes 1.2 GB) and the pixels it is given.
BYTES_A_TEACHER = 4e9


def plan(
    cpus: float, gpus: float, nodes: int, workers: int | tuple[int, int], use_gpu: bool | str, memory: float = math.inf
) -> Plan:
    """Divide a cluster. Training workers leave CPUs for reading; a decode task always has room.

    Teachers on GPUs are actors, which hold a CPU share while they live. On CPUs they are tasks, as many as there are
    CPUs and memory for: they hold nothing between shards, so that decoding has all CPUs while no pixels are there, and
    one thread each wastes none of them on waiting for the others.

    Args:
        workers: how many, or the fewest and the most. Of a range each has a GPU or, on CPUs, most of a node, so that as
            many fit as there are such.
        memory: of the cluster, in bytes.

    Raises:
        KtrayError: it cannot fit; with the arithmetic.
    """
    least, most = workers if isinstance(workers, tuple) else (workers, workers)
    elastic = least < most
    on_gpu = gpus > 0 if use_gpu == "auto" else bool(use_gpu)
    if on_gpu and gpus < least:
        raise KtrayError(
            f"{least} training workers need {least} GPUs and the cluster has {gpus:g}",
            f"Set cluster.workers={int(gpus)}, or cluster.use_gpu=false.",
        )
    if cpus <= 0:
        raise KtrayError(
            "The cluster offers no CPU",
            "Start a node with CPUs (ray start --num-cpus=N), or ask an autoscaling cluster for some "
            "(cluster.cpus=16 cluster.gpus=1).",
        )
    if elastic and not on_gpu and nodes < least:
        raise KtrayError(
            f"cluster.workers={least}..{most} on CPUs is one worker a node, and the cluster has {nodes} of at least "
            f"{least}",
            f"Set cluster.workers={nodes}..{most}, or a fixed number of workers, which may share a node.",
        )
    now = min(most, max(least, int(gpus) if on_gpu else nodes)) if elastic else most
    # At least half of the CPUs, and never less than one where there are two, stay for reading.
    worker_cpus = min(1.0, int(50 * cpus / now) / 100)
    if elastic and on_gpu:
        worker_cpus = 2.0 ** min(0, math.floor(math.log2(cpus / 2 / now)))  # so that Ray Train's sums are exact
    elif elastic:
        worker_cpus = int(60 * cpus / nodes) / 100  # two would not fit on a node
    # What the largest reading task may have. One of the nodes has at most an even share of the workers; of those that
    # come and go it may have to be on a node with one.
    a_node = 1 if elastic else now // nodes
    beside = min(cpus / 2, cpus / nodes - a_node * worker_cpus)
    if worker_cpus < 0.02:
        raise KtrayError(
            f"{now} training workers do not fit on {cpus:g} CPUs: each would get {cpus / 2 / now:.3f}, "
            "0.02 is the least",
            f"Set cluster.workers to at most {int(cpus / 2 / 0.02)}.",
        )
    if on_gpu:
        actors = max(1, int(gpus))
        actor_cpus = min(1.0, cpus / 2 / actors)
        decode_cpus = min(1.0, cpus - actors * actor_cpus)
    else:
        actors = max(1, int(min(cpus, memory // BYTES_A_TEACHER)))
        actor_cpus = decode_cpus = min(1.0, beside)
    left = cpus - now * worker_cpus
    # A teacher beside the training has a GPU of its own; on CPUs it shares what training leaves with the reading.
    streaming = int((gpus - most) // most) if on_gpu else max(1, min(actors, int(left / decode_cpus / now)))
    cores_a_node = max(1, int(cpus / max(1, nodes)))
    return Plan(
        total_cpus=cpus,
        total_gpus=gpus,
        least=least,
        workers=most,
        worker_cpus=worker_cpus,
        worker_gpus=1.0 if on_gpu else 0.0,
        actors=actors,
        actor_cpus=actor_cpus,
        actor_gpus=1.0 if on_gpu else 0.0,
        decode_cpus=decode_cpus,
        # Nobody has more cores than a node.
        worker_threads=max(1, min(cores_a_node, cores_a_node * nodes // now)),
        actor_threads=max(1, min(cores_a_node, cores_a_node * nodes // actors)),
        streaming=max(0, streaming),
    )


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
        raylet: Any = sys.modules["ray._raylet"]
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


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


def lasting_store(store: str) -> str:
    """Where a relative store lies: in the home folder inside a job, whose working directory Ray deletes after it."""
    relative = "://" not in store and not Path(store).expanduser().is_absolute()
    return str(Path.home() / store) if relative and inside_job() else store


def cluster_plan(workers: int | tuple[int, int], use_gpu: bool | str, jobs: int = 1) -> Plan:
    """`plan` for the cluster that Ray is connected to, or for the part of it that each of ``jobs`` has.

    What a job holds while it reads is at most half of its part's CPUs and no GPU of another's. Two that both plan with
    the whole can between them hold all there is, and then both wait for a reading task, or a teacher's GPU, for ever.
    """
    import ray

    total = ray.cluster_resources()
    cpus, gpus, memory = (float(total.get(name, 0.0)) for name in ("CPU", "GPU", "memory"))
    # A head that is kept free of work, and nodes that have left, have no cores for anyone.
    working = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return plan(cpus / jobs, gpus // jobs, max(1, working // jobs), workers, use_gpu, memory / jobs)


def others(jobs: int) -> str | None:
    """A hint where other jobs hold a part of the cluster and this one plans with all of it."""
    import ray

    total, free = (found.get("CPU", 0.0) for found in (ray.cluster_resources(), ray.available_resources()))
    if jobs > 1 or total - free < 0.01:
        return None
    return (
        f"other jobs hold {total - free:g} of {total:g} CPUs; jobs at once can end up waiting for each other unless "
        "each is started with cluster.jobs=N, for N of them"
    )
