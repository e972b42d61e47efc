"""The parts of a recipe that are chosen by name: the section ``objective``, and ``transfer.strategy``.

The section ``objective`` is a union: its keys are those of the registered objective that ``objective.name`` chooses.

A recipe holds the keys of one objective. The rules for keys of the others:

- A key that no objective has is an error.
- ``key=value`` on the command line, or in the keys of a method or a trial, is an error where the chosen objective does
  not have the key.
- In a file such a key is dropped. Earlier versions of ktray wrote the keys of all objectives into each recipe, and a
  file may be used with several objectives, one of which the command line chooses.
- When ``objective.name`` changes on a recipe, the keys that have been set and that the new objective also has keep
  their values; the others are dropped.

``transfer.strategy`` is a name, or ``{name: NAME, KEY: VALUE, ...}`` for a strategy with keys of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from ktray.errors import KtrayError
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.registries import OBJECTIVES, STRATEGIES
from ktray.recipe.strategy import StrategyConfig

DEFAULT_OBJECTIVE = "oriented"
DEFAULT_STRATEGY = "query_balanced"


def objectives() -> list[type[ObjectiveConfig]]:
    """All registered objectives, in order."""
    return sorted((config for _, config in OBJECTIVES), key=lambda c: (c.order, c.objective_name()))


def default_objective() -> ObjectiveConfig:
    return OBJECTIVES.get(DEFAULT_OBJECTIVE)()


def without_transfer_set() -> ObjectiveConfig:
    """The objective that trains the student on the labels alone."""
    return next(config for config in objectives() if not config.has_transfer_set() and not config().traits.frozen)()


def owners(field: str) -> list[str]:
    """Names of the objectives that have the key ``field``, in order."""
    return [config.objective_name() for config in objectives() if field in config.own_fields()]


def fitting(raw: Mapping[str, Any], explicit: Collection[str] = ()) -> dict[str, Any]:
    """The keys of a section that its objective has.

    Args:
        raw: keys and values of the section, without the prefix.
        explicit: keys that must not be dropped.

    Raises:
        KtrayError: the objective is unknown, no objective has one of the keys, or an explicit key belongs to another
            objective.
    """
    name = raw.get("name", DEFAULT_OBJECTIVE)
    if not isinstance(name, str):
        return dict(raw)  # the type is wrong, which validation reports
    config = OBJECTIVES.get(name)
    kept = {}
    for key, value in raw.items():
        if key in config.model_fields:
            kept[key] = value
            continue
        owning = owners(key)
        if not owning:
            raise KtrayError(
                f"No objective has the key 'objective.{key}'",
                f"objective.name={name} has {', '.join(config.own_fields()) or 'no keys of its own'}.",
            )
        if key in explicit:
            raise KtrayError(
                f"objective.{key} belongs to {' and '.join(owning)}; objective.name is {name}",
                f"Remove it, or set objective.name={owning[0]}.",
            )
    return kept


def chosen(raw: Any) -> Any:
    """The section of the objective that a mapping names. Other values are returned unchanged.

    Raises:
        KtrayError: see `fitting`.
        ValidationError: the objective does not accept a value.
    """
    if not isinstance(raw, Mapping):
        return raw
    kept = fitting(raw, raw)
    name = kept.get("name", DEFAULT_OBJECTIVE)
    return OBJECTIVES.get(name if isinstance(name, str) else DEFAULT_OBJECTIVE).model_validate(kept)


def validated(raw: Any) -> Any:
    """`chosen` for a field of a pydantic model."""
    try:
        return chosen(raw)
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def strategies() -> list[type[StrategyConfig]]:
    """All registered strategies, in order."""
    return sorted((config for _, config in STRATEGIES), key=lambda c: (c.order, c.strategy_name()))


def strategy_of(value: Any) -> StrategyConfig:
    """The strategy that a value of ``transfer.strategy`` names.

    Raises:
        KtrayError: there is no such strategy.
        ValueError: the value is neither a name nor a mapping with a name, or the strategy does not accept a key or
            value.
    """
    given = value if isinstance(value, Mapping) else {"name": value}
    name = given.get("name")
    if not isinstance(name, str):
        raise ValueError("must be the name of a strategy, or {name: NAME, ...}")
    try:
        return STRATEGIES.get(name).model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def strategy_value(value: Any) -> str | dict[str, Any]:
    """A value of ``transfer.strategy`` in its form in a recipe: the name, or, for a strategy with keys, all of its
    keys."""
    strategy = strategy_of(value)
    keys = strategy.model_dump(mode="json")
    return keys if len(keys) > 1 else strategy.name


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def objective_rows() -> list[tuple[str, Any, Any, str]]:
    """All keys of all objectives as (key without prefix, default, annotation, description). A key of several objectives
    is listed once, and its description begins with the names of these objectives."""
    rows: list[tuple[str, Any, Any, str]] = []
    configs = objectives()
    for config in configs:
        for field in config.own_fields():
            owning = [other for other in configs if field in other.own_fields()]
            if owning[0] is not config:
                continue
            info = config.model_fields[field]
            names = ", ".join(other.objective_name() for other in owning)
            default = info.get_default(call_default_factory=True)
            rows.append((field, default, info.annotation, f"{names}: {info.description or ''}"))
    return rows
