"""How many pretraining steps each method gets, so that all methods have the same budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from ktray.accounting.prices import price_table
from ktray.distributed.allocation import Allocation
from ktray.errors import KtrayError
from ktray.jobs.compare.calibration import MeasuredSpeed
from ktray.jobs.compare.methods import Methods, list_methods, recipe_of, with_steps
from ktray.pipeline.plan import RATES, this_machine
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.resolve import resolve
from ktray.recipe.schema import Recipe
from ktray.reporting.log import muted

logger = logging.getLogger("ktray")

DEVICES = ("A100", "H100", "L4")


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


def show(recipe: Recipe) -> None:
    """Log the plan of a comparison: what each method will cost. Shared and reused stages count for every method."""
    recipe = with_steps(recipe)
    part = recipe.compare
    methods = list_methods(recipe)
    planned = budgets(recipe, methods, this_machine(recipe))
    if part.equal == "device_seconds":
        logger.info("the steps of all methods except the first will be computed from measured speeds")
    tried = sum(planned[name].flops for name, method in methods.items() if method.family == name)
    total = len(part.seeds) * sum(b.flops for b in planned.values()) + len(part.lr_search) * tried
    prices = price_table()["accelerators"]
    head = "".join(f"{f'{name} hours':>14}{'USD':>10}" for name in DEVICES)
    logger.info("")
    logger.info(f"{'one run of':<34}{'steps':>9}{'FLOPs':>12}{head}")
    for name, budget in planned.items():
        logger.info(_planned(name, f"{budget.steps:,}", budget.flops, prices))
    trials = f" and {len(part.lr_search)} learning rates" if part.lr_search else ""
    logger.info(_planned(f"all, {len(part.seeds)} seeds{trials}", "", total, prices))
    logger.info("")
    logger.info(
        "The plan assumes 35% of the devices' bf16 peak. It omits decoding, start-up and savings by shared stages."
    )


def _planned(name: str, steps: str, flops: float, prices: dict[str, float]) -> str:
    hours = [flops / RATES[device] / 3600 for device in DEVICES]
    shown = "".join(f"{h:>14.3g}{h * prices[device]:>10.3g}" for h, device in zip(hours, DEVICES, strict=True))
    return f"{name:<34}{steps:>9}{flops:>12.3g}{shown}"


def _over_budget(name: str, cost: str, budget: str) -> KtrayError:
    return KtrayError(
        f"Method '{name}' costs {cost} with a single step, more than the budget of {budget}",
        "Raise train.steps, or remove the method from compare.ways.",
    )
