"""Ray Data shells: shards through a CPU decode pool into one pool of device workers, and shards back out.

One shard is one unit: it is prepared on a CPU, finished by a device worker that writes its result, and is done once
that file stands in the store. A killed stage therefore goes on with the shards that are missing.

A device worker on a GPU is an actor, fed by tasks that decode. Without GPUs one task does both, since pixels that are
handed to another process cost copies, and two kinds of tasks that share few CPUs leave some of them idle. Its process
keeps the model between tasks: Ray hands the same processes to the next stage too, which spares it some seconds of
imports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ktray.resources import Plan
from ktray.store import Dir
from ktray.training.feed import Rows, Window

Item = dict[str, Any]


class Finish(Protocol):
    """The device half of a stage; made once per process, then called for every shard.

    Takes the item and its prepared columns, writes what the stage stores, and returns a summary (JSON-able).
    """

    def __call__(self, item: Item, columns: Rows) -> dict[str, Any]: ...


def map_shards(
    items: Sequence[Item],
    prepare: Callable[[Item], Rows | Iterator[Rows]],
    finish: Callable[[], Finish],
    plan: Plan,
    *,
    device_stage: bool = True,
) -> Iterator[dict[str, Any]]:
    """Run every item through ``prepare`` (CPU task) and ``finish`` (device worker); yields summaries as they come.

    Args:
        items: JSON-able descriptions of shards.
        prepare: item to columns of equal length; runs anywhere. Where an item is too much for the memory at once it
            gives an iterator of pieces: each is finished by itself, its item then has its number as ``piece``, and
            ``pieces``, how many there are, in the last.
        finish: makes the worker's callable; runs once per process.
        device_stage: whether workers hold a GPU where the plan gives them one.
    """
    import ray
    from ray import cloudpickle
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    # What tasks give is to come as it is made: a piece of a shard goes on, or is reported, while the next is read.
    dataset.context.target_max_block_size = 1
    workers, gpus = min(plan.actors, len(rows)), plan.actor_gpus if device_stage else 0.0
    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    if gpus:
        dataset = dataset.map_batches(_Prepare(prepare), num_cpus=plan.decode_cpus, **how).map_batches(
            _Actor,
            fn_constructor_args=(finish, plan.actor_threads),
            compute=ActorPoolStrategy(size=workers),
            num_gpus=gpus,
            num_cpus=plan.actor_cpus,
            **how,
        )
    else:
        both = _Both(prepare, cloudpickle.dumps(finish), plan.actor_threads)
        # No more tasks than models that the memory bears.
        dataset = dataset.map_batches(both, compute=TaskPoolStrategy(size=workers), num_cpus=plan.actor_cpus, **how)
    yield from _summaries(dataset)


def cpu_shards(items: Sequence[Item], work: Callable[[Item], dict[str, Any]], plan: Plan) -> Iterator[dict[str, Any]]:
    """`map_shards` for work without a model: every item through ``work`` in CPU tasks."""
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Work(work), batch_size=1, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    yield from _summaries(dataset)


def map_numbered(items: Sequence[Any], work: Callable[[Any], Rows], plan: Plan) -> Iterator[tuple[int, Rows]]:
    """``work`` on every item (picklable) in parallel tasks, each with a device where the plan gives its workers one;
    yields (number of the item, columns) as they come. A single item is done in this process."""
    if len(items) < 2:
        yield from ((number, work(item)) for number, item in enumerate(items))
        return
    import ray
    from ray.data import TaskPoolStrategy

    rows = [{"number": number} for number in range(len(items))]
    how: dict[str, Any]
    if plan.actor_gpus:
        how = {"num_gpus": plan.actor_gpus, "num_cpus": plan.actor_cpus, "compute": TaskPoolStrategy(plan.actors)}
    else:
        how = {"num_cpus": plan.decode_cpus}
    dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Numbered(list(items), work), batch_size=1, batch_format="pyarrow", **how
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for i in range(batch.num_rows):
            yield batch.column("number")[i].as_py(), _unpack(batch.column("columns"), i)


class _Numbered:
    def __init__(self, items: list[Any], work: Callable[[Any], Rows]) -> None:
        self.items, self.work = items, work

    def __call__(self, batch: pa.Table) -> pa.Table:
        number = batch.column("number")[0].as_py()
        columns = self.work(self.items[number])
        return pa.table({"number": [number], "columns": _pack(columns)})


def _summaries(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for text in batch.column("summary").to_pylist():
            yield json.loads(text)


class _Work:
    def __init__(self, work: Callable[[Item], dict[str, Any]]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = [json.loads(text) for text in batch.column("item").to_pylist()]
        return pa.table({"summary": [json.dumps(self.work(item), default=float) for item in items]})


def _pieces(item: Item, prepare: Callable[[Item], Rows | Iterator[Rows]]) -> Iterator[tuple[Item, Rows]]:
    """What ``prepare`` gives, with its number among the pieces where they are several."""
    found = prepare(item)
    if isinstance(found, dict):
        yield item, found
        return
    number, held = 0, next(found)  # one piece is held back, to know which is the last
    for columns in found:
        yield {**item, "piece": number}, held
        number, held = number + 1, columns
    yield {**item, "piece": number, "pieces": number + 1}, held


class _Prepare:
    def __init__(self, prepare: Callable[[Item], Rows | Iterator[Rows]]) -> None:
        self.prepare = prepare

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield pa.table({"item": [json.dumps(item)], "columns": _pack(columns)})


class _Actor:
    def __init__(self, finish: Callable[[], Finish], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.finish = finish()

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.finished(json.loads(batch.column("item")[0].as_py()), _unpack(batch.column("columns")))

    def finished(self, item: Item, columns: Rows) -> pa.Table:
        return pa.table({"summary": [json.dumps(self.finish(item, columns), default=float)]})


class _Both:
    """`_Prepare` and `_Actor` in a task: the process keeps the last actor that was made, for the tasks that follow."""

    kept: tuple[bytes, _Actor] | None = None

    def __init__(self, prepare: Callable[[Item], Rows | Iterator[Rows]], finish: bytes, threads: int) -> None:
        self.prepare, self.finish, self.threads = prepare, finish, threads

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        from ray import cloudpickle

        kept = _Both.kept
        if kept is None or kept[0] != self.finish:
            _Both.kept = None  # before the next model is loaded
            kept = _Both.kept = self.finish, _Actor(cloudpickle.loads(self.finish), self.threads)
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield kept[1].finished(item, columns)


# Columns travel as one list of buffers a shard: Ray Data may cut or merge blocks of rows, and a shard must stay whole.
_PACKED = pa.list_(pa.large_binary())


def _pack(columns: Rows) -> pa.Array:
    """An array of one row: names, dtypes and shapes as JSON, and then each column's bytes, copied once."""
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


