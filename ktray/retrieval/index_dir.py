"""The index of a gallery as a folder: the stage INDEX writes it shard by shard, and CURATE searches it.

``index.json``
    the settings of all shards (encoder, preprocessing, crops). Shards of another encoder are never added.
``shards/ID-NNNNN.npy``
    (rows, D) float16 embeddings of unit length; the file can be mapped into memory.
``shards/ID-NNNNN.parquet``
    for the same rows in the same order: ``uri`` (with the crop's box, see `data.sources.uris`), ``caption``, ``hash``,
    ``digest`` and, if the gallery has labels, ``label``.
``shards/ID.json``
    summary of one shard of the source (a tar file, or several image files). It names the shard's parts (one or
    several pairs of the files above) with their rows, sizes and checksums. It is written last: a shard without a
    summary does not exist.
``unfinished/KEY.json``
    written when a job starts to add shards, with the planned number of shards, and deleted when the job ends. As
    long as such a file exists, the folder does not count as a complete index.
``shards.parquet``
    a copy of all summaries in one file, so that opening a large index does not read many small files.
    `IndexDir.shards` works without it.

``ID`` is the fingerprint of the shard's source. Therefore only the new shards of a growing gallery are embedded, and
overlapping galleries share shards. Every file is written atomically.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.errors import KtrayError
from ktray.storage.columns import SHARDS_AT_ONCE, Rows, pack_rows, read_rows
from ktray.storage.concurrent import in_order
from ktray.storage.store import Dir

FORMAT = 1
_SHARDS = "shards"
_HEAD = "index.json"
_COPY = "shards.parquet"
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Part:
    """A stored part of a shard.

    Attributes:
        name: file name without suffix.
        rows: number of rows.
        files: suffix to (size in bytes, checksum).
    """

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
    """The summary of a shard, stored as ``shards/ID.json``.

    Attributes:
        shard: the shard's id.
        parts: the stored parts, in order.
        rows: number of rows of all parts together.
        read: number of images that were read.
        bad: the images that could not be used, as (uri, reason).
        source: where the images were read from when the shard was written.
    """

    shard: str
    parts: tuple[Part, ...]
    rows: int
    read: int
    bad: tuple[tuple[str, str], ...] = ()
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "parts": [part.to_json() for part in self.parts],
            "bad": [list(pair) for pair in self.bad],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> IndexedShard:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the content is not the summary of a shard.
        """
        return cls(
            content["shard"],
            tuple(Part.from_json(part) for part in content["parts"]),
            content["rows"],
            content["read"],
            tuple((uri, reason) for uri, reason in content["bad"]),
            content.get("source", ""),
        )


