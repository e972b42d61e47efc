"""The ways that are compared, as recipes, and the steps that give each the same budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.plan import lines, this_machine
from ktray.recipe import Recipe
from ktray.resolve import resolve
from ktray.resources import Plan

Ways = dict[str, dict[str, Any]]


def default_ways(recipe: Recipe) -> Ways:
    """Both objectives on each transfer set that the task can have, and no pretraining at all."""
    gallery = recipe.gallery.data is not None or recipe.task.data is None
    sources = ["retrieved", "generic", "target"] if gallery else ["target"]
    found: Ways = {
        f"{objective}, {source}": {"objective.name": objective, "transfer.source": source}
        for objective in ("oriented", "agnostic")
        for source in sources
    }
    return {**found, "scratch": {"objective.name": "scratch"}}


def recipe_of(base: Recipe, way: dict[str, Any], **keys: Any) -> Recipe:
    """The base recipe with a way's keys and ``keys`` (dots written as ``__``), without the comparison's own part.

    Raises:
        KtrayError: a way names a key that the recipe does not know, or a value that it does not take.
    """
    wanted = {**way, **{name.replace("__", "."): value for name, value in keys.items()}}
    if any(name.split(".")[0] == "compare" for name in wanted):
        raise KtrayError("A way cannot set keys of compare", "Remove it from compare.ways.")
    plain = base.model_copy(update={"compare": recipes.Compare()})
    return recipes.override(plain, {**wanted, "baselines.scratch": False, "baselines.scratch_steps": None})


def budget_steps(
    base: Recipe, ways: Ways, equal: str, plan: Plan, say: Callable[[str], None]
) -> dict[str, tuple[int, float]]:
    """For each way its pretraining steps and the FLOPs that the plan expects of all its stages.

    ``steps``: all take the first way's. ``flops``: all stages of a way together cost what those of the first one do;
    a way whose other stages are dearer takes fewer steps, one without teacher and gallery takes more.

    Raises:
        KtrayError: a way's other stages alone cost more than the budget.
    """
    costs = {}
    for name, way in ways.items():
        recipe = recipe_of(base, way)
        found = resolve(recipe, plan, lambda text: None)
        steps = int(found.recipe.train.steps or 1)

        def total(count: int, found: Any = found) -> float:
            found.recipe.train.steps = count
            return sum(line.flops for line in lines(found))

        one = total(1)
        costs[name] = (steps, one, total(2) - one)
    first_steps, first_one, first_slope = next(iter(costs.values()))
    budget = first_one + first_slope * (first_steps - 1)
    result = {}
    for name, (_, one, slope) in costs.items():
        steps = first_steps
        if equal == "flops":
            steps = 1 + int((budget - one) / slope)
            if steps < 1:
                raise KtrayError(
                    f"Way '{name}' costs {one:.3g} FLOP before its first step, more than the budget of {budget:.3g}",
                    "Raise train.steps, or leave the way out of compare.ways.",
                )
        result[name] = (steps, one + slope * (steps - 1))
        say(f"way       {name}: {steps:,} steps, {result[name][1]:.3g} FLOP planned")
    return result


def show(recipe: Recipe, say: Callable[[str], None]) -> None:
    """``--plan`` of a comparison: what each way will cost, stages that are shared or reused counted each time."""
    plan = this_machine(recipe)
    ways = recipe.compare.ways or default_ways(recipe)
    planned = budget_steps(recipe, ways, recipe.compare.equal, plan, say)
    total = sum(cost for _, cost in planned.values()) * len(recipe.compare.seeds)
    say(f"total     {total:.3g} FLOP for {len(recipe.compare.seeds)} seeds, without what sharing stages saves")
