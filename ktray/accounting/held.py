"""The devices that an attempt at a stage holds, and their price.

A device is an accelerator, or a machine without any. The price of an accelerator includes its share of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktray.accounting.prices import hourly_price


@dataclass(frozen=True)
class Held:
    """Devices that are held at the same time.

    Attributes:
        devices: number of devices; a share of a GPU is a fraction.
        hourly: price of all of them together in USD per hour; None if the price of one is not known.
    """

    devices: float
    hourly: float | None

    def of(self, devices: float) -> Held:
        """Another number of devices at the mean price of these."""
        if self.hourly is None or not self.devices:
            return Held(devices, self.hourly)
        return Held(devices, self.hourly * devices / self.devices)


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster.

    Attributes:
        node: Ray's id of the node.
        description: the result of `ktray.accounting.device.describe_node` there.
        gpus: number of GPUs that Ray knows there.
    """

    node: str
    description: Mapping[str, Any]
    gpus: float = 0.0

    def hourly(self, prices: Mapping[str, float]) -> float | None:
        """The price of one of its devices in USD per hour: of a GPU if it has any, else of the machine."""
        return hourly_price(self.description, prices)


def workers_hold(machines: Sequence[Machine], gpus: float, prices: Mapping[str, float]) -> Held:
    """What training workers hold.

    Args:
        machines: the machine of each worker.
        gpus: GPUs of each worker; 0: workers hold machines. Workers on one machine then hold one machine.
    """
    if gpus:
        return _sum([(gpus, machine) for machine in machines], prices)
    return _sum([(1.0, machine) for machine in {machine.node: machine for machine in machines}.values()], prices)


def cluster_holds(machines: Sequence[Machine], gpus: float, share: float, prices: Mapping[str, float]) -> Held:
    """What a stage holds that works on all machines of a job: the GPUs of the job, spread evenly over the machines that
    have GPUs, and the machines without GPUs. Without GPUs, it holds the machines.

    Args:
        gpus: number of GPUs that the job uses; 0: none.
        share: the job's share of the cluster's CPUs, at most 1. A job holds at least one machine.
    """
    if not machines:  # they have not joined yet
        return Held(1.0, None)
    there = sum(machine.gpus for machine in machines)
    if not gpus or not there:
        whole = _sum([(1.0, machine) for machine in machines], prices)
        return whole.of(max(1.0, len(machines) * min(1.0, share)))
    on_gpus = [(machine.gpus * min(1.0, gpus / there), machine) for machine in machines if machine.gpus]
    return _sum([*on_gpus, *((min(1.0, share), machine) for machine in machines if not machine.gpus)], prices)


def _sum(parts: Sequence[tuple[float, Machine]], prices: Mapping[str, float]) -> Held:
    hourly = [(count, machine.hourly(prices)) for count, machine in parts]
    known = [count * price for count, price in hourly if price is not None]
    return Held(sum(count for count, _ in parts), sum(known) if len(known) == len(parts) else None)
