"""The energy that the GPUs of the cluster have used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ktray.accounting.energy import gpu_joules, node_joules
from ktray.distributed.nodes import on_node, on_nodes

_EVERY, _PATIENCE = 15.0, 5.0  # seconds between two requests to the nodes, and for their answer


def cluster_joules(clock: Callable[[], float] = time.monotonic) -> Callable[[], float] | None:
    """A counter of the joules of all nodes with GPUs; None if no node has a counter.

    Nodes are asked every 15 s, so a stage may have up to 15 s of the energy of the one before it; no energy is lost or
    counted twice. A node that does not answer keeps its last value. On one machine, its own counter is read each time.
    """
    if _single():
        return gpu_joules()
    counter = _Counter(clock)
    counter()
    return counter if counter.measured else None


class _Counter:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._asked = clock, -_EVERY
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def measured(self) -> bool:
        return bool(self._first)

    def __call__(self) -> float:
        with self._lock:
            if self._clock() - self._asked >= _EVERY:
                self._asked = self._clock()
                found, _ = on_nodes(_gpu_nodes(), lambda node: on_node(node_joules, node).remote(), _PATIENCE)
                for node, joules in found.items():
                    if joules is not None:
                        self._first.setdefault(node, joules)  # nodes that join later count from then on
                        self._last[node] = joules
            return sum(joules - self._first[node] for node, joules in self._last.items())


def _gpu_nodes() -> list[str]:
    import ray

    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]


def _single() -> bool:
    import ray

    return sum(1 for node in ray.nodes() if node["Alive"]) == 1
