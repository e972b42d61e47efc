"""Machines that a job asks an autoscaling cluster for, before it plans with what is there.

A cluster that grows on demand may be empty when a job starts, and ktray divides what it sees. So a job that says how
much it wants holds a placement group of that size until the machines are up, lets go of it, and plans. It is not
``request_resources``: that is one request for the whole cluster, which a second job would overwrite and which outlives
a job that dies; a placement group is its job's own.

The machines would be given back again while the driver works alone for longer than their idle timeout. An actor on each
of them, which holds nothing and does nothing, keeps them while the job lasts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe.cluster import ClusterConfig

logger = logging.getLogger("ktray")

_TELL = 30.0  # seconds between lines while it waits


@contextmanager
def gathered(part: ClusterConfig) -> Iterator[None]:
    """Wait until the cluster has ``cluster.cpus`` and ``cluster.gpus``, and keep as many while the block runs.

    Raises:
        KtrayError: it has not after ``cluster.wait_seconds``; with what there is.
    """
    import ray

    kept: dict[str, Any] = {}
    try:
        _wait(part, kept)
        yield
    finally:
        for one in kept.values():
            ray.kill(one)


def _wait(part: ClusterConfig, kept: dict[str, Any]) -> None:
    from ray.util import placement_group, remove_placement_group

    group: Any = None if _enough(part) else placement_group(bundles(part), strategy="PACK")
    began = told = time.monotonic()
    try:
        # By what the cluster has, not by whether the group is placed: others may use some of it. The group goes last:
        # a machine has been idle since it came up, and would be taken away with what it was started for.
        while not (_enough(part) and _keep(part, kept)):
            now = time.monotonic()
            if now - began > part.wait_seconds:
                raise KtrayError(
                    f"The cluster has {_there()} after {part.wait_seconds:g} s, and the job asks for {part.cpus} CPUs "
                    f"and {part.gpus} GPUs",
                    "See `ray status` for what the autoscaler says (max_workers, quota, no spot machine to be had?), "
                    "or set cluster.cpus and cluster.gpus to what there is.",
                )
            if (now - told >= _TELL or told == began) and not _enough(part):
                logger.info(f"cluster   waiting for {part.cpus} CPUs and {part.gpus} GPUs; there are {_there()}")
                told = now
            time.sleep(min(1.0, part.wait_seconds))
    finally:
        if group is not None:
            remove_placement_group(group)


def _keep(part: ClusterConfig, kept: dict[str, Any]) -> bool:
    """Put an actor on each machine that the job needs and that has none; whether all of them run."""
    import ray

    needed = wanted(part, ray.nodes())
    kept.update({node: _stay(node) for node in needed if node not in kept})
    asked = [kept[node].here.remote() for node in needed]
    return not asked or len(ray.wait(asked, num_returns=len(asked), timeout=5.0)[0]) == len(asked)


def bundles(part: ClusterConfig) -> list[dict[str, float]]:
    """What is asked for: single CPUs and GPUs, so that machines of any size will do."""
    return [{"GPU": 1.0}] * part.gpus + [{"CPU": 1.0}] * part.cpus


def wanted(part: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of Ray's nodes, by name, as many as hold ``part.gpus`` and ``part.cpus``; what has GPUs first."""
    cpus, gpus, found = float(part.cpus), float(part.gpus), []
    for node in sorted((n for n in nodes if n["Alive"]), key=lambda n: -n["Resources"].get("GPU", 0.0)):
        has = node["Resources"]
        if (gpus > 0 and has.get("GPU")) or (cpus > 0 and has.get("CPU")):
            found.append(node["NodeID"])
            cpus, gpus = cpus - has.get("CPU", 0.0), gpus - has.get("GPU", 0.0)
    return found


class _Stay:
    """A machine on which an actor lives is not idle."""

    def here(self) -> None:
        """Returns once it lives."""


def _stay(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Of no CPU, so that the stages have all of them; not started again elsewhere when its machine is gone.
    remote: Any = ray.remote(num_cpus=0, max_restarts=0)(_Stay)
    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()


def _enough(part: ClusterConfig) -> bool:
    import ray

    total = ray.cluster_resources()
    return total.get("CPU", 0.0) >= part.cpus and total.get("GPU", 0.0) >= part.gpus


def _there() -> str:
    import ray

    total = ray.cluster_resources()
    return f"{total.get('CPU', 0.0):g} CPUs and {total.get('GPU', 0.0):g} GPUs"
