"""Quarantine: the list of images that could not be used, with the reason for each."""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class BadLimit:
    """How many images may be unusable.

    Attributes:
        fraction: largest accepted share of the images (``data.max_bad_fraction``); 0: none may be unusable.
        images: number that is accepted whatever their share (``data.max_bad_images``), but not more than a tenth of the
            images: in a small set, one image is more than any sensible share.
    """

    fraction: float
    images: int = 0

    def allowed(self, read: int) -> float:
        """The number of unusable images that is accepted of ``read`` images."""
        if not self.fraction:
            return 0.0
        return max(self.fraction * read, min(float(self.images), 0.1 * read))


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

    def exceeds(self, read: int, limit: BadLimit) -> bool:
        """Whether more images are unusable than is accepted of ``read`` images."""
        return self.images() > limit.allowed(read)

    def check(self, read: int, limit: BadLimit) -> None:
        """Fail if too many of the images are unusable.

        Args:
            read: number of images that were read, including the unusable ones.
            limit: what is accepted.

        Raises:
            KtrayError: more are unusable; the message names three of the images and the value to set.
        """
        if self.exceeds(read, limit):
            raise KtrayError(self.describe(read, limit), f"Repair or remove these images, or {self.raised(read)}.")

    def describe(self, read: int, limit: BadLimit) -> str:
        """The number and share of unusable images, the limit, and three examples."""
        bad = self.images()
        shown = list({row.uri: row for row in self}.values())[:3]
        examples = "; ".join(f"'{row.uri}' ({row.reason})" for row in shown)
        return (
            f"{bad} of {read} images cannot be used ({bad / max(read, 1):.1%}, the limit is {limit.fraction:.1%}), "
            f"for example {examples}"
        )

    def raised(self, read: int) -> str:
        """What to set so that this share is accepted, with some room."""
        share = min(1.0, 1.2 * self.images() / max(read, 1))
        return f"set data.max_bad_fraction={math.ceil(100 * share) / 100:g}"

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
