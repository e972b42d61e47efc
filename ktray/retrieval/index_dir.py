"""The embedded gallery as a folder: what INDEX writes, shard by shard, and CURATE searches.

``index.json``
    by what the shards were made (encoder, preprocessing, crops). Another encoder's shards never come in.
``shards/ID-NNNNN.npy``
    (rows, D) float16 embeddings of unit length, to be mapped into memory.
``shards/ID-NNNNN.parquet``
    in the same order ``uri`` (with the crop's box, see `data.sources.uris`), ``caption``, ``hash``, ``digest``, perhaps
    ``label``.
``shards/ID.json``
    summary of one shard of the source (a tar, some files), which has one or several such parts, with their rows, sizes
    and checksums. Written last: a shard without it does not exist.
``unfinished/KEY.json``
    of a job that adds shards, from its start to its end, with how many there shall be: while one stands there, the
    folder does not count as a whole gallery.
``shards.parquet``
    all summaries in one file, so that opening a large index does not read each. A copy: `IndexDir.shards` works
    without it.

``ID`` is the fingerprint of the shard's source, so that a gallery which grows has its new shards embedded alone, and
galleries that overlap share theirs. Every file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.errors import KtrayError
from ktray.storage.columns import Rows, pack_rows, read_rows
from ktray.storage.store import Dir

FORMAT = 1
_SHARDS = "shards"
_HEAD = "index.json"
_COPY = "shards.parquet"
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Part:
    """A stored piece of a shard: ``name`` without suffix, its rows, and [size in bytes, checksum] of its files."""

    name: str
    rows: int
    files: dict[str, tuple[int, str]]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "rows": self.rows, "files": {s: list(facts) for s, facts in self.files.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Part:
        files = {suffix: (int(size), str(checksum)) for suffix, (size, checksum) in content["files"].items()}
        return cls(content["name"], content["rows"], files)


@dataclass(frozen=True)
class IndexedShard:
    """The file ``shards/ID.json``.

    Attributes:
        shard: its id.
        parts: what is stored of it, in order.
        rows: of all parts.
        read: images that were looked at.
        bad: those that could not be used, as (uri, reason).
        source: where its images were read from when it was made.
    """

    shard: str
    parts: tuple[Part, ...]
    rows: int
    read: int
    bad: tuple[tuple[str, str], ...] = ()
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "parts": [part.to_json() for part in self.parts], "bad": [list(one) for one in self.bad]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> IndexedShard:
        """Raises KeyError, TypeError or ValueError: the content is not a shard's."""
        return cls(
            content["shard"],
            tuple(Part.from_json(part) for part in content["parts"]),
            content["rows"],
            content["read"],
            tuple((uri, reason) for uri, reason in content["bad"]),
            content.get("source", ""),
        )


