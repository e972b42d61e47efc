"""The search space: the values that recipe keys may take, for some keys only if another key has a certain value.

A space is read in order, as Optuna's define-by-run interface requires: a condition refers to keys that come before it,
or to the recipe. The choices of a trial are stored as Optuna's parameters (a choice that is not a plain value as JSON
text), and are converted to recipe keys here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ktray import recipe as recipes
from ktray.errors import KtrayError
from ktray.recipe.choice import owners
from ktray.recipe.schema import Recipe
from ktray.recipe.section import Section
from ktray.reporting.result.tune import Plain
from ktray.reporting.units import flatten

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

GRID_MOST = 10_000  # largest number of points of a grid
FORMS = "Write [a, b], {low: 1, high: 9}, or {choices: [a, b], when: {other.key: [x]}}."
NAME = "objective.name"
NOT_SEARCHED = ("store", "seed", "task", "cluster", "mlflow", "compare", "bench", "tune", "budget", "prices")


@dataclass(frozen=True)
class Spec:
    """The values that one key, or one section of several keys, may take.

    Attributes:
        key: the dotted key, or the name of a section.
        choices: the values, or, for a section, mappings of its keys; empty for a range.
        low, high: bounds of a range, inclusive.
        log: whether the range is logarithmic.
        step: distance of the values of a range; None: any value in the range.
        whole: whether the range consists of integers.
        when: other keys, each with the values under which this key applies.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    @property
    def labels(self) -> list[Plain]:
        """The choices in Optuna's form."""
        return [label(choice) for choice in self.choices]

    @property
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.labels)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def expand(self, value: Plain) -> dict[str, Any]:
        """Return the recipe keys of a value from Optuna."""
        if not self.choices:
            return {self.key: int(value) if self.whole else float(value)}  # type: ignore[arg-type]
        return self.keys_of(next(c for c in self.choices if label(c) == value))

    def keys_of(self, choice: Any) -> dict[str, Any]:
        if _section(self.key) is None:
            return {self.key: choice}
        return {f"{self.key}.{name}": value for name, value in choice.items()}

    def points(self) -> list[Plain]:
        """Return every value, for a grid.

        Raises:
            KtrayError: the spec is a range without a step.
        """
        if self.choices:
            return self.labels
        if self.step is None and not (self.whole and not self.log):
            raise KtrayError(
                f"tune.space: '{self.key}' is a range without a step", "Set step or choices, which a grid needs."
            )
        step = self.step or 1
        count = int((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + i * step for i in range(count)]
        return [int(v) for v in values] if self.whole else list(values)


@dataclass(frozen=True)
class Space:
    """Specs in order, and the recipe that they change."""

    base: Recipe
    specs: tuple[Spec, ...]

    def draw(self, ask: Callable[[Spec], Plain]) -> dict[str, Plain]:
        """Draw one point: ``ask`` is called for each spec that applies, given the values drawn before."""
        drawn: dict[str, Plain] = {}
        keys: dict[str, Any] = {}
        for spec in self.specs:
            if self._counts(spec, keys):
                drawn[spec.key] = ask(spec)
                keys |= spec.expand(drawn[spec.key])
        return drawn

    def define(self, trial: Any) -> None:
        """Define the space for `ray.tune.search.optuna.OptunaSearch`, which records the suggestions of ``trial`` (an
        Optuna trial)."""

        def ask(spec: Spec) -> Plain:
            if spec.choices:
                chosen: Plain = trial.suggest_categorical(spec.key, spec.labels)
                return chosen
            if spec.whole:
                low, high, step = int(spec.low), int(spec.high), int(spec.step or 1)
                return int(trial.suggest_int(spec.key, low, high, step=step, log=spec.log))
            return float(trial.suggest_float(spec.key, spec.low, spec.high, step=spec.step, log=spec.log))

        self.draw(ask)

    def keys(self, params: Mapping[str, Plain]) -> dict[str, Any]:
        """Return the recipe keys of a point."""
        specs = {spec.key: spec for spec in self.specs}
        return {name: value for key, drawn in params.items() for name, value in specs[key].expand(drawn).items()}

    def distributions(self, params: Mapping[str, Plain]) -> dict[str, BaseDistribution]:
        specs = {spec.key: spec for spec in self.specs}
        return {key: specs[key].distribution for key in params}

    def locate(self, values: Mapping[str, Any]) -> dict[str, Plain] | None:
        """Return the point of a recipe with the keys ``values`` (see `values_of`); None if it is outside the space."""

        def ask(spec: Spec) -> Plain:
            if spec.choices:
                fits = [c for c in spec.choices if all(values.get(k) == v for k, v in spec.keys_of(c).items())]
                if not fits:
                    raise LookupError(spec.key)
                return label(fits[0])
            value = values.get(spec.key)
            if not isinstance(value, int | float) or not spec.low <= value <= spec.high:
                raise LookupError(spec.key)
            if (
                spec.step is not None
                and abs((value - spec.low) / spec.step - round((value - spec.low) / spec.step)) > 1e-6
            ):
                raise LookupError(spec.key)
            return value

        try:
            return self.draw(ask)
        except LookupError:
            return None

    def grid(self) -> list[dict[str, Plain]]:
        """Return every point once.

        Raises:
            KtrayError: the space has a range without a step, or more than `GRID_MOST` points.
        """
        points = list(itertools.islice(self._grid({}, {}, 0), GRID_MOST + 1))
        if len(points) > GRID_MOST:
            raise KtrayError(
                f"The grid of tune.space has more than {GRID_MOST:,} points",
                "Set tune.search=random, or fewer choices.",
            )
        return points

    def _grid(self, drawn: dict[str, Plain], keys: dict[str, Any], at: int) -> Iterator[dict[str, Plain]]:
        if at == len(self.specs):
            yield dict(drawn)
            return
        spec = self.specs[at]
        if not self._counts(spec, keys):
            yield from self._grid(drawn, keys, at + 1)
            return
        for value in spec.points():
            yield from self._grid({**drawn, spec.key: value}, {**keys, **spec.expand(value)}, at + 1)

    def _counts(self, spec: Spec, keys: Mapping[str, Any]) -> bool:
        if not spec.when:
            return True
        base_values = values_of(self.base)
        return all(keys.get(key, base_values.get(key)) in values for key, values in spec.when)


def label(choice: Any) -> Plain:
    """Return a choice in Optuna's form: a plain value unchanged, another value as JSON text."""
    if choice is None or isinstance(choice, str | int | float | bool):
        return choice
    return json.dumps(choice, sort_keys=True)


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return every dotted key of the recipe with its value."""
    known = {key for key, *_ in recipes.schema()}
    return flatten(recipe.model_dump(mode="json"), keep=lambda name, value: name in known)


def read(base: Recipe, description: Mapping[str, Any]) -> Space:
    """Return the space that a mapping such as ``tune.space`` describes.

    A key that only some objectives have applies only under these, also without an explicit condition.

    Raises:
        KtrayError: a key is unknown or cannot be searched, a value is invalid for its key, a form is invalid, or a
            condition refers to a later key.
    """
    specs: list[Spec] = []
    later = list(description)
    for key, value in description.items():
        spec = _under_its_objectives(_spec(key, value), base, description)
        for name, values in spec.when:
            _check_condition(key, name, values, later)
        later.remove(key)
        specs.append(spec)
        for keys in map(spec.keys_of, spec.choices) if spec.choices else ({key: spec.low}, {key: spec.high}):
            try:
                for under in _chosen_by(spec):
                    recipes.override(base, {**under, **{k: int(v) if spec.whole else v for k, v in keys.items()}})
            except KtrayError as error:
                raise KtrayError(f"tune.space: {error.what}", error.remedy) from error
    names = [name for spec in specs for name in _names(spec)]
    if len(set(names)) < len(names):
        raise KtrayError(f"tune.space has '{max(names, key=names.count)}' twice", "Remove one of the two.")
    return Space(base, tuple(specs))


def _under_its_objectives(spec: Spec, base: Recipe, description: Mapping[str, Any]) -> Spec:
    """Add to the spec of an objective's key the condition that the objective has the key."""
    section, _, name = spec.key.partition(".")
    if section != "objective" or name in ("", "name") or any(key == NAME for key, _ in spec.when):
        return spec
    having = owners(name)
    possible = {base.objective.name}
    if NAME in description:
        possible = set(_spec(NAME, description[NAME]).choices)
    elif section in description:
        possible = {choice.get("name", base.objective.name) for choice in _spec(section, description[section]).choices}
    return spec if possible <= set(having) else replace(spec, when=(*spec.when, (NAME, tuple(having))))


def _chosen_by(spec: Spec) -> list[dict[str, Any]]:
    """Return recipe keys that choose the objectives under which a key applies, since the key exists only for these."""
    if spec.key.startswith("objective."):
        for key, values in spec.when:
            if key == NAME:
                return [{NAME: value} for value in values]
    return [{}]


def _names(spec: Spec) -> set[str]:
    return {name for choice in spec.choices for name in spec.keys_of(choice)} or {spec.key}


def _check_condition(key: str, name: str, values: tuple[Any, ...], later: list[str]) -> None:
    if name not in {row[0] for row in recipes.schema()}:
        recipes.override(Recipe(), {name: values[0]})  # raises an error that names the nearest key
    if any(name == other or name.startswith(f"{other}.") for other in later):
        raise KtrayError(
            f"tune.space: the condition of '{key}' refers to '{name}', which comes after it",
            f"Put '{name}' before '{key}'.",
        )


def _spec(key: str, value: Any) -> Spec:
    if key.split(".")[0] in NOT_SEARCHED:
        raise KtrayError(
            f"tune.space cannot change '{key}'",
            "Remove it: this key defines the search or where it runs, not a method.",
        )
    if key == "train.epochs":
        raise KtrayError("tune.space cannot change 'train.epochs'", "Search train.steps instead, which overrides it.")
    section = _section(key)
    if section is None:
        _type_of(key)
    if isinstance(value, list):
        return _choices(key, value, ())
    if not isinstance(value, dict):
        raise KtrayError(f"tune.space: '{key}' is {value!r}", FORMS)
    rest = dict(value)
    when = _when(key, rest.pop("when", {}))
    if "choices" in rest:
        choices = rest.pop("choices")
        if rest or not isinstance(choices, list):
            raise KtrayError(f"tune.space: '{key}' is {value!r}", FORMS)
        return _choices(key, choices, when)
    unknown = set(rest) - {"low", "high", "log", "step"}
    if unknown or "low" not in rest or "high" not in rest or section is not None:
        raise KtrayError(f"tune.space: '{key}' is {value!r}", FORMS)
    return _range(key, rest, when)


def _choices(key: str, choices: list[Any], when: tuple[tuple[str, tuple[Any, ...]], ...]) -> Spec:
    labels = [json.dumps(label(c)) for c in choices]
    if not choices or len(set(labels)) < len(labels):
        raise KtrayError(f"tune.space: '{key}' has no choices, or has one of them twice", FORMS)
    if _section(key) is not None and not all(isinstance(c, dict) and c for c in choices):
        raise KtrayError(
            f"tune.space: '{key}' is a section, but not all of its choices are mappings of its keys",
            f"Write {key}: [{{name: a}}, {{name: b}}], with keys of the section.",
        )
    return Spec(key, tuple(choices), when=when)


def _range(key: str, limits: Mapping[str, Any], when: tuple[tuple[str, tuple[Any, ...]], ...]) -> Spec:
    low, high, step, log = limits["low"], limits["high"], limits.get("step"), limits.get("log", False)
    numbers = [v for v in (low, high, step) if v is not None]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers) or not isinstance(log, bool):
        raise KtrayError(
            f"tune.space: '{key}' is {dict(limits)!r}",
            "Write numbers for low, high and step, and true or false for log.",
        )
    if not low < high or (step is not None and (step <= 0 or log)) or (log and low <= 0):
        raise KtrayError(
            f"tune.space: '{key}' has an invalid range from {low} to {high}",
            "Set low below high; with log, set low above 0 and no step; set step above 0.",
        )
    kind = _type_of(key)
    whole = "int" in kind.lower() and "float" not in kind
    if whole and not all(float(v).is_integer() for v in numbers):
        raise KtrayError(f"tune.space: '{key}' takes integers", "Write integers for low, high and step.")
    return Spec(key, low=float(low), high=float(high), log=log, step=step, whole=whole, when=when)


def _when(key: str, conditions: Any) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    if not isinstance(conditions, dict) or not all(isinstance(v, list) and v for v in conditions.values()):
        raise KtrayError(f"tune.space: the condition of '{key}' is {conditions!r}", "Write when: {other.key: [a, b]}.")
    return tuple((name, tuple(values)) for name, values in conditions.items())


def _section(key: str) -> type[Section] | None:
    """Return the section of the recipe that a key names; None if the key has a value."""
    model: type[Section] = Recipe
    for part in key.split("."):
        field = model.model_fields.get(part)
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return None
        model = kind
    return model


def _type_of(key: str) -> str:
    for name, _, kind, _ in recipes.schema():
        if name == key:
            return kind
    recipes.override(Recipe(), {key: None})  # raises, and names the nearest key
    raise KtrayError(f"tune.space: '{key}' has no value of its own", "Name its keys; --help lists them.")
