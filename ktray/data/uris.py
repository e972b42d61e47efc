"""How one image is named, wherever it lies.

==================================  ==============================================================
``/folder/photo.jpg``               a file; ``s3://bucket/key.jpg`` likewise
``X.tar#member=M&offset=O&size=N``  a tar member: N bytes from byte O of the (unpacked) archive
``X.parquet#row=R``                 a row of a Parquet file; ``&column=C`` where the column was named
==================================  ==============================================================

Names are percent-encoded after the ``#``; paths before it are kept as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

_MEMBER = re.compile(r"(?P<path>.+)#member=(?P<member>[^&#]*)&offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL)
_ROW = re.compile(r"(?P<path>.+)#row=(?P<row>\d+)(?:&column=(?P<column>[^&#]+))?", re.DOTALL)


@dataclass(frozen=True)
class ImageRef:
    """A parsed uri; ``str()`` gives it back.

    Attributes:
        path: the file that holds the image: itself, a tar or a Parquet file.
        member, offset, size: name, first byte and bytes of a tar member.
        row, column: row (from 0) of a Parquet file, and its column when it was not found by itself.
    """

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    row: int | None = None
    column: str | None = None

    @property
    def kind(self) -> str:
        """``file``, ``tar`` or ``parquet``."""
        return "tar" if self.member is not None else "parquet" if self.row is not None else "file"

    @classmethod
    def parse(cls, uri: str) -> ImageRef:
        """Any string is a uri: what does not end in one of the two fragments is a file."""
        if found := _MEMBER.fullmatch(uri):
            offset, size = int(found["offset"]), int(found["size"])
            member = unquote(found["member"], errors="surrogateescape")
            return cls(found["path"], member=member, offset=offset, size=size)
        if found := _ROW.fullmatch(uri):
            column = unquote(found["column"]) if found["column"] else None
            return cls(found["path"], row=int(found["row"]), column=column)
        return cls(uri)

    def __str__(self) -> str:
        if self.member is not None:
            member = quote(self.member, errors="surrogateescape")
            return f"{self.path}#member={member}&offset={self.offset}&size={self.size}"
        if self.row is not None:
            column = f"&column={quote(self.column, safe='')}" if self.column else ""
            return f"{self.path}#row={self.row}{column}"
        return self.path
