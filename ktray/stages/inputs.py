"""Declared inputs: everything that a stage may read, as one frozen object whose hash is the stage's key.

The function that computes a stage receives this object and the services of the run (`ktray.stages.base.Runtime`), but
no recipe. Everything that it reads is therefore in its key, except a field that is marked with `NotInKey`, which states
why the field cannot change the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import BaseModel

from ktray.recipe.section import digest

Mark = TypeVar("Mark")
# All devices of the job; those of its training workers; one device.
Devices = Literal["cluster", "workers", "one"]


@dataclass(frozen=True)
class NotInKey:
    """Marks a field that does not go into the key: ``field: Annotated[int, NotInKey("why")]``.

    Attributes:
        reason: why the field cannot change the result of the stage.
        names: names of the value's own fields that are left out of the key; empty: the whole value is left out.
    """

    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class AddedLater:
    """Marks what a later version of ktray added: ``field: Annotated[str, AddedLater("none")]``, or ``part:
    Annotated[Section, AddedLater({"name": None})]`` for fields of the value.

    A value that leaves the result as it was before stays out of the key, so that older stores stay valid. Every other
    value is in the key.

    Attributes:
        neutral: the value that changes nothing; for fields of the value, such values by name.
    """

    neutral: Any


@dataclass(frozen=True)
class StageInputs:
    """The inputs of a stage. Each stage has one subclass, which is a frozen dataclass.

    Attributes:
        stage: name of the stage's folder in the store.
        version: version of the stage's code. It must be raised if the same inputs give another result.
        devices: what the stage works on, for its cost.
    """

    stage: ClassVar[str]
    version: ClassVar[int]
    devices: ClassVar[Devices] = "cluster"

    @property
    def speed(self) -> dict[str, Any]:
        """What the time for an image depends on, besides the device (`ktray.accounting.speeds`), as JSON-like data.
        Empty if the time of the stage is not planned."""
        return {}

    def images_worked(self, counted: int, manifest: Mapping[str, Any]) -> int:
        """The number of images with which the time of the finished stage grows, as a plan knows it before.

        Args:
            counted: the images that the ledger counted.
            manifest: the manifest of the finished stage.
        """
        return counted

    def key_parts(self) -> dict[str, Any]:
        """The content that is hashed, as JSON-like data. The manifest stores it, so that two keys can be compared."""
        parts: dict[str, Any] = {"version": self.version}
        marks = self.not_in_key()
        for f in dataclasses.fields(self):
            mark = marks.get(f.name)
            if mark is None:
                parts[f.name] = key_value(getattr(self, f.name))
            elif mark.names:
                kept = key_value(getattr(self, f.name))
                parts[f.name] = {name: item for name, item in kept.items() if name not in mark.names}
        for name, added in self._marks(AddedLater).items():
            if isinstance(added.neutral, Mapping):
                parts[name] = {k: v for k, v in parts[name].items() if k not in added.neutral or v != added.neutral[k]}
            elif parts[name] == added.neutral:
                del parts[name]
        return parts

    @classmethod
    def not_in_key(cls) -> dict[str, NotInKey]:
        """The fields that are left out of the key, entirely or in part, with their marks."""
        return cls._marks(NotInKey)

    @classmethod
    def _marks(cls, which: type[Mark]) -> dict[str, Mark]:
        return {
            name: mark
            for name, kind in get_type_hints(cls, include_extras=True).items()
            for mark in getattr(kind, "__metadata__", ())
            if isinstance(mark, which)
        }

    @property
    def key(self) -> str:
        """The key of the stage: 16 hexadecimal digits."""
        return self.key_of(self.key_parts())

    def key_of(self, parts: dict[str, Any]) -> str:
        """The key for the parts that `key_parts` returned."""
        return digest(self.stage, parts)


def key_value(value: Any) -> Any:
    """A value as JSON-like data that differs from that of every value that could lead to another result.

    A completed stage and a task kind are represented by their ``key``; a labelled set, a teacher and a preprocessing by
    their ``fingerprint``; models, dataclasses and containers by their content.

    Raises:
        TypeError: the value is none of these, so its content is not known.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    for name in ("key", "fingerprint"):
        identity = getattr(value, name, None)
        if isinstance(identity, str):
            return identity
    if dataclasses.is_dataclass(value):
        return {f.name: key_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): key_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [key_value(item) for item in value]
    raise TypeError(f"a stage's input of type {type(value).__name__} has no key")
