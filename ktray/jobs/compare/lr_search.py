"""A small search over the learning rate with the same number of trials for each method, one seed, and validation.

To tune one method and not the others would make the comparison unfair, so all methods try the same factors on their
``train.lr``. The cost of the trials is reported separately from the cost of the methods. Shorter runs and runs with
another transfer set size use the learning rate of the method that they belong to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktray.errors import KtrayError
from ktray.jobs.compare.equal_budget import EqualBudget
from ktray.jobs.compare.methods import Methods, recipe_of
from ktray.recipe.schema import Recipe

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class LrSearchResult:
    """The result of the search: the learning rate of each method, the trials of each method, and their results."""

    lr: dict[str, float]
    trials: dict[str, list[dict[str, float]]]
    results: list[dict[str, Any]]


def search(
    base: Recipe,
    methods: Methods,
    budgets: Mapping[str, EqualBudget],
    run: Callable[[list[tuple[str, Recipe]]], list[dict[str, Any]]],
) -> LrSearchResult:
    """Choose learning rates on validation. Without ``compare.lr_search``, each method keeps its own and nothing is run.

    Args:
        run: maps named recipes to their ``result.json``, in order.

    Raises:
        KtrayError: a factor is not above 0.
    """
    factors: Sequence[float] = base.compare.lr_search
    if any(factor <= 0 for factor in factors):
        raise KtrayError(
            f"compare.lr_search={list(factors)} has a factor that is not above 0", "Write, for example, [0.5, 1, 2]."
        )
    own = {name: budgets[name].lr for name in methods}
    heads = [name for name, method in methods.items() if method.family == name]
    jobs = [(name, factor) for name in heads for factor in factors]
    results = run([(f"{name}, lr x {f:g}", trial(base, methods, budgets, own, name, f)) for name, f in jobs])
    trials: dict[str, list[dict[str, float]]] = {name: [] for name in heads}
    for (name, factor), result in zip(jobs, results, strict=True):
        lr = own[name] * factor
        trials[name].append({"factor": factor, "lr": lr, "validation": float(result["metric"]["val"])})
    chosen = dict(own)
    for name, method in methods.items():
        if trials[method.family]:
            best = max(trials[method.family], key=lambda t: t["validation"])
            chosen[name] = own[name] * best["factor"]
    for name in heads if factors else []:
        tried = ", ".join(f"{t['lr']:g}: {t['validation']:.1%}" for t in trials[name])
        logger.info(f"search    {name}: train.lr={chosen[name]:g} (validation: {tried})")
    return LrSearchResult(chosen, trials, results)


def trial(
    base: Recipe,
    methods: Methods,
    budgets: Mapping[str, EqualBudget],
    own: Mapping[str, float],
    name: str,
    factor: float,
) -> Recipe:
    """Return the recipe of one trial: the method with its whole budget and the first seed."""
    more = {"seed": base.compare.seeds[0], "train__steps": budgets[name].steps, "train__lr": own[name] * factor}
    return recipe_of(base, methods[name].keys, **more)