class IndexDir(Dir):
    """The folder of an index. It is picklable. Any machine may write parts; one machine writes the summaries."""

    def settle(self, facts: dict[str, Any]) -> None:
        """Record the settings of the shards, or check that the folder has the same settings already.

        Raises:
            KtrayError: the folder has shards with other settings.
        """
        stored = self.facts()
        if stored is None:
            if self.create(_HEAD, json.dumps({"format": FORMAT, **facts}, indent=1).encode()):
                return
            stored = self.facts() or {}
        facts = json.loads(json.dumps({"format": FORMAT, **facts}))
        differences = [
            f"{name} {stored.get(name)} instead of {facts[name]}" for name in facts if stored.get(name) != facts[name]
        ]
        if differences:
            raise KtrayError(
                f"The index '{self.uri}' was made with {'; '.join(differences)}",
                "Embeddings of two kinds cannot be searched together. Restore the settings of the index, or set "
                "gallery.index to another folder.",
            )

    def facts(self) -> dict[str, Any] | None:
        """The settings of the shards; None in a new folder."""
        if not self.exists(_HEAD):
            return None
        settings: dict[str, Any] = self.read_json(_HEAD)
        return settings

    def begin(self, key: str, shards: int) -> None:
        """Record that the job ``key`` has started and plans ``shards`` shards."""
        self.write_json(f"{_UNFINISHED}/{key}.json", {"shards": shards})

    def end(self, key: str) -> None:
        """Record that the job ``key`` has written all its shards."""
        self.delete(f"{_UNFINISHED}/{key}.json")

    def unfinished(self) -> list[int]:
        """The planned number of shards of each job that has not ended. Such a job may still be working."""
        folder = self.sub(_UNFINISHED)
        return [int(planned["shards"]) for planned in folder.read_each_json(folder.names(".json"))]

    def write_part(self, name: str, columns: Rows, embedding: np.ndarray | None) -> Part:
        """Write the files of a part. The part is only valid after `finish` was called for its shard."""
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
        """Write the summary of a shard. All its parts must be written already."""
        self.write_json(f"{_SHARDS}/{shard.shard}.json", shard.to_json())

    def shards(self, wanted: Sequence[str] | None = None) -> tuple[dict[str, IndexedShard], dict[str, str]]:
        """The complete shards by id, and for each broken shard what is wrong with it.

        Args:
            wanted: the ids to read; None for all.
        """
        sizes = self.sub(_SHARDS).names()
        copied = self._copied()
        complete: dict[str, IndexedShard] = {}
        broken: dict[str, str] = {}
        stored = [name[:-5] for name in sizes if name.endswith(".json")]
        if wanted is not None:
            known = set(stored)
            stored = [shard for shard in wanted if shard in known]
        calls = [partial(self._summary, shard, copied.get(shard)) for shard in stored]
        requests = any(shard not in copied for shard in stored)
        for shard, summary in zip(stored, in_order(calls, self.at_once if requests else 1), strict=True):
            problem = summary if isinstance(summary, str) else _problem(summary, sizes)
            if isinstance(summary, str) or problem:
                broken[shard] = problem
            else:
                complete[shard] = summary
        return complete, broken

    def _summary(self, shard: str, copied: dict[str, Any] | None) -> IndexedShard | str:
        """The summary of a shard, read unless there is a copy; or what is wrong with it."""
        try:
            return IndexedShard.from_json(copied or self.read_json(f"{_SHARDS}/{shard}.json"))
        except (ValueError, KeyError, TypeError) as error:
            return f"the summary cannot be read ({error})"

    def forget(self, shard: str) -> None:
        """Delete the summary of a broken shard, so that the shard is computed again."""
        self.delete(f"{_SHARDS}/{shard}.json")
        self.delete(_COPY)

    def copy_summaries(self, known: Mapping[str, IndexedShard] | None = None) -> None:
        """Rewrite ``shards.parquet`` if shards were added.

        Args:
            known: shards whose summaries need not be read again, by id.
        """
        copied = self._copied()
        names = [name[:-5] for name in self.sub(_SHARDS).names(".json")]
        if set(names) <= set(copied):
            return
        copied |= {name: shard.to_json() for name, shard in (known or {}).items()}
        others = [name for name in names if name not in copied]
        copied |= zip(others, self.read_each_json(f"{_SHARDS}/{name}.json" for name in others), strict=True)
        texts = [json.dumps(copied[name]) for name in names]
        stream = pa.BufferOutputStream()
        pq.write_table(pa.table({"shard": names, "summary": texts}), stream, compression="zstd")
        self.write(_COPY, stream.getvalue().to_pybytes())

    def _copied(self) -> dict[str, dict[str, Any]]:
        if not self.exists(_COPY):
            return {}
        try:
            table = pq.read_table(pa.BufferReader(self.read(_COPY)))
        except pa.ArrowException:  # the file is only a copy of the summaries
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
                    f"'{self.uri}/{_SHARDS}/{part.name}{suffix}' is damaged: its checksum differs from the record",
                    f"Delete '{self.uri}/{_SHARDS}/{part.name.rpartition('-')[0]}.json' and run the command again, "
                    "so that the shard is embedded again.",
                )

    def rows(self, part: Part, columns: Sequence[str]) -> Rows:
        """The named columns of a part."""
        return read_rows(self, f"{_SHARDS}/{part.name}.parquet", columns)

    def rows_of(self, parts: Sequence[Part], columns: Sequence[str]) -> Iterator[Rows]:
        """`rows` of each part, in order. From a remote folder, several parts are read concurrently."""
        return in_order((partial(self.rows, part, columns) for part in parts), self.at_once)

    def embeddings(self, parts: Sequence[Part]) -> Iterator[np.ndarray]:
        """`embedding` of each part, in order. From a remote folder, a few parts are read concurrently."""
        calls = (partial(self.embedding, part) for part in parts)
        return in_order(calls, 1 if self.is_local else SHARDS_AT_ONCE)

    def embedding(self, part: Part) -> np.ndarray:
        """(rows, D) float16 embeddings of a part; mapped into memory if the folder is local, otherwise read.

        Raises:
            KtrayError: the file is damaged or does not have the recorded number of rows.
        """
        name = f"{_SHARDS}/{part.name}.npy"
        try:
            embeddings: np.ndarray = (
                np.load(Path(self.path) / name, mmap_mode="r", allow_pickle=False)
                if self.is_local
                else np.load(io.BytesIO(self.read(name)), allow_pickle=False)
            )
            if len(embeddings) != part.rows:
                raise ValueError(f"it has {len(embeddings)} rows instead of {part.rows}")
        except (OSError, ValueError) as error:
            raise KtrayError(
                f"'{self.uri}/{name}' cannot be read as embeddings: {error}",
                "Run the same command again. It embeds truncated and missing shards again.",
            ) from error
        return embeddings


def _problem(shard: IndexedShard, sizes: dict[str, int]) -> str:
    """What is wrong with the files of a shard; empty if the files have the recorded sizes."""
    for part in shard.parts:
        for suffix, (size, _) in part.files.items():
            actual = sizes.get(part.name + suffix)
            if actual is None:
                return f"{part.name}{suffix} is missing"
            if actual != size:
                return f"{part.name}{suffix} has {actual} bytes instead of {size}"
    return ""


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
