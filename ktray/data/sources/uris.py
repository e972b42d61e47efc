"""How one image is named, wherever it lies.

==================================  ==============================================================
``/folder/photo.jpg``               a file; ``s3://bucket/key.jpg`` likewise
``X.tar#member=M&offset=O&size=N``  a tar member: N bytes from byte O of the (unpacked) archive
``X.parquet#row=R``                 a row of a Parquet file; ``&column=C`` where the column was named
``photo.jpg#xywh=X,Y,W,H``          a crop of an image, in pixels (W3C Media Fragments 1.0, 4.2.2);
                                    ``&xywh=...`` behind the others
==================================  ==============================================================

Names are percent-encoded after the ``#``; paths before it are kept as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

Box = tuple[int, int, int, int]

_CROP = re.compile(r"(?P<rest>.+)(?P<mark>[#&])xywh=(?P<box>\d+,\d+,\d+,\d+)", re.DOTALL)
_MEMBER = re.compile(r"(?P<path>.+)#member=(?P<member>[^&#]*)&offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL)
_ROW = re.compile(r"(?P<path>.+)#row=(?P<row>\d+)(?:&column=(?P<column>[^&#]+))?", re.DOTALL)


@dataclass(frozen=True)
class ImageRef:
    """A parsed uri; ``str()`` gives it back.

    Attributes:
        path: the file that holds the image: itself, a tar or a Parquet file.
        member, offset, size: name, first byte and bytes of a tar member.
        row, column: row (from 0) of a Parquet file, and its column when it was not found by itself.
        box: left, top, width and height of a crop, in pixels of the upright image; None for all of it.
    """

    path: str
    member: str | None = None
    offset: int = 0
    size: int = 0
    row: int | None = None
    column: str | None = None
    box: Box | None = None

    @property
    def kind(self) -> str:
        """``file``, ``tar`` or ``parquet``."""
        return "tar" if self.member is not None else "parquet" if self.row is not None else "file"

    @classmethod
    def parse(cls, uri: str) -> ImageRef:
        """Any string is a uri: what does not end in one of the fragments is a file."""
        if found := _CROP.fullmatch(uri):
            whole = cls.parse(found["rest"])
            if found["mark"] == ("#" if whole.kind == "file" else "&") and whole.box is None:
                left, top, width, height = (int(n) for n in found["box"].split(","))
                return replace(whole, box=(left, top, width, height))
        if found := _MEMBER.fullmatch(uri):
            offset, size = int(found["offset"]), int(found["size"])
            member = unquote(found["member"], errors="surrogateescape")
            return cls(found["path"], member=member, offset=offset, size=size)
        if found := _ROW.fullmatch(uri):
            column = unquote(found["column"]) if found["column"] else None
            return cls(found["path"], row=int(found["row"]), column=column)
        return cls(uri)

    def __str__(self) -> str:
        text, mark = self.path, "#"
        if self.member is not None:
            member = quote(self.member, errors="surrogateescape")
            text, mark = f"{text}#member={member}&offset={self.offset}&size={self.size}", "&"
        elif self.row is not None:
            column = f"&column={quote(self.column, safe='')}" if self.column else ""
            text, mark = f"{text}#row={self.row}{column}", "&"
        return f"{text}{mark}xywh={','.join(str(n) for n in self.box)}" if self.box else text

    @property
    def whole(self) -> ImageRef:
        """The image that a crop is cut from."""
        return replace(self, box=None)

    def crop(self, box: Box) -> ImageRef:
        """A part of this image; ``box`` is in its own pixels."""
        left, top = self.box[:2] if self.box else (0, 0)
        return replace(self, box=(left + box[0], top + box[1], box[2], box[3]))
