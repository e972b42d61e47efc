"""The machines of the cluster with their prices: what a stage holds, and where."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ktray.accounting.device import describe_device, describe_node, device_name
from ktray.accounting.held import Held, Machine, cluster_holds, workers_hold
from ktray.distributed.allocation import Allocation
from ktray.distributed.nodes import on_node, on_nodes

logger = logging.getLogger("ktray")


class ClusterMachines:
    """The machines of the connected cluster. Each machine is asked once for its type; machines may join later.

    Args:
        allocation: the part of the cluster that the job uses.
        prices: the recipe's ``prices``.
    """

    def __init__(self, allocation: Allocation, prices: Mapping[str, float]) -> None:
        self.allocation, self.prices = allocation, prices
        self._known: dict[str, Machine] = {}
        self._lock = threading.Lock()

    def working(self) -> list[Machine]:
        """The machines that are alive and have CPUs for work."""
        import ray

        return self._of([n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")])

    def types(self) -> list[dict[str, Any]]:
        """All machines that were asked, by type: ``count``, ``instance``, ``market``, ``accelerator`` and
        ``usd_per_hour`` of one device."""
        found: Counter[tuple[Any, ...]] = Counter()
        for machine in self._known.values():
            gpus = machine.description["gpus"]
            named = (machine.description.get(name) for name in ("instance", "market"))
            found[(*named, gpus[0]["name"] if gpus else None, machine.hourly(self.prices))] += 1
        names = ("instance", "market", "accelerator", "usd_per_hour")
        return [{"count": count, **dict(zip(names, about, strict=True))} for about, count in found.items()]

    def name(self) -> str:
        """The names of the devices of the machines that work."""
        gpu = bool(self.allocation.worker_gpus)
        machines = self.working()
        with_gpus = [machine for machine in machines if machine.gpus] if gpu else machines
        return " + ".join(sorted({device_name(m.description, gpu) for m in with_gpus or machines}))

    def cluster(self) -> Held:
        """What a stage holds that works on the whole part of the job."""
        import ray

        cpus = float(ray.cluster_resources().get("CPU", 0.0))
        part = self.allocation
        gpus = part.actors * part.actor_gpus
        return cluster_holds(self.working(), gpus, part.total_cpus / cpus if cpus else 1.0, self.prices)

    def some(self, devices: float) -> Held:
        """A number of devices whose place is not known yet, at the mean price."""
        return self.cluster().of(devices)

    def expected(self, devices: str) -> Held:
        """What a stage holds at its start, until its workers say where they are.

        Args:
            devices: `ktray.stages.inputs.StageInputs.devices`.
        """
        whole, part = self.cluster(), self.allocation
        if devices == "cluster":
            return whole
        count = (part.worker_gpus or 1.0) * (part.least if devices == "workers" else 1)
        return whole.of(min(count, whole.devices))

    def workers(self, nodes: Sequence[str]) -> Held:
        """What training workers hold, by the node of each."""
        return workers_hold(self._of(nodes), self.allocation.worker_gpus, self.prices)

    def _of(self, nodes: Sequence[str]) -> list[Machine]:
        with self._lock:
            new = [node for node in dict.fromkeys(nodes) if node not in self._known]
            if new:
                self._known |= _described(new)
            return [self._known[node] for node in nodes]


def _described(nodes: Sequence[str]) -> dict[str, Machine]:
    import ray

    gpus = {n["NodeID"]: float(n["Resources"].get("GPU", 0.0)) for n in ray.nodes() if n["Alive"]}
    if len(gpus) == 1:  # this machine
        return {node: Machine(node, describe_device(), gpus.get(node, 0.0)) for node in nodes}
    found, lost = on_nodes(nodes, lambda node: on_node(describe_node, node).remote(gpus.get(node, 0.0)))
    if lost:
        why = next(iter(lost.values()))
        logger.warning(
            f"WARNING: {len(lost)} of {len(nodes)} machines did not say what they are ({why}); their cost is that of a "
            "machine like this one"
        )
    return {node: Machine(node, found.get(node) or describe_device(), gpus.get(node, 0.0)) for node in nodes}
