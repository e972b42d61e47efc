"""Read recipes from files and the command line, merge and check them, and write them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from ktray.errors import KtrayError
from ktray.recipe.choice import DEFAULT_OBJECTIVE, chosen, fitting, objective_rows, objectives, owners, strategies
from ktray.recipe.objective import ObjectiveConfig
from ktray.recipe.registries import OBJECTIVES, STRATEGIES
from ktray.recipe.schema import Recipe
from ktray.recipe.section import Section
from ktray.recipe.values import OPEN_KEYS, Scalar, parse, plain, read_document, write_document
from ktray.redact import credential_in

BUILTIN = Path(__file__).parent / "builtin"


DEFAULT = "letters"
WHOLE = ("kwargs", "strategy")  # mappings that a later value replaces instead of merging


def schema() -> list[tuple[str, Any, str, str]]:
    """All keys of the schema as (dotted key, default, type, description)."""
    choices = {
        OBJECTIVES.key: "|".join(config.objective_name() for config in objectives()),
        STRATEGIES.key: "|".join(config.strategy_name() for config in strategies()),
    }
    return [(key, default, choices.get(key) or _type_name(kind), text) for key, default, kind, text in _keys()]


def _keys(model: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """All keys of the schema as (dotted key, default, annotation, description)."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if kind is ObjectiveConfig:
            text = ObjectiveConfig.model_fields["name"].description or ""
            yield f"{prefix}{name}.name", DEFAULT_OBJECTIVE, str, text
            yield from ((f"{prefix}{name}.{key}", default, k, t) for key, default, k, t in objective_rows())
        elif isinstance(kind, type) and issubclass(kind, Section):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield prefix + name, default, kind, field.description or ""


def _kind(key: str, kinds: dict[str, Any]) -> Any:
    """The annotation of a key; of a key below one with a mapping, that of the mapping's values."""
    opened = _opened(key)
    return get_args(kinds[opened])[1] if opened else kinds.get(key, Any)


def _opened(key: str) -> str:
    """The key with a mapping of the user's own keys that a key is below; empty for all others."""
    return next((k for k in OPEN_KEYS if key.startswith(f"{k}.")), "")


def load(recipes: str | list[str] | None, overrides: list[str]) -> Recipe:
    """Load one or several recipes (names of built-in recipes or paths of YAML files), with ``key=value`` overrides.

    Keys of later recipes replace those of earlier ones. If no recipe has a section ``task``, the recipes are merged
    into the recipe of the built-in task (``letters``, or that of ``task.name``), or, with ``task.data``, into the
    defaults of the schema. The type of a key decides how its value is read (`ktray.recipe.values`). Keys in files that
    belong to other objectives than the chosen one are dropped (`ktray.recipe.choice` has the rules).

    Raises:
        KtrayError: there is no such recipe, a key is unknown (the message names the nearest one), a value has the wrong
            type, or an override is a key of another objective than the chosen one.
    """
    kinds = {key: kind for key, _, kind, _ in _keys()}
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise KtrayError(
                f"'{text}' is not a key=value pair", "Write it in the form key=value, for example transfer.size=500."
            )
        key = key.strip()
        known = key in kinds or _opened(key)
        pairs.append((key, parse(key, value, _kind(key, kinds)) if known else value))
    return load_values(recipes, pairs)


def load_values(recipes: str | list[str] | None, overrides: Sequence[tuple[str, Any]]) -> Recipe:
    """`load` with overrides that are pairs of a dotted key and a value; later pairs replace earlier ones."""
    wanted = [recipes] if isinstance(recipes, str) else list(recipes or [])
    raw: dict[str, Any] = {}
    for name in wanted:
        _merge(raw, _read_yaml(name))
    own = any(key == "task.data" for key, _ in overrides)
    if "task" not in raw and not own:
        named = [str(value) for key, value in overrides if key == "task.name"]
        name = named[-1] if named else DEFAULT
        if (BUILTIN / f"{name}.yaml").exists():
            raw, over = _read_yaml(name), raw
            _merge(raw, over)
    for key, value in overrides:
        _set(raw, key, value)
    return _validate(raw, [key for key, _ in overrides])


