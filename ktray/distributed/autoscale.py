"""Requests for the machines of an autoscaling cluster, before a job plans with the machines that are there.

A cluster that grows on demand may be empty when a job starts, and ktray divides only what it sees. A job that states
its needs therefore creates a placement group of that size, waits until the machines are up, removes the group, and then
plans. ``request_resources`` would not do: it is one request for the whole cluster, which a second job would overwrite
and which outlives a job that dies. A placement group belongs to its job.

The autoscaler would remove the machines while the driver works alone for longer than their idle timeout. An actor on
each machine, which holds nothing and does nothing, keeps the machines until the job ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ktray.errors import ResourceError
from ktray.recipe.cluster import ClusterConfig

logger = logging.getLogger("ktray")

_REPORT_S = 30.0  # seconds between two lines while the job waits


@contextmanager
def gathered(part: ClusterConfig) -> Iterator[None]:
    """Wait until the cluster has ``cluster.cpus`` and ``cluster.gpus``, and keep these machines while the block runs.

    Raises:
        KtrayError: the cluster does not have them after ``cluster.wait_seconds``; the message says what it has.
    """
    import ray

    kept: dict[str, Any] = {}
    try:
        _wait(part, kept)
        yield
    finally:
        for actor in kept.values():
            ray.kill(actor)


def _wait(part: ClusterConfig, kept: dict[str, Any]) -> None:
    from ray.util import placement_group, remove_placement_group

    group: Any = None if _enough(part) else placement_group(bundles(part), strategy="PACK")
    began = reported = time.monotonic()
    try:
        # The test is what the cluster has, not whether the group is placed: other jobs may use a part of it. The group
        # is removed last: the machines have been idle since they came up, and without the group the autoscaler would
        # remove them before the actors run.
        while not (_enough(part) and _keep(part, kept)):
            now = time.monotonic()
            if now - began > part.wait_seconds:
                raise ResourceError(
                    f"The cluster has {_there()} after {part.wait_seconds:g} s, but the job requests {part.cpus} CPUs "
                    f"and {part.gpus} GPUs",
                    "Look for the autoscaler's reason in `ray status` (max_workers, quota, no spot machine available?),"
                    " or set cluster.cpus and cluster.gpus to what the cluster has.",
                )
            if (now - reported >= _REPORT_S or reported == began) and not _enough(part):
                logger.info(f"cluster   waiting for {part.cpus} CPUs and {part.gpus} GPUs; the cluster has {_there()}")
                reported = now
            time.sleep(min(1.0, part.wait_seconds))
    finally:
        if group is not None:
            remove_placement_group(group)


def _keep(part: ClusterConfig, kept: dict[str, Any]) -> bool:
    """Start an actor on each machine that the job needs and that has none. Returns whether all of them run."""
    import ray

    needed = wanted(part, ray.nodes())
    kept.update({node: _stay(node) for node in needed if node not in kept})
    calls = [kept[node].here.remote() for node in needed]
    return not calls or len(ray.wait(calls, num_returns=len(calls), timeout=5.0)[0]) == len(calls)


def bundles(part: ClusterConfig) -> list[dict[str, float]]:
    """The bundles of the placement group: single CPUs and GPUs, so that machines of any size fit."""
    return [{"GPU": 1.0}] * part.gpus + [{"CPU": 1.0}] * part.cpus


def wanted(part: ClusterConfig, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of as many of Ray's nodes as are needed for ``part.gpus`` and ``part.cpus``; nodes with GPUs come first."""
    cpus, gpus, chosen = float(part.cpus), float(part.gpus), []
    for node in sorted((n for n in nodes if n["Alive"]), key=lambda n: -n["Resources"].get("GPU", 0.0)):
        has = node["Resources"]
        if (gpus > 0 and has.get("GPU")) or (cpus > 0 and has.get("CPU")):
            chosen.append(node["NodeID"])
            cpus, gpus = cpus - has.get("CPU", 0.0), gpus - has.get("GPU", 0.0)
    return chosen


class _Stay:
    """An actor that keeps its machine: the autoscaler does not count a machine with an actor as idle."""

    def here(self) -> None:
        """Return once the actor runs."""


def _stay(node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # The actor takes no CPU, so that the stages have all of them. It is not restarted elsewhere when its machine is
    # gone.
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
