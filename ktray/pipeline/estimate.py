"""The time and the money that a stage will take: from measured speeds, else from a roofline; and what it then took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ktray.accounting.attempts import Entry
from ktray.accounting.device import device_name
from ktray.accounting.prices import hourly_price
from ktray.accounting.roofline import cpu_seconds, gpu_seconds
from ktray.accounting.speeds import STORE, Speed, shipped_start
from ktray.distributed.allocation import Allocation
from ktray.distributed.machines import ClusterMachines
from ktray.pipeline.plan_stages import Line
from ktray.recipe.schema import Recipe

ROOFLINE, CORES = "roofline", "cores"


@dataclass(frozen=True)
class PlannedDevice:
    """A device of a plan.

    Attributes:
        name: `ktray.accounting.device.device_name`.
        gpu: whether it is a GPU.
        cores: number of CPU cores of a machine without GPUs.
        hourly: price in USD per hour; None if it is not known.
    """

    name: str
    gpu: bool
    cores: int
    hourly: float | None

    @classmethod
    def of(cls, recipe: Recipe, description: Mapping[str, Any]) -> PlannedDevice:
        gpu = bool(description.get("gpus")) and recipe.cluster.use_gpu is not False
        name = device_name(description, gpu)
        return cls(name, gpu, int(description["cores"]), hourly_price(description, recipe.prices))

    @classmethod
    def named(cls, gpu: str, prices: Mapping[str, float]) -> PlannedDevice:
        """One GPU of a type (`ktray.accounting.roofline.GPUS`), at its list price or at that of the recipe."""
        return cls(gpu, True, 1, hourly_price({"cores": 1, "gpus": [{"name": gpu}]}, prices))

    @classmethod
    def of_cluster(cls, machines: ClusterMachines, allocation: Allocation) -> PlannedDevice:
        """The devices of the connected cluster: the machines that work, whatever machine the job was started on."""
        cores = [int(machine.description["cores"]) for machine in machines.working()]
        mean = max(1, round(sum(cores) / len(cores))) if cores else 1
        return cls(machines.name(), bool(allocation.worker_gpus), mean, machines.some(1).hourly)


@dataclass(frozen=True)
class Estimate:
    """``device_seconds`` of a stage, ``start`` of them before the first image, and where they come from: ``store``,
    ``bench`` or ``table`` (`ktray.accounting.speeds`), ``roofline``, or ``cores``: one speed for all models on CPUs.
    """

    device_seconds: float
    source: str
    start: float = 0.0


def estimate(line: Line, values: float, speed: Speed | None, device: PlannedDevice) -> Estimate:
    """The device-seconds of a stage.

    Only runs with the store have measured the start of a stage. Else it is that of ktray's table, which has none for
    GPUs.

    Args:
        line: the stage in the plan.
        values: its memory traffic (`ktray.pipeline.plan_stages.TRAFFIC`); only GPUs need it.
        speed: the measured speed; None: it was not measured.
    """
    start = 0.0 if device.gpu or not (line.images or line.flops) else shipped_start(line.stage)
    if speed is not None and (line.images or speed.per_flop):
        seconds = speed.device_seconds(line.images, line.flops)
        measured = speed.source == STORE
        return Estimate(seconds + (0.0 if measured else start), speed.source, speed.fixed if measured else start)
    if device.gpu:
        return Estimate(gpu_seconds(line.flops, values, device.name), ROOFLINE)
    return Estimate(start + cpu_seconds(line.flops, device.cores), CORES, start)


def compared(
    lines: Iterable[Line],
    traffic: Mapping[str, float],
    speeds: Mapping[str, Speed | None],
    device: PlannedDevice,
    entries: Iterable[Entry],
) -> dict[str, Any]:
    """The entry ``plan`` of ``result.json``: what was planned for the stages that a run computed, and what they took.

    A stage that was interrupted, or that an earlier run had begun, is left out.

    Args:
        lines: the plan of the run.
        traffic: by stage, its memory traffic.
        speeds: by stage, the speed that was known when it began.
        device: the device that is planned with where no speed is known.
        entries: the attempts of the ledger.
    """
    made: dict[str, list[Entry]] = {}
    for entry in entries:
        made.setdefault(entry.stage, []).append(entry)
    rows: list[dict[str, Any]] = []
    for line in lines:
        own = made.get(line.stage, [])
        if not own or any(e.cached or e.attempt != 1 or e.state != "done" for e in own):
            continue
        taken, wall = sum(e.device_seconds for e in own), sum(e.wall_seconds for e in own)
        money = None if any(e.usd is None for e in own) else sum(e.usd or 0.0 for e in own)
        found = estimate(line, traffic.get(line.stage, 0.0), speeds.get(line.stage), device)
        share = found.device_seconds / taken if taken else 0.0
        rows.append(
            {
                "name": line.stage,
                "source": found.source,
                "planned_seconds": wall * share,
                "planned_usd": None if money is None else money * share,
                "seconds": wall,
                "usd": money,
            }
        )
    return {**_sums(rows), "stages": rows}


def together(plans: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry ``plan`` of ``result.json`` of a job with several runs: the sums of theirs, stage by stage.

    Args:
        plans: the entries ``plan`` of the runs (`compared`).
    """
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for plan in plans:
        for row in plan["stages"]:
            by_stage.setdefault(row["name"], []).append(row)
    rows = [
        {"name": name, "source": ", ".join(sorted({row["source"] for row in own})), **_sums(own)}
        for name, own in by_stage.items()
    ]
    return {**_sums(rows), "stages": rows}


def _sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "planned_seconds": sum(row["planned_seconds"] for row in rows),
        "planned_usd": _sum(row["planned_usd"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "usd": _sum(row["usd"] for row in rows),
    }


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(value or 0.0 for value in known)
