"""Declared inputs: all that a stage may read, as one frozen object whose hash is the stage's key.

A stage's work gets this object and the services of the run (`ktray.stages.base.Runtime`), and no recipe. What it reads
is therefore in its key, unless its field says with `NotInKey` why it cannot change the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from pydantic import BaseModel

from ktray.recipe.section import digest


@dataclass(frozen=True)
class NotInKey:
    """Marks a field that does not go into the key: ``field: Annotated[int, NotInKey("why")]``.

    Attributes:
        reason: why it cannot change what the stage makes.
        names: of the value's own fields that are left out; empty: the whole value is.
    """

    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageInputs:
    """What a stage reads. A subclass is a frozen dataclass, one for each stage.

    Attributes:
        stage: name of the stage's folder in the store.
        version: of the stage's code; raised when the same inputs give another result.
    """

    stage: ClassVar[str]
    version: ClassVar[int]

    def key_parts(self) -> dict[str, Any]:
        """What the key is made of, JSON-like; stored in the manifest, so that two keys can be compared."""
        parts: dict[str, Any] = {"version": self.version}
        marks = self.not_in_key()
        for f in dataclasses.fields(self):
            mark = marks.get(f.name)
            if mark is None:
                parts[f.name] = key_value(getattr(self, f.name))
            elif mark.names:
                kept = key_value(getattr(self, f.name))
                parts[f.name] = {name: item for name, item in kept.items() if name not in mark.names}
        return parts

    @classmethod
    def not_in_key(cls) -> dict[str, NotInKey]:
        """Fields that are not in the key, or not with all they have."""
        return {
            name: mark
            for name, kind in get_type_hints(cls, include_extras=True).items()
            for mark in getattr(kind, "__metadata__", ())
            if isinstance(mark, NotInKey)
        }

    @property
    def key(self) -> str:
        """16 hex digits."""
        return digest(self.stage, self.key_parts())


def key_value(value: Any) -> Any:
    """A value as JSON-like data that tells it from all values that could lead to another result.

    A whole stage and a task kind stand for themselves by their ``key``, a labelled set, a teacher and a preprocessing
    by their ``fingerprint``; models, dataclasses and containers by their content.

    Raises:
        TypeError: it is none of these, so that nothing says what it depends on.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    for name in ("key", "fingerprint"):
        told = getattr(value, name, None)
        if isinstance(told, str):
            return told
    if dataclasses.is_dataclass(value):
        return {f.name: key_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): key_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [key_value(item) for item in value]
    raise TypeError(f"a stage's input of type {type(value).__name__} has no key")
