"""Random draws beside retrieved transfer sets.

A random subset is a strong opponent when a student learns from a teacher (arXiv 2403.07854), so each retrieved transfer
set has a row beside it with as many random images of the same gallery. Methods that differ only in how they retrieve
share one such row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ktray.recipe.objective import NO_SOURCE
from ktray.recipe.registries import OBJECTIVES
from ktray.recipe.schema import Recipe

RETRIEVED, RANDOM = "retrieved", "generic"
# Keys that say how images are retrieved. A random draw does not read them.
RETRIEVING = (
    "transfer.strategy",
    "transfer.queries",
    "transfer.per",
    "transfer.query_crops",
    "transfer.min_similarity",
)


@dataclass(frozen=True)
class Method:
    """One pretraining method.

    Attributes:
        keys: the dotted recipe keys that the method sets, with their values.
        family: if this is a shorter run of another method, or a run with another transfer set size, the name of that
            method; otherwise the method's own name.
        share: share of the steps that the budget allows.
        like: for a random draw, the methods with retrieved transfer sets that it stands beside; it has as many images
            as that of the first. Empty for other methods.
    """

    keys: dict[str, Any]
    family: str
    share: float = 1.0
    like: tuple[str, ...] = ()


Methods = dict[str, Method]


def with_random_draws(recipe: Recipe, methods: Methods, add: bool = True) -> Methods:
    """The methods, in which each random draw beside a retrieved set names that set in ``like``.

    Args:
        add: whether to add the draws that are missing, each after the set that it belongs to.
    """
    found = {_group(method): name for name, method in methods.items() if _source(recipe, method) == RANDOM}
    result: Methods = {}
    likes: dict[str, list[str]] = {}
    for name, method in methods.items():
        result[name] = method
        group = _group(method)
        if _source(recipe, method) != RETRIEVED or method.share != 1:
            continue
        if group not in found and add:
            keys = {key: value for key, value in method.keys.items() if key not in RETRIEVING}
            found[group] = _name(name)
            result[found[group]] = Method({**keys, "transfer.source": RANDOM}, _name(method.family))
        if group in found:
            likes.setdefault(found[group], []).append(name)
    return {name: replace(m, like=tuple(likes[name])) if name in likes else m for name, m in result.items()}


def _name(name: str) -> str:
    return name.replace(RETRIEVED, RANDOM) if RETRIEVED in name else f"{name}, random"


def _group(method: Method) -> str:
    same = {k: v for k, v in method.keys.items() if k != "transfer.source" and k not in RETRIEVING}
    # Floors leave out different numbers of images, so that each has a random draw of its own.
    return json.dumps([same, method.keys.get("transfer.min_similarity")], sort_keys=True, default=str)


def _source(recipe: Recipe, method: Method) -> str:
    """The source of a method; that of ``auto`` as the pipeline will choose it."""
    objective = OBJECTIVES.get(method.keys.get("objective.name", recipe.objective.name))
    if not objective.has_transfer_set():
        return NO_SOURCE
    source = str(method.keys.get("transfer.source", recipe.transfer.source))
    gallery = recipe.task.data is None or recipe.gallery.data is not None or recipe.gallery.index is not None
    return source if source != "auto" else objective.sources[0] if gallery else "target"
