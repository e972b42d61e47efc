"""The summary of a shard that a worker has finished.

A summary passes through Ray Data as JSON. A stage that can be interrupted also stores it next to the data of the shard,
so that a restarted stage recognises the shard and counts it once. The field names are therefore those of stored files
and must not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from ktray.storage.store import Stage

S = TypeVar("S", bound="ShardSummary")
P = TypeVar("P", bound="PieceSummary")


@dataclass(frozen=True)
class ShardSummary:
    """The counts of a shard. A stage that reports more has a subclass.

    Attributes:
        name: name of the shard.
        rows: number of rows in the shard.
        read: number of images that were read.
        bad: images that could not be used, as (uri, reason).
        images, flops: work that the ledger counts; 0 for a shard that an earlier attempt finished.
    """

    name: str
    rows: int = 0
    read: int = 0
    bad: tuple[tuple[str, str], ...] = ()
    images: int = 0
    flops: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-like content, which is stored, and which `map_shards` passes to the driver."""
        return asdict(self)

    @classmethod
    def from_json(cls: type[S], content: Mapping[str, Any]) -> S:
        """Read the output of `to_json`, also from a version with fewer or more fields."""
        values = {f.name: content[f.name] for f in fields(cls) if f.name in content}
        return cls(**{**values, "bad": pairs(content.get("bad", []))})

    @classmethod
    def each(cls: type[S], contents: Iterable[Mapping[str, Any]]) -> Iterator[S]:
        """`from_json` of each content, in order of arrival."""
        return (cls.from_json(content) for content in contents)

    def resumed(self: S) -> S:
        """This summary without work, because the ledger has counted it for the earlier attempt."""
        return replace(self, images=0, flops=0.0)


@dataclass(frozen=True)
class PieceSummary(ShardSummary):
    """The summary of one piece of a shard: the counts are those of the piece, ``name`` is the name of the shard.

    Attributes:
        piece: number of the piece.
        pieces: number of pieces in the shard, in the summary of its last piece; None in the others.
    """

    piece: int = 0
    pieces: int | None = None


def whole_shards(pieces: Iterable[P]) -> Iterator[list[P]]:
    """The pieces of each shard in their order, as soon as its last piece has arrived."""
    open_: dict[str, dict[int, P]] = {}
    for piece in pieces:
        received = open_.setdefault(piece.name, {})
        received[piece.piece] = piece
        count = next((p.pieces for p in received.values() if p.pieces), None)
        if count == len(received):
            yield [received[number] for number in sorted(open_.pop(piece.name))]


def pairs(listed: Iterable[Iterable[Any]]) -> tuple[tuple[str, str], ...]:
    """(uri, reason) of the images that could not be used, from JSON or an array of text."""
    return tuple((str(uri), str(reason)) for uri, reason in listed)


def finished_shards(stage: Stage) -> dict[str, ShardSummary]:
    """The summaries of the shards that earlier attempts have finished, by name of the shard."""
    names = list(stage.names(".parquet.json"))
    contents = zip(names, stage.read_each_json(names), strict=True)
    return {name.removesuffix(".json"): ShardSummary.from_json(content) for name, content in contents}


def finish_shard(stage: Stage, summary: ShardSummary) -> dict[str, Any]:
    """Declare a shard finished. Its summary is written after its data, so that a restart counts the shard once.

    Returns:
        `ShardSummary.to_json`, for `ktray.distributed.ray_data.map_shards`.
    """
    content = summary.to_json()
    stage.write_json(f"{summary.name}.json", content)
    return content
