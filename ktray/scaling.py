"""Machines that a job asks an autoscaling cluster for, before it plans with what is there.

A cluster that grows on demand may be empty when a job starts, and ktray divides what it sees. So a job that says how
much it wants holds a placement group of that size until the machines are up, lets go of it, and plans. It is not
``request_resources``: that is one request for the whole cluster, which a second job would overwrite and which outlives
a job that dies; a placement group is its job's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe import Cluster

_TELL = 30.0  # seconds between lines while it waits


def gather(part: Cluster, say: Callable[[str], None]) -> None:
    """Wait until the cluster has ``cluster.cpus`` and ``cluster.gpus``; returns at once where they are there.

    Raises:
        KtrayError: it has not after ``cluster.wait_seconds``; with what there is.
    """
    from ray.util import placement_group, remove_placement_group

    if _enough(part):
        return
    # Single CPUs and GPUs, so that machines of any size will do.
    bundles: list[dict[str, float]] = [{"GPU": 1.0}] * part.gpus + [{"CPU": 1.0}] * part.cpus
    group: Any = placement_group(bundles, strategy="PACK")
    began = told = time.monotonic()
    try:
        # By what the cluster has, not by whether the group is placed: others may use some of it.
        while not _enough(part):
            now = time.monotonic()
            if now - began > part.wait_seconds:
                raise KtrayError(
                    f"The cluster has {_there()} after {part.wait_seconds:g} s, and the job asks for {part.cpus} CPUs "
                    f"and {part.gpus} GPUs",
                    "See `ray status` for what the autoscaler says (max_workers, quota, no spot machine to be had?), "
                    "or set cluster.cpus and cluster.gpus to what there is.",
                )
            if now - told >= _TELL or told == began:
                say(f"cluster   waiting for {part.cpus} CPUs and {part.gpus} GPUs; there are {_there()}")
                told = now
            time.sleep(min(1.0, part.wait_seconds))
    finally:
        remove_placement_group(group)


def _enough(part: Cluster) -> bool:
    import ray

    total = ray.cluster_resources()
    return total.get("CPU", 0.0) >= part.cpus and total.get("GPU", 0.0) >= part.gpus


def _there() -> str:
    import ray

    total = ray.cluster_resources()
    return f"{total.get('CPU', 0.0):g} CPUs and {total.get('GPU', 0.0):g} GPUs"
