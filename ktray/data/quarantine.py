"""Quarantine: the list of images that could not be used, with the reason for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ktray.data import filesystem
from ktray.errors import KtrayError

SCHEMA = pa.schema([("uri", pa.string()), ("reason", pa.string()), ("stage", pa.string())])


@dataclass(frozen=True, order=True)
class Bad:
    """One unusable image, with the reason and the stage that tried to use it."""

    uri: str
    reason: str
    stage: str


class Quarantine:
    """Collects unusable images. An image counts once per stage, also if it is added several times (retries, views)."""

    def __init__(self, rows: Iterable[Bad] = ()) -> None:
        self._rows: dict[tuple[str, str], Bad] = {}
        for row in rows:
            self.add(row.uri, row.reason, row.stage)

    def add(self, uri: str, reason: str, stage: str) -> None:
        # Names and decoder messages may contain bytes that the table cannot store.
        row = Bad(filesystem.printable(uri), filesystem.printable(reason), stage)
        self._rows.setdefault((row.uri, stage), row)

    def merge(self, other: Iterable[Bad]) -> None:
        """Add the rows of another quarantine."""
        for row in other:
            self.add(row.uri, row.reason, row.stage)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Bad]:
        """Rows in order of uri, so that two runs give the same list."""
        return iter(sorted(self._rows.values()))

    def images(self) -> int:
        """Number of distinct images over all stages."""
        return len({uri for uri, _ in self._rows})

    def check(self, read: int, max_fraction: float) -> None:
        """Fail if too large a share of the images was unusable.

        Args:
            read: number of images that were read, including the unusable ones.
            max_fraction: largest accepted share (``data.max_bad_fraction``).

        Raises:
            KtrayError: the share is larger; the message names three of the images.
        """
        bad = self.images()
        if bad <= max_fraction * read:
            return
        shown = list({row.uri: row for row in self}.values())[:3]
        examples = "; ".join(f"'{row.uri}' ({row.reason})" for row in shown)
        raise KtrayError(
            f"{bad} of {read} images cannot be used ({bad / max(read, 1):.1%}, the limit is {max_fraction:.1%}), "
            f"for example {examples}",
            "Repair or remove these images, or raise data.max_bad_fraction.",
        )

    def table(self) -> pa.Table:
        """Columns uri, reason, stage, sorted."""
        return pa.Table.from_pylist([vars(row) for row in self], schema=SCHEMA)

    def write(self, path: str) -> None:
        """Write as a Parquet file, to a local path or ``s3://``; also if there are no rows."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table(), sink)
        filesystem.write_bytes(path, sink.getvalue().to_pybytes())

    @classmethod
    def read(cls, path: str) -> Quarantine:
        """Inverse of `write`."""
        table = pq.read_table(pa.BufferReader(filesystem.read_bytes(path)), columns=SCHEMA.names)
        return cls(Bad(**row) for row in table.to_pylist())
