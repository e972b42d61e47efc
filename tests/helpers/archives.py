"""Tar and Parquet shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def tar_bytes(members: list[tuple[str, bytes | tarfile.TarInfo]], mode: str = "w") -> bytes:
    """An archive of (name, content); a TarInfo in place of content is added as it is (links, folders)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def write_parquet(path: Path | str, columns: dict[str, pa.Array], group: int = 1000) -> str:
    pq.write_table(pa.table(columns), str(path), row_group_size=group)
    return str(path)