def dotted(keys: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted key and a value: ``{"train": {"steps": 20}}`` is ``[("train.steps", 20)]``.

    A mapping that is itself the value of a key, such as ``student.kwargs``, stays a mapping.
    """
    leaves = {row[0] for row in schema()}
    pairs: list[tuple[str, Any]] = []
    for name, value in keys.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in leaves:
            pairs += dotted(value, f"{key}.")
        else:
            pairs.append((key, value))
    return pairs


def _merge(raw: dict[str, Any], more: dict[str, Any]) -> None:
    """Merge ``more`` into ``raw``, key by key. A new student name also removes the arguments of the old student."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(raw.get(key), dict) and key not in WHOLE:
            if key == "student" and "name" in value:
                raw[key].pop("kwargs", None)
            _merge(raw[key], value)
        else:
            raw[key] = value


def override(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """A copy of ``recipe`` with dotted keys set. Raises `KtrayError` in the same cases as `load`.

    With a new ``objective.name``, keys of the objective that have been set are kept if the new objective has them.
    """
    raw = recipe.model_dump(mode="json")
    # Without defaults, so that the defaults of the new objective apply.
    raw["objective"] = {"name": recipe.objective.name, **recipe.objective.model_dump(mode="json", exclude_unset=True)}
    for key, value in keys.items():
        _set(raw, key, value)
    return _validate(raw, keys)


def _validate(raw: dict[str, Any], explicit: Collection[str]) -> Recipe:
    """The recipe with merged keys. ``explicit`` are the keys of the command line, of a method or of a trial."""
    _check_keys(raw)
    _check_secrets(raw)
    part = raw.get("objective")
    where: list[str] = []
    try:
        if isinstance(part, dict):
            where = ["objective"]
            explicit_keys = [key.partition(".")[2] for key in explicit if key.startswith("objective.")]
            raw = {**raw, "objective": chosen(fitting(part, explicit_keys))}
            where = []
        return Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where += [str(step) for step in first["loc"] if not _is_branch(str(step))]
        raise KtrayError(
            f"Recipe key '{'.'.join(where)}' does not accept {first.get('input')!r}: "
            f"{first['msg'].removeprefix('Value error, ')}",
            f"Write a list, also of one element, as '{'.'.join(where)}=[a, b]'."
            if first["type"] == "list_type"
            else "--help lists the type of each key.",
        ) from error


def _is_branch(step: str) -> bool:
    """Whether a part of pydantic's path to a value names a branch of a type, not a key."""
    return step in ("int", "float", "str", "bool") or step.startswith(
        ("function", "literal", "bool", "constrained", "list[", "dict[")
    )


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, from which `load` reads an equal recipe."""
    return write_document(recipe.model_dump(mode="json"))


def _read_yaml(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = BUILTIN / f"{recipe}.yaml"
        if not path.exists():
            builtin = sorted(p.stem for p in BUILTIN.glob("*.yaml"))
            raise KtrayError(
                f"No recipe is named '{recipe}'",
                f"Built-in recipes: {', '.join(builtin)}. The name of a file must end in .yaml.",
            )
    try:
        raw = read_document(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KtrayError(
            f"Recipe file '{path}' cannot be read: {error.strerror}", "Check the path in --recipe."
        ) from error
    except yaml.YAMLError as error:
        raise KtrayError(
            f"Recipe file '{path}' is not YAML: {error}".replace("\n", " "), "Correct the file."
        ) from error
    if isinstance(raw, Scalar) and raw.value is None:
        raw = {}
    if not isinstance(raw, dict):
        raise KtrayError(
            f"Recipe file '{path}' has no keys at its top level", "Start from the recipe.yaml of a run folder."
        )
    return _typed(raw, {key: kind for key, _, kind, _ in _keys()})


def _typed(raw: dict[str, Any], kinds: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The content of a recipe file with values of the types of their keys."""
    return {
        name: plain(value, kinds.get(f"{prefix}{name}", Any))
        if f"{prefix}{name}" in kinds or not isinstance(value, dict)
        else _typed(value, kinds, f"{prefix}{name}.")
        for name, value in raw.items()
    }


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    opened = _opened(key)
    parts = [*opened.split("."), key[len(opened) + 1 :]] if opened else key.split(".")
    if key == OBJECTIVES.key and isinstance(value, str):
        OBJECTIVES.get(value)  # first: without its package, its keys are unknown
    if not opened and key not in {row[0] for row in _keys()}:
        raise _unknown(key)
    node = raw
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise KtrayError(f"Recipe key '{key}' is below a key that has a value", "--help lists all keys.")
    node[parts[-1]] = value


def _check_keys(raw: dict[str, Any], model: type[Section] = Recipe, prefix: str = "") -> None:
    if model is ObjectiveConfig and isinstance(raw.get("name"), str):
        OBJECTIVES.get(raw["name"])  # first: without its package, its keys are unknown
    for name, value in raw.items():
        field = model.model_fields.get(name)
        if field is None and not (model is ObjectiveConfig and owners(name)):
            raise _unknown(f"{prefix}{name}")
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, dict):
            _check_keys(value, kind, f"{prefix}{name}.")


def _check_secrets(raw: dict[str, Any], prefix: str = "") -> None:
    """Refuse secrets: a recipe is saved with its run, and a list of processes shows command lines."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_secrets(value, f"{prefix}{name}.")
        elif kind := credential_in(value):
            raise KtrayError(
                f"Recipe key '{prefix}{name}' has a secret ({kind}), and recipes are saved and logged with their runs",
                "Use environment variables: MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD; for S3, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            )


def _unknown(key: str) -> KtrayError:
    keys = [row[0] for row in schema()]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.3)
    if not near:
        near = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]][:1]
    return KtrayError(
        f"Unknown recipe key '{key}'",
        f"Did you mean '{near[0]}'? --help lists all keys." if near else "--help lists all keys.",
    )


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind))
    args = get_args(kind)
    if get_origin(kind) is Annotated:
        return _type_name(args[0])
    if args and get_origin(kind) not in (list, dict):
        return "|".join("null" if a is type(None) else _type_name(a) for a in args)
    if args:
        return f"{get_origin(kind).__name__}[{', '.join(_type_name(a) for a in args)}]"
    return getattr(kind, "__name__", str(kind))
