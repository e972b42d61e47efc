"""The ways that are compared, as recipes."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ktray import recipe as recipes
from ktray.data.captions import first_captions
from ktray.errors import KtrayError
from ktray.recipe.choice import objectives
from ktray.recipe.compare import CompareConfig
from ktray.recipe.registries import OBJECTIVES
from ktray.recipe.schema import Recipe

logger = logging.getLogger("ktray")


@dataclass(frozen=True)
class Method:
    """One way of pretraining.

    Attributes:
        keys: what it sets in the recipe, dotted.
        family: name of the way that it is a shorter run of, or one with another transfer set size; its own otherwise.
        share: of the steps that its budget allows.
    """

    keys: dict[str, Any]
    family: str
    share: float = 1.0


Methods = dict[str, Method]


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with the comparison's own number of steps, where it has one."""
    return recipes.override(recipe, {"train.steps": recipe.compare.steps}) if recipe.compare.steps else recipe


def list_methods(recipe: Recipe) -> Methods:
    """The ways that ``compare`` asks for, with their smaller and shorter runs; default ways that the data does not
    allow are left out, with the reason said.

    Raises:
        KtrayError: a name that no default way has, or of one that the data does not allow; a share or a size that
            makes no sense.
    """
    requested = recipe.compare.ways
    if isinstance(requested, dict) and requested:
        keys = requested
    else:
        keys, missing = default_methods(recipe)
        for name, reason in missing.items():
            if not requested:
                logger.info(f"way       {name}: left out, {reason}")
        if isinstance(requested, list) and requested:
            keys = {name: _method_named(name, keys, missing) for name in requested}
    methods = {name: Method(dict(value), name) for name, value in keys.items()}
    for size in recipe.compare.sizes:
        if size < 1:
            raise KtrayError(f"compare.sizes has {size}", "Sizes are numbers of images, from 1.")
        methods |= {
            f"{name}, {size:,} images": Method({**value, "transfer.size": size}, name)
            for name, value in keys.items()
            if _retrieves(recipe, value)
        }
    first = next(iter(keys))
    for budget in recipe.compare.budgets:
        if not 0 < budget < 1:
            raise KtrayError(f"compare.budgets has {budget:g}", "They are shares of the first way's steps, below 1.")
        methods[f"{first}, {Fraction(budget).limit_denominator(1000)} steps"] = Method(dict(keys[first]), first, budget)
    return methods


def default_methods(recipe: Recipe) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every objective on the transfer sets that suit it: the keys of each way, and the reason for those left out."""
    built_in = recipe.task.data is None
    gallery = built_in or recipe.gallery.data is not None
    possible = ["retrieved", "generic", "target"] if gallery else ["target"]
    defaults = {name: keys for config in objectives() for name, keys in config.comparisons(possible).items()}
    reasons = unavailable(recipe)
    missing = {name: reasons[k["objective.name"]] for name, k in defaults.items() if k["objective.name"] in reasons}
    return {name: keys for name, keys in defaults.items() if name not in missing}, missing


def unavailable(recipe: Recipe) -> dict[str, str]:
    """Objectives that the recipe's data does not allow, with the reason."""
    if recipe.task.data is None:
        return {}
    reasons = {}
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
    """The base recipe with a way's keys and ``more`` (dots written as ``__``), without the comparison's own part.

    Raises:
        KtrayError: a way names a key that the recipe does not know, or a value that it does not take.
    """
    wanted = {**keys, **{name.replace("__", "."): value for name, value in more.items()}}
    if any(name.split(".")[0] == "compare" for name in wanted):
        raise KtrayError("A way cannot set keys of compare", "Remove it from compare.ways.")
    plain = base.model_copy(update={"compare": CompareConfig()})
    fixed: dict[str, Any] = {"baselines.scratch": False, "baselines.scratch_steps": None}
    if base.teach.mode == "auto" and "teach.mode" not in wanted:
        fixed["teach.mode"] = "cached"  # seeds and ways share what is stored
    return recipes.override(plain, {**wanted, **fixed})


def _method_named(name: str, methods: dict[str, dict[str, Any]], missing: dict[str, str]) -> dict[str, Any]:
    if name in missing:
        raise KtrayError(f"Way '{name}' cannot be run: {missing[name]}", "Leave it out of compare.ways.")
    if name not in methods:
        near = difflib.get_close_matches(name, methods, n=1, cutoff=0.3)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise KtrayError(f"No default way is named '{name}'", f"{hint}There are: {', '.join(methods)}.")
    return methods[name]


def _retrieves(recipe: Recipe, keys: dict[str, Any]) -> bool:
    objective = OBJECTIVES.get(keys.get("objective.name", recipe.objective.name))
    source = keys.get("transfer.source", recipe.transfer.source)
    return objective.compared_by_size and source in ("retrieved", "auto") and "transfer.size" not in keys
