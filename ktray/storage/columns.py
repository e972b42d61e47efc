"""Columns of equal length as Parquet shards in a directory of the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.errors import KtrayError
from ktray.storage.concurrent import in_order
from ktray.storage.node_cache import read_through
from ktray.storage.store import Dir

Rows = dict[str, np.ndarray]

SHARDS_AT_ONCE = 4  # a shard may have 64 MB, and is itself read in concurrent parts


def pack_rows(columns: Rows) -> bytes:
    """Encode columns of equal length as Parquet. Arrays with more than one axis become fixed-size binary columns.

    Their shapes and dtypes are in the metadata of the schema.
    """
    arrays, metadata = {}, {}
    for key, value in columns.items():
        if value.ndim == 1 and value.dtype != np.float16:
            arrays[key] = pa.array(value.tolist() if value.dtype.kind in "UO" else value)
            continue
        width = int(np.prod(value.shape[1:])) * value.dtype.itemsize
        flat = np.ascontiguousarray(value)
        arrays[key] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(value), [None, pa.py_buffer(flat.tobytes())]
        )
        metadata[key] = json.dumps([flat.dtype.str, list(value.shape[1:])])
    table = pa.table(arrays).replace_schema_metadata(metadata)
    stream = pa.BufferOutputStream()
    # Dictionaries and most codecs cannot compress pixels; zstd level 1 costs little and helps images with flat areas.
    pq.write_table(
        table, stream, compression="zstd", compression_level=1, use_dictionary=False, write_page_checksum=True
    )
    packed: bytes = stream.getvalue().to_pybytes()
    return packed


def write_rows(directory: Dir, name: str, columns: Rows) -> int:
    """Write columns as one Parquet shard (`pack_rows`); returns the bytes written."""
    data = pack_rows(columns)
    directory.write(name, data)
    return len(data)


def read_rows(directory: Dir, name: str, columns: Sequence[str] | None = None, version: str = "") -> Rows:
    """Read a shard of `write_rows`. The checksum of each page is verified.

    Args:
        columns: names of the columns to read; None: all.
        version: version of the shard, for a copy on this node (`ktray.storage.node_cache.read_through`); empty: the
            shard is read from the store.

    Raises:
        KtrayError: the file differs from what was written.
    """
    data = pa.BufferReader(read_through(directory, name, version))
    wanted = list(columns) if columns else None
    try:
        table = pq.read_table(data, columns=wanted, use_threads=False, page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise KtrayError(
            f"'{directory.uri}/{name}' is broken: {' '.join(str(error).split())}",
            f"Delete {directory.uri} and run again: its contents are then computed again.",
        ) from None
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    rows: Rows = {}
    for key in table.column_names:
        column = table.column(key).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        if key in metadata:
            dtype, shape = json.loads(metadata[key])
            width = column.type.byte_width
            buffer = column.buffers()[1]
            flat = np.frombuffer(
                buffer,
                dtype=np.dtype(dtype),
                count=len(column) * width // np.dtype(dtype).itemsize,
                offset=column.offset * width,
            )
            rows[key] = flat.reshape(len(column), *shape)
        else:
            rows[key] = column.to_numpy(zero_copy_only=False)
    return rows


def read_shards(
    directory: Dir, names: Sequence[str], columns: Sequence[str] | None = None, version: str = ""
) -> Iterator[Rows]:
    """`read_rows` of each shard, in order; from a remote store, a few shards are read concurrently."""
    calls = (partial(read_rows, directory, name, columns, version) for name in names)
    return in_order(calls, 1 if directory.is_local else SHARDS_AT_ONCE)
