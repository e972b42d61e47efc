"""What a worker says of a shard that it has finished.

It crosses Ray Data as JSON, and a stage that can be interrupted stores it beside the shard's data, so that a restart
knows the shard and counts it once. Names of fields are therefore those of stored files: they stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

S = TypeVar("S", bound="ShardSummary")


@dataclass(frozen=True)
class ShardSummary:
    """A shard's accounts; a stage with more to say has a subclass.

    Attributes:
        name: of the shard.
        rows: that it has.
        read: images that were looked at.
        bad: those that could not be used, as (uri, reason).
        images, flops: the work, to be charged; of a shard that an earlier attempt has finished, nothing.
    """

    name: str
    rows: int = 0
    read: int = 0
    bad: tuple[tuple[str, str], ...] = ()
    images: int = 0
    flops: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-like content; what is stored and what `map_shards` hands to the driver."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[S], content: Mapping[str, Any]) -> S:
        """Read `to_json`, also of a version that had fewer or more fields."""
        known = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        return cls(**{**known, "bad": pairs(content.get("bad", []))})

    @classmethod
    def each(cls: type[S], contents: Iterable[Mapping[str, Any]]) -> Iterator[S]:
        """`from_json` of all, as they come."""
        return (cls.from_json(content) for content in contents)

    def resumed(self: S) -> S:
        """The same without the work: the earlier attempt that has done it was charged for it."""
        return replace(self, images=0, flops=0.0)


def pairs(listed: Iterable[Iterable[Any]]) -> tuple[tuple[str, str], ...]:
    """(uri, reason) of images that could not be used, from JSON or an array of text."""
    return tuple((str(uri), str(reason)) for uri, reason in listed)
