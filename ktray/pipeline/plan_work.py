"""The planned work of a recipe, and how long it takes on a device, by the speeds that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.roofline import CORE_RATE
from ktray.accounting.speeds import BENCH, SHIPPED, STORE, Speeds
from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.pipeline.estimate import CORES, ROOFLINE, Estimate, PlannedDevice, estimate
from ktray.pipeline.graph import stages
from ktray.pipeline.phases import needs_teacher, phases, taught
from ktray.pipeline.plan_stages import Line, traffic_of
from ktray.pipeline.plan_stages import lines as run_lines
from ktray.pipeline.resolve import Resolved
from ktray.pipeline.run import look_at_stages
from ktray.recipe.schema import Recipe
from ktray.stages.base import RunContext
from ktray.stages.speed import StageLook, measured_speeds
from ktray.storage.store import Store

_SOURCES = {
    STORE: "store: measured by runs with this store",
    BENCH: "bench: measured by jobs/bench.py with this store; start-up from ktray's table, which has none for GPUs",
    SHIPPED: "table: measured by ktray's authors on such a device, without reading and start-up",
    ROOFLINE: "roofline: from FLOPs and memory traffic, without reading, decoding and start-up",
    CORES: f"cores: assumed {CORE_RATE / 1e9:g} GFLOP/s for each core, without decoding; start-up from ktray's table",
}


@dataclass(frozen=True)
class PlannedWork:
    """The stages of a recipe, with what their speeds depend on.

    Attributes:
        traffic: by stage, its memory traffic (`ktray.pipeline.plan_stages.TRAFFIC`); empty if no GPU is planned with.
        facts: by stage, what its speed depends on besides the device.
        whole: by stage, whether the store holds it completely.
        unknown: why it is not known which stages the store holds; empty if it is known.
    """

    lines: list[Line]
    traffic: Mapping[str, float]
    facts: Mapping[str, Mapping[str, Any]]
    speeds: Speeds
    whole: Mapping[str, bool] = field(default_factory=dict)
    unknown: str = ""

    @classmethod
    def of(
        cls,
        resolved: Resolved,
        local: Allocation,
        gpus: bool = True,
        lines_of: Callable[[Resolved], list[Line]] = run_lines,
        run_all: Callable[[RunContext], object] = stages,
    ) -> PlannedWork:
        """The work of a run with the recipe, from its data and its store. Nothing runs.

        Args:
            local: the part of the cluster that the run uses.
            gpus: whether GPUs are planned with: their roofline needs the memory traffic, which takes seconds to count.
            lines_of: the planned stages of the job.
            run_all: asks for all stages of the job.
        """
        store = Store(resolved.recipe.store)
        seen, unknown = look(store, resolved, local, run_all)
        facts = {**named_facts(resolved.recipe), **seen.facts}
        traffic = traffic_of(resolved) if gpus else {}
        return cls(lines_of(resolved), traffic, facts, measured_speeds(store), seen.whole, unknown)

    def on(self, device: PlannedDevice) -> dict[str, Estimate]:
        """By stage, its device-seconds on a device, whether or not the store holds it."""
        return {line.stage: self._estimate(line, device) for line in self.lines}

    def _estimate(self, line: Line, device: PlannedDevice) -> Estimate:
        facts = self.facts.get(line.stage)
        speed = self.speeds.known({**facts, "device": device.name}) if facts else None
        return estimate(line, self.traffic.get(line.stage, 0.0), speed, device)


def look(
    store: Store, resolved: Resolved, local: Allocation, work: Callable[[RunContext], object]
) -> tuple[StageLook, str]:
    """What the store holds of the stages of ``work``, and what their speeds depend on; and, where the teacher is not on
    this machine, the reason why that is not known."""
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a plan downloads nothing
    try:
        return look_at_stages(store, resolved, local, work), ""
    except KtrayError as error:
        return StageLook(), f"the stages that it holds are not known: {error.what}"
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def named_facts(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """By stage, the model and its size that the resolved recipe names: enough to find a speed in ktray's table, also
    where the teacher is not on this machine."""
    last = phases(recipe)[-1][1] if recipe.objective.has_transfer_set() else recipe
    mode = recipe.teach.mode if recipe.objective.has_transfer_set() and taught(last) else "cached"
    student = {"model": recipe.student.name, "size": recipe.image_size}
    teacher = {"model": recipe.teacher.name, "size": recipe.teacher.image_size}
    found: dict[str, dict[str, Any]] = {"transfer": {"stage": "transfer", **student, "mode": mode}}
    found["finetune"] = {"stage": "finetune", **student, "mode": mode}
    found |= {name: {"stage": "scratch", **student} for name in ("scratch", "start")}
    if needs_teacher(last) and not recipe.teacher.others:
        found |= {name: {"stage": name, **teacher} for name in ("index", "teach")}
    return found


def explain(where: Iterable[tuple[str, Iterable[str]]]) -> list[str]:
    """Lines that say where the speeds on each device are from, and what each source is.

    Args:
        where: names of devices, each with the sources of its speeds.
    """
    devices = [(name, sorted(set(sources) - {""})) for name, sources in where]
    used = [source for source in _SOURCES if any(source in sources for _, sources in devices)]
    found = [f"speed     on {name}: {', '.join(sources) or 'nothing to run'}" for name, sources in devices]
    return [*found, *(f"          {_SOURCES[source]}" for source in used)]