def _unpack(packed: pa.ChunkedArray | pa.Array, row: int = 0) -> Rows:
    """Inverse of `_pack`; the arrays are the caller's own."""
    head, *content = packed[row].values
    out: Rows = {}
    for (name, dtype, shape), value in zip(json.loads(head.as_py()), content, strict=True):
        out[name] = np.frombuffer(value.as_buffer(), dtype=dtype).reshape(shape).copy()
    return out


def pack_rows(columns: Rows) -> bytes:
    """Columns of equal length as Parquet; arrays of more axes become fixed-size binary.

    Shapes and dtypes travel in the schema's metadata.
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
    # Pixels are noise to a dictionary and to most codecs; zstd level 1 costs little and helps flat pictures.
    pq.write_table(table, stream, compression="zstd", compression_level=1, use_dictionary=False)
    packed: bytes = stream.getvalue().to_pybytes()
    return packed


def write_rows(directory: Dir, name: str, columns: Rows) -> int:
    """Write columns as one Parquet shard (`pack_rows`); returns the bytes written."""
    data = pack_rows(columns)
    directory.write(name, data)
    return len(data)


def read_rows(directory: Dir, name: str, columns: Sequence[str] | None = None) -> Rows:
    """Read a shard of `write_rows`."""
    table = pq.read_table(
        pa.BufferReader(directory.read(name)), columns=list(columns) if columns else None, use_threads=False
    )
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    out: Rows = {}
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
            out[key] = flat.reshape(len(column), *shape)
        else:
            out[key] = column.to_numpy(zero_copy_only=False)
    return out


def read_windows(directory: Dir, columns: Sequence[str]) -> Callable[[Sequence[Window]], Iterator[Rows]]:
    """A reader for `ktray.training.feed.Feed` that reads in this process; for sets that stay in memory."""

    def read(windows: Sequence[Window]) -> Iterator[Rows]:
        for window in windows:
            yield _concat([_slice(read_rows(directory, s.shard, columns), s.start, s.step) for s in window])

    return read


def stream_windows(directory: Dir, columns: Sequence[str], cpus: float) -> Callable[[Sequence[Window]], Iterator[Rows]]:
    """A reader for `Feed` through Ray Data: tasks read ahead while the step runs, in the feed's order."""

    def read(windows: Sequence[Window]) -> Iterator[Rows]:
        import ray

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        rows = [
            {"item": json.dumps([s.shard, s.start, s.step, i == len(window) - 1])}
            for window in windows
            for i, s in enumerate(window)
        ]
        dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _ReadSlice(directory, columns), batch_size=1, batch_format="pyarrow", num_cpus=cpus
        )
        parts: list[Rows] = []
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            for i in range(batch.num_rows):
                parts.append(_unpack(batch.column("columns"), i))
                if batch.column("last")[i].as_py():
                    yield _concat(parts)
                    parts = []

    return read


class _ReadSlice:
    def __init__(self, directory: Dir, columns: Sequence[str]) -> None:
        self.directory, self.columns = directory, columns

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard, start, step, last = json.loads(batch.column("item")[0].as_py())
        rows = _slice(read_rows(self.directory, shard, self.columns), start, step)
        return pa.table({"columns": _pack(rows), "last": [last]})


def _slice(rows: Rows, start: int, step: int) -> Rows:
    return rows if (start, step) == (0, 1) else {k: v[start::step] for k, v in rows.items()}


def _concat(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
