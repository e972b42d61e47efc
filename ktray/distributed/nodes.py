"""Tasks on particular nodes of the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

SECONDS = 180.0  # time limit for a node to start a process and import torch


def on_node(work: Callable[..., Any], node: str, gpus: float = 0.0) -> Any:
    """``work`` as a remote function that runs on a node, also if the node has no CPU for work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_retries": 0}
    return ray.remote(**options)(work).options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def on_nodes(
    nodes: Iterable[str], start: Callable[[str], Any], seconds: float = SECONDS
) -> tuple[dict[str, Any], dict[str, str]]:
    """Start a task on each node. Returns the results by node, and for the nodes without a result the reason."""
    import ray

    refs = {node: start(node) for node in nodes}
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=seconds)
    results: dict[str, Any] = {}
    lost: dict[str, str] = {}
    for node, ref in refs.items():
        try:
            results[node] = ray.get(ref, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            lost[node] = f"no answer within {seconds:g} s"
        except Exception as error:  # a node that died, a process that cannot import ktray
            lost[node] = " ".join(str(error).split())[-200:] or type(error).__name__
    return results, lost