class IndexDir(Dir):
    """The folder. Picklable; parts may be written from any machine, summaries are written by one."""

    def settle(self, facts: dict[str, Any]) -> None:
        """Declare by what shards are made; the first to do so decides.

        Raises:
            KtrayError: the folder holds shards that were made otherwise.
        """
        head = self.facts()
        if head is None:
            if self.create(_HEAD, json.dumps({"format": FORMAT, **facts}, indent=1).encode()):
                return
            head = self.facts() or {}
        facts = json.loads(json.dumps({"format": FORMAT, **facts}))
        other = [f"{name} {head.get(name)} and not {facts[name]}" for name in facts if head.get(name) != facts[name]]
        if other:
            raise KtrayError(
                f"The index '{self.uri}' was made with {'; '.join(other)}",
                "Embeddings of two kinds cannot be searched together: go back to those settings, or name another "
                "folder with gallery.index.",
            )

    def facts(self) -> dict[str, Any] | None:
        """By what the shards are made; None in a new folder."""
        if not self.exists(_HEAD):
            return None
        found: dict[str, Any] = self.read_json(_HEAD)
        return found

    def begin(self, key: str, shards: int) -> None:
        """Say that a job, named by ``key``, adds shards until there are so many of its own."""
        self.write_json(f"{_UNFINISHED}/{key}.json", {"shards": shards})

    def end(self, key: str) -> None:
        """The job's shards are all there."""
        self.delete(f"{_UNFINISHED}/{key}.json")

    def unfinished(self) -> list[int]:
        """Shards that each job which has not ended (it may still work) is to have."""
        folder = self.sub(_UNFINISHED)
        return [int(folder.read_json(name)["shards"]) for name in folder.names(".json")]

    def write_part(self, name: str, columns: Rows, embedding: np.ndarray | None) -> Part:
        """Write a part's files; it counts once its shard is finished."""
        files = {".parquet": pack_rows(columns)}
        if embedding is not None:
            stream = io.BytesIO()
            np.save(stream, np.ascontiguousarray(embedding, dtype=np.float16))
            files[".npy"] = stream.getvalue()
        for suffix, data in files.items():
            self.write(f"{_SHARDS}/{name}{suffix}", data)
        rows = len(next(iter(columns.values())))
        return Part(name, rows, {suffix: (len(data), _checksum(data)) for suffix, data in files.items()})

    def finish(self, shard: IndexedShard) -> None:
        """Declare a shard whole, whose parts are written."""
        self.write_json(f"{_SHARDS}/{shard.shard}.json", shard.to_json())

    def shards(self, wanted: Sequence[str] | None = None) -> tuple[dict[str, IndexedShard], dict[str, str]]:
        """The whole shards by id, and of the broken ones what is wrong with them.

        Args:
            wanted: ids; None for all.
        """
        sizes = self.sub(_SHARDS).names()
        known = self._copied()
        whole: dict[str, IndexedShard] = {}
        broken: dict[str, str] = {}
        ids = wanted if wanted is not None else [name[:-5] for name in sizes if name.endswith(".json")]
        for shard in ids:
            if f"{shard}.json" not in sizes:
                continue
            try:
                found = IndexedShard.from_json(known.get(shard) or self.read_json(f"{_SHARDS}/{shard}.json"))
            except (ValueError, KeyError, TypeError) as error:
                broken[shard] = f"its summary cannot be read ({error})"
                continue
            problem = _problem(found, sizes)
            if problem:
                broken[shard] = problem
            else:
                whole[shard] = found
        return whole, broken

    def forget(self, shard: str) -> None:
        """Give up a broken shard: without its summary it is made again."""
        self.delete(f"{_SHARDS}/{shard}.json")
        self.delete(_COPY)

    def copy_summaries(self) -> None:
        """Write ``shards.parquet`` anew where shards have come."""
        known = self._copied()
        names = [name[:-5] for name in self.sub(_SHARDS).names(".json")]
        if set(names) <= set(known):
            return
        texts = [json.dumps(known.get(n) or self.read_json(f"{_SHARDS}/{n}.json")) for n in names]
        stream = pa.BufferOutputStream()
        pq.write_table(pa.table({"shard": names, "summary": texts}), stream, compression="zstd")
        self.write(_COPY, stream.getvalue().to_pybytes())

    def _copied(self) -> dict[str, dict[str, Any]]:
        if not self.exists(_COPY):
            return {}
        try:
            table = pq.read_table(pa.BufferReader(self.read(_COPY)))
        except pa.ArrowException:  # only a copy
            return {}
        pairs = zip(table.column("shard").to_pylist(), table.column("summary").to_pylist(), strict=True)
        return {name: json.loads(text) for name, text in pairs}

    def check(self, part: Part) -> None:
        """Compare a part's files with their checksums.

        Raises:
            KtrayError: they differ.
        """
        for suffix, (_, checksum) in part.files.items():
            if _checksum(self.read(f"{_SHARDS}/{part.name}{suffix}")) != checksum:
                raise KtrayError(
                    f"'{self.uri}/{_SHARDS}/{part.name}{suffix}' is not what was written (its checksum differs)",
                    f"Delete '{self.uri}/{_SHARDS}/{part.name.rpartition('-')[0]}.json' and run again: the shard is "
                    "then embedded anew.",
                )

    def rows(self, part: Part, columns: Sequence[str]) -> Rows:
        """Columns of a part."""
        return read_rows(self, f"{_SHARDS}/{part.name}.parquet", columns)

    def embedding(self, part: Part) -> np.ndarray:
        """(rows, D) float16; mapped into memory where the folder is local, read otherwise.

        Raises:
            KtrayError: the file does not hold what the summary says.
        """
        name = f"{_SHARDS}/{part.name}.npy"
        try:
            found: np.ndarray = (
                np.load(Path(self.path) / name, mmap_mode="r", allow_pickle=False)
                if self.is_local
                else np.load(io.BytesIO(self.read(name)), allow_pickle=False)
            )
            if len(found) != part.rows:
                raise ValueError(f"{len(found)} rows, not {part.rows}")
        except (OSError, ValueError) as error:
            raise KtrayError(
                f"'{self.uri}/{name}' cannot be read as embeddings: {error}",
                "Run the same command again: a shard that is cut short or missing is embedded anew.",
            ) from error
        return found


def _problem(shard: IndexedShard, sizes: dict[str, int]) -> str:
    """What is wrong with a shard's files; empty if nothing is."""
    for part in shard.parts:
        for suffix, (size, _) in part.files.items():
            found = sizes.get(part.name + suffix)
            if found is None:
                return f"{part.name}{suffix} is missing"
            if found != size:
                return f"{part.name}{suffix} has {found} bytes, not {size}"
    return ""


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
