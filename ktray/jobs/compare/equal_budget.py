"""How many pretraining steps each method gets, so that all methods have the same budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ktray.accounting.device import describe_device
from ktray.data.labelled.memory import read_once
from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.jobs.compare.calibration import MeasuredSpeed
from ktray.jobs.compare.methods import Methods, list_methods, recipe_of, with_steps
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.plan import this_machine
from ktray.pipeline.plan_gallery import missing_images
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.plan_work import PlannedWork, explain
from ktray.pipeline.resolve import resolve
from ktray.recipe.schema import Recipe
from ktray.reporting.log import muted

logger = logging.getLogger("ktray")

# GPUs whose hours and prices a plan shows beside those of this machine.
GPUS = ("H200", "H100", "A100", "L4")


@dataclass(frozen=True)
class EqualBudget:
    """The budget of one method.

    Attributes:
        steps: steps of pretraining.
        flops: FLOPs that the plan expects for all stages of the method.
        lr: learning rate of pretraining in the method's recipe, resolved.
    """

    steps: int
    flops: float
    lr: float


class _Cost:
    """The planned FLOPs of a method. They are linear in its steps, so two plans suffice for any number of steps."""

    def __init__(self, recipe: Recipe, plan: Allocation) -> None:
        with muted():
            resolved = resolve(recipe, plan)
        self.steps, self.lr = int(resolved.recipe.train.steps or 1), float(resolved.recipe.train.lr or 0)
        totals = []
        for steps in (self.steps, 2 * self.steps):
            resolved.recipe.train.steps = steps
            totals.append(sum(line.flops for line in lines(resolved)))
        self._step = (totals[1] - totals[0]) / self.steps
        self._fixed = totals[0] - self._step * self.steps

    def __call__(self, steps: int) -> float:
        return self._fixed + self._step * steps

    def within(self, budget: float) -> int:
        """Return the largest number of steps that costs at most ``budget``; 0 if one step costs more. For a method that
        takes no steps, it is the number in the recipe."""
        if not self._step:
            return self.steps if self._fixed <= budget else 0
        # The costs are sums of floats, so a budget that is exceeded by a billionth still counts as kept.
        return max(0, int((budget - self._fixed) / self._step + 1e-9))


def budgets(
    base: Recipe,
    methods: Methods,
    plan: Allocation,
    measure: Callable[[Methods, int], dict[str, MeasuredSpeed]] | None = None,
) -> dict[str, EqualBudget]:
    """Return the budget of each method. The steps of the first method determine the budget of all.

    ``compare.equal=steps``: all methods have the same pretraining steps. ``own``: each has the steps of its own recipe.
    ``flops``: all stages of each method together cost as much as those of the first method; a method whose other stages
    cost more than those of the first takes fewer steps, and a method without teacher and gallery takes more.
    ``device_seconds``: all stages of each method take the same device time, by the speeds that ``measure`` returns for
    this cluster; without ``measure`` (in a plan) all methods have the steps of the first.

    Args:
        measure: maps the methods and the steps of the first to the speed of each method.

    Raises:
        KtrayError: one step of a method, with its other stages, costs more than the budget.
    """
    with read_once():  # not around ``measure``, which runs
        costs = {name: _Cost(recipe_of(base, method.keys), plan) for name, method in methods.items()}
    first = next(iter(methods))
    equal, most = base.compare.equal, costs[first].steps
    steps = {name: cost.steps if equal == "own" else most for name, cost in costs.items()}
    if equal == "flops":
        total = costs[first](most)
        for name, cost in costs.items():
            steps[name] = cost.within(total)
            if not steps[name]:
                raise _over_budget(name, f"{cost(1):.3g} FLOP", f"{total:.3g}")
    elif equal == "device_seconds" and measure is not None:
        speeds = measure(methods, most)
        seconds = speeds[first].total(most)
        for name, speed in speeds.items():
            steps[name] = most if name == first else speed.within(seconds)
            if not steps[name]:
                raise _over_budget(name, f"{speed.total(1):.0f} device-seconds", f"{seconds:.0f}")
    result = {}
    for name, method in methods.items():
        taken = max(1, round(method.share * steps[name]))
        result[name] = EqualBudget(taken, costs[name](taken), costs[name].lr)
        logger.info(f"method    {name}: {taken:,} steps, {result[name].flops:.3g} FLOP planned")
    return result


@read_once()
def show(recipe: Recipe) -> None:
    """Log the plan of a comparison: what each method will cost. Shared and reused stages count for every method."""
    recipe = with_steps(recipe)
    part, local = recipe.compare, this_machine(recipe)
    methods = list_methods(recipe)
    planned = budgets(recipe, methods, local)
    if part.equal == "device_seconds":
        logger.info("the steps of all methods except the first will be computed from measured speeds")
    devices = planned_devices(recipe)
    hours: dict[str, list[float]] = {}
    sources: list[set[str]] = [set() for _ in devices]
    missing: dict[str, None] = {}
    for name, method in methods.items():
        with muted():
            resolved = resolve(recipe_of(recipe, method.keys, train__steps=planned[name].steps), local)
        missing[missing_images(resolved)] = None
        work = PlannedWork.of(resolved, local)
        found = [work.on(device) for device in devices]
        hours[name] = [sum(stage.device_seconds for stage in stages.values()) / 3600 for stages in found]
        for own, stages in zip(sources, found, strict=True):
            own |= {stage.source for stage in stages.values() if stage.device_seconds}
    for text in filter(None, missing):
        logger.warning(f"WARNING: {text}")
    head = "".join(f"{f'{device.name[:12]} hours':>20}{'USD':>10}" for device in devices)
    logger.info("")
    logger.info(f"{'one run of':<34}{'steps':>9}{'FLOPs':>12}{head}")
    for name, budget in planned.items():
        logger.info(_planned(name, f"{budget.steps:,}", budget.flops, hours[name], devices))
    times = {name: len(part.seeds) + len(part.lr_search) * (methods[name].family == name) for name in methods}
    total = sum(times[name] * planned[name].flops for name in methods)
    total_hours = [sum(times[name] * hours[name][i] for name in methods) for i in range(len(devices))]
    trials = f" and {len(part.lr_search)} learning rates" if part.lr_search else ""
    logger.info(_planned(f"all, {len(part.seeds)} seeds{trials}", "", total, total_hours, devices))
    logger.info("")
    for line in explain(zip((device.name for device in devices), sources, strict=True)):
        logger.info(line)
    logger.info("Hours are those of one device. Savings by shared stages are not included.")


def planned_devices(recipe: Recipe) -> list[PlannedDevice]:
    """The devices of a plan: that of this machine first, then common GPUs."""
    here = PlannedDevice.of(recipe, describe_device())
    return [here, *(PlannedDevice.named(gpu, recipe.prices) for gpu in GPUS if gpu not in here.name)]


def _planned(name: str, steps: str, flops: float, hours: Sequence[float], devices: Sequence[PlannedDevice]) -> str:
    shown = ""
    for spent, device in zip(hours, devices, strict=True):
        usd = "?" if device.hourly is None else f"{spent * device.hourly:.3g}"
        shown += f"{spent:>20.3g}{usd:>10}"
    return f"{name:<34}{steps:>9}{flops:>12.3g}{shown}"


def _over_budget(name: str, cost: str, budget: str) -> KtrayError:
    return KtrayError(
        f"Method '{name}' costs {cost} with a single step, more than the budget of {budget}",
        "Raise train.steps, or remove the method from compare.ways.",
    )
