"""Columns of a shard as one row of a table, in which form they pass between processes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from ktray.storage.columns import Rows


def pack(columns: Rows) -> pa.Array:
    """An array with one row: names, dtypes and shapes as JSON, followed by the bytes of each column, copied once.

    A shard is a single row, because Ray Data may split or merge blocks of rows and a shard must stay whole.
    """
    flat = [np.ascontiguousarray(value) for value in columns.values()]
    head = json.dumps([[name, v.dtype.str, v.shape] for name, v in zip(columns, flat, strict=True)]).encode()
    sizes = np.cumsum([0, len(head), *(v.nbytes for v in flat)], dtype=np.int64)
    content = np.empty(sizes[-1], dtype=np.uint8)
    content[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    for value, at in zip(flat, sizes[1:], strict=False):
        if value.size:
            content[at : at + value.nbytes] = value.reshape(-1).view(np.uint8)
    buffers = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(flat) + 1, [None, pa.py_buffer(sizes), pa.py_buffer(content)]
    )
    return pa.ListArray.from_arrays(pa.array([0, len(buffers)], pa.int32()), buffers)


def unpack(packed: pa.ChunkedArray | pa.Array, row: int = 0) -> Rows:
    """Inverse of `pack`. The arrays are copies that the caller may change."""
    return {name: value.copy() for name, value in views(packed, row).items()}


def views(packed: pa.ChunkedArray | pa.Array, row: int = 0) -> Rows:
    """`unpack` without a copy: the arrays are read-only, and each keeps its whole block in memory."""
    head, *content = packed[row].values
    return {
        name: np.frombuffer(value.as_buffer(), dtype=dtype).reshape(shape)
        for (name, dtype, shape), value in zip(json.loads(head.as_py()), content, strict=True)
    }
