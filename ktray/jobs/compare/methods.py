"""The methods of a comparison, as recipes."""

from __future__ import annotations

import difflib
import logging
from fractions import Fraction
from typing import Any

from ktray import recipe as recipes
from ktray.data.captions import first_captions
from ktray.errors import KtrayError
from ktray.jobs.compare.random_draws import Method, Methods, with_random_draws
from ktray.recipe.choice import objectives
from ktray.recipe.compare import CompareConfig
from ktray.recipe.registries import OBJECTIVES
from ktray.recipe.schema import Recipe
from ktray.tasks.base import task_kind

logger = logging.getLogger("ktray")


def with_steps(recipe: Recipe) -> Recipe:
    """Return the recipe with the comparison's own number of steps, if ``compare.steps`` is set."""
    return recipes.override(recipe, {"train.steps": recipe.compare.steps}) if recipe.compare.steps else recipe


def list_methods(recipe: Recipe) -> Methods:
    """Return the methods that ``compare`` names, random draws beside their retrieved transfer sets, and their runs with
    fewer images and fewer steps.

    Without names, these are all default methods that the data allows; the others are logged with the reason.

    Raises:
        KtrayError: no default method has the name, the data does not allow it, or a share or a size is out of range.
    """
    requested = recipe.compare.ways
    if isinstance(requested, dict) and requested:
        keys = requested
    else:
        keys, missing = default_methods(recipe)
        for name, reason in missing.items():
            if not requested:
                logger.info(f"method    {name}: omitted, {reason}")
        if isinstance(requested, list) and requested:
            keys = {name: _method_named(name, keys, missing) for name in requested}
    methods = {name: Method(dict(value), name) for name, value in keys.items()}
    for size in recipe.compare.sizes:
        if size < 1:
            raise KtrayError(f"compare.sizes contains {size}", "Give numbers of images, at least 1.")
        methods |= {
            f"{name}, {size:,} images": Method({**value, "transfer.size": size}, name)
            for name, value in keys.items()
            if _retrieves(recipe, value)
        }
    # The default methods already have random draws for the objectives that are compared by their sources.
    methods = with_random_draws(recipe, methods, add=recipe.compare.random and bool(requested or recipe.compare.sizes))
    first = next(iter(keys))
    for budget in recipe.compare.budgets:
        if not 0 < budget < 1:
            raise KtrayError(
                f"compare.budgets contains {budget:g}", "Give shares of the first method's steps, above 0 and below 1."
            )
        methods[f"{first}, {Fraction(budget).limit_denominator(1000)} steps"] = Method(dict(keys[first]), first, budget)
    return methods


def default_methods(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Combine every objective with the transfer sets that suit it.

    Returns:
        The recipe keys of each method, by name, and the reason for each method that the data does not allow, by name.
    """
    built_in = recipe.task.data is None
    gallery = built_in or recipe.gallery.data is not None
    possible = ["retrieved", "generic", "target"] if gallery else ["target"]
    defaults = {name: keys for config in objectives() for name, keys in config.comparisons(possible).items()}
    reasons = unavailable(recipe)
    missing = {name: reasons[k["objective.name"]] for name, k in defaults.items() if k["objective.name"] in reasons}
    return {name: keys for name, keys in defaults.items() if name not in missing}, missing


def unavailable(recipe: Recipe) -> dict[str, str]:
    """Return the objectives that the recipe's data does not allow, each with the reason."""
    reasons: dict[str, str] = {}
    if not task_kind(recipe.task.kind).image_classes:
        lacking = f"task.kind={recipe.task.kind} has no classes of images"
        reasons = {config.objective_name(): lacking for config in objectives() if config().traits.classes}
    part = recipe.student
    if not part.checkpoint and (not part.pretrained or (part.pretrained == "auto" and recipe.task.data is None)):
        frozen = [config.objective_name() for config in objectives() if config().traits.frozen]
        reasons |= dict.fromkeys(frozen, "the student starts from random weights")
    if recipe.task.data is None:
        return reasons
    captions = recipe.gallery.data is not None and bool(first_captions(recipe.gallery.data, recipe.gallery.column))
    for config in objectives():
        name, needs = config.objective_name(), config().traits.targets_needed
        own = "label" in needs and recipe.supervised.data is not None
        if "text" in needs and not captions:
            reasons[name] = "there is no gallery with captions"
        elif "label" in needs and recipe.supervised.data is None:
            reasons[name] = "no labelled generic set is named (supervised.data)"
        elif recipe.gallery.data is None and not own and config.has_transfer_set() and "target" not in config.sources:
            reasons[name] = "there is no gallery"
    return reasons


def recipe_of(base: Recipe, keys: dict[str, Any], **more: Any) -> Recipe:
    """Return the base recipe with a method's keys and ``more`` (``__`` stands for a dot), without its section compare.

    Raises:
        KtrayError: the method sets an unknown key, a key of ``compare``, or an invalid value.
    """
    wanted = {**keys, **{name.replace("__", "."): value for name, value in more.items()}}
    if any(name.split(".")[0] == "compare" for name in wanted):
        raise KtrayError("A method cannot set keys of compare", "Remove these keys from compare.ways.")
    plain = base.model_copy(update={"compare": CompareConfig()})
    fixed: dict[str, Any] = {"baselines.scratch": False, "baselines.start": False, "baselines.scratch_steps": None}
    if base.teach.mode == "auto" and "teach.mode" not in wanted:
        fixed["teach.mode"] = "cached"  # seeds and methods share the stored targets
    return recipes.override(plain, {**wanted, **fixed})


def _method_named(name: str, methods: dict[str, dict[str, Any]], missing: dict[str, str]) -> dict[str, Any]:
    if name in missing:
        raise KtrayError(f"Method '{name}' cannot be run: {missing[name]}", "Remove it from compare.ways.")
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise KtrayError(
            f"No default method is named '{name}'", f"{hint}The default methods are: {', '.join(methods)}."
        )
    return methods[name]


def _retrieves(recipe: Recipe, keys: dict[str, Any]) -> bool:
    objective = OBJECTIVES.get(keys.get("objective.name", recipe.objective.name))
    source = keys.get("transfer.source", recipe.transfer.source)
    return objective.compared_by_size and source in ("retrieved", "auto") and "transfer.size" not in keys
