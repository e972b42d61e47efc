"""Places: keys whose value is a file or folder. What is recorded and sent to workers has absolute places.

A relative path is relative to the folder in which the command runs. Workers run in other folders, and the recipe that a
run records is used from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, get_args

from ktray.recipe.section import Section


class _Marked:
    """Marks the type of a place."""


Place = Annotated[str, _Marked()]
"""A local path, ``file://`` or an address such as ``s3://bucket/key``; it may contain wildcards."""

AnySection = TypeVar("AnySection", bound=Section)


def absolute_place(path: str) -> str:
    """The absolute form of a local path; addresses are returned unchanged."""
    if "://" in path and not path.startswith("file://"):
        return path
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://")))


def with_absolute_places(section: AnySection) -> AnySection:
    """A copy of a recipe (or of a section) in which all places are absolute."""
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            changed[name] = with_absolute_places(value)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            changed[name] = [with_absolute_places(item) for item in value]
        elif value is not None and _is_place(field.annotation, field.metadata):
            changed[name] = [absolute_place(v) for v in value] if isinstance(value, list) else absolute_place(value)
    return section.model_copy(update={k: v for k, v in changed.items() if v != getattr(section, k)})


def _is_place(kind: Any, marks: Iterable[Any] = ()) -> bool:
    """Whether a type has the mark; pydantic moves the marks of a type that stands alone to the field's metadata."""
    return any(isinstance(arg, _Marked) or _is_place(arg) for arg in (*get_args(kind), *marks))
