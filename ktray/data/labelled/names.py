"""Many strings in one table: the uris of a million images need half of the memory of as many Python strings,
and none of them lies between other objects, whose memory could then not be returned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import pyarrow as pa

_PIECE = 1 << 16  # strings that are Python objects at a time while all are read


class Names(Sequence[str]):
    """A sequence of strings that cannot be changed. It is equal to every sequence of the same strings."""

    def __init__(self, names: Iterable[str]) -> None:
        self._table = pa.array(names, pa.large_string())

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        found: str | list[str] = (
            [self[i] for i in range(*index.indices(len(self)))]
            if isinstance(index, slice)
            else self._table[index].as_py()
        )
        return found

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _PIECE):
            yield from self._table.slice(first, _PIECE).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return bool(self._table.equals(other._table))
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(own == its for own, its in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"Names({list(self[:3])}{', ...' if len(self) > 3 else ''}; {len(self)} in all)"
