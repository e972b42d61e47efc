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
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ktray.distributed.allocation import Allocation
from ktray.distributed.ray_internals import capture_executor
from ktray.distributed.watchdog import iterate_watched, waiting_for
from ktray.storage.columns import Rows

Item = dict[str, Any]
Prepare = Callable[[Item], Rows | Iterator[Rows]]
# What a device worker found for an item, as a table of one row.
Give = Callable[[Item, Any], pa.Table]
# The device half of a stage, made once per process and then called for every shard: takes the item and its prepared
# columns, writes what the stage stores, and returns a summary (JSON-able).
Finish = Callable[[Item, Rows], dict[str, Any]]


def map_shards(
    items: Sequence[Item],
    prepare: Prepare,
    finish: Callable[[], Finish],
    plan: Allocation,
) -> Iterator[dict[str, Any]]:
    """Run every item through ``prepare`` (CPU task) and ``finish`` (device worker); yields summaries as they come.

    Args:
        items: JSON-able descriptions of shards.
        prepare: item to columns of equal length; runs anywhere. Where an item is too much for the memory at once it
            gives an iterator of pieces: each is finished by itself, its item then has its number as ``piece``, and
            ``pieces``, how many there are, in the last.
        finish: makes the worker's callable; runs once per process.
    """
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    # What tasks give is to come as it is made: a piece of a shard goes on, or is reported, while the next is read.
    dataset.context.target_max_block_size = 1
    crew = WorkerPool(
        min(plan.actors, len(rows)), plan.decode_cpus, plan.actor_cpus, plan.actor_gpus, plan.actor_threads
    )
    waiting_for(
        "its tasks",
        f"{crew.gpus:g} GPUs and {crew.cpus:g} CPUs each"
        + (f", {crew.decode_cpus:g} CPUs to decode" if crew.gpus else ""),
    )
    yield from _summaries(map_items(dataset, prepare, finish, crew, _tell))


@dataclass(frozen=True)
class WorkerPool:
    """Who finishes: ``size`` device workers of ``cpus``, ``gpus`` and ``threads`` each; on GPUs fed by decode tasks of
    ``decode_cpus``."""

    size: int
    decode_cpus: float
    cpus: float
    gpus: float
    threads: int


def map_items(dataset: Any, prepare: Prepare, finish: Callable[[], Any], crew: WorkerPool, give: Give) -> Any:
    """The dataset's items through both halves."""
    from ray import cloudpickle
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    how: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    if crew.gpus:
        return dataset.map_batches(_Prepare(prepare), num_cpus=crew.decode_cpus, **how).map_batches(
            _Actor,
            fn_constructor_args=(finish, crew.threads, give),
            # Fewer will do while the decoders are behind, or while a machine of the cluster is gone.
            compute=ActorPoolStrategy(min_size=1, max_size=crew.size),
            num_gpus=crew.gpus,
            num_cpus=crew.cpus,
            **how,
        )
    both = _Both(prepare, cloudpickle.dumps(finish), crew.threads, give)
    # No more tasks than models that the memory bears.
    return dataset.map_batches(both, compute=TaskPoolStrategy(size=crew.size), num_cpus=crew.cpus, **how)


def cpu_shards(
    items: Sequence[Item], work: Callable[[Item], dict[str, Any]], plan: Allocation
) -> Iterator[dict[str, Any]]:
    """`map_shards` for work without a model: every item through ``work`` in CPU tasks."""
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Work(work), batch_size=1, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    waiting_for("its tasks", f"{plan.decode_cpus:g} CPUs each")
    yield from _summaries(dataset)


def map_numbered(items: Sequence[Any], work: Callable[[Any], Rows], plan: Allocation) -> Iterator[tuple[int, Rows]]:
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
    waiting_for(
        "its tasks",
        f"{plan.actor_gpus:g} GPUs and {plan.actor_cpus if plan.actor_gpus else plan.decode_cpus:g} CPUs each",
    )
    for batch in _batches(dataset):
        for i in range(batch.num_rows):
            yield batch.column("number")[i].as_py(), unpack(batch.column("columns"), i)


class _Numbered:
    def __init__(self, items: list[Any], work: Callable[[Any], Rows]) -> None:
        self.items, self.work = items, work

    def __call__(self, batch: pa.Table) -> pa.Table:
        number = batch.column("number")[0].as_py()
        columns = self.work(self.items[number])
        return pa.table({"number": [number], "columns": pack(columns)})


def _batches(dataset: Any) -> Iterator[pa.Table]:
    """What the dataset gives, under the eyes of the watchdog."""

    begun: list[Any] = []
    capture_executor(dataset, begun.append)

    def end() -> None:
        for executor in begun:
            executor.shutdown(force=True)

    how: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": 0}
    return iterate_watched(lambda: dataset.iter_batches(**how), end)


def ordered(rows: Sequence[dict[str, Any]]) -> Any:
    """A dataset of one block for each row, whose blocks come in the order of the rows."""
    import ray

    dataset: Any = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def _summaries(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in _batches(dataset):
        for text in batch.column("summary").to_pylist():
            yield json.loads(text)


class _Work:
    def __init__(self, work: Callable[[Item], dict[str, Any]]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = [json.loads(text) for text in batch.column("item").to_pylist()]
        return pa.table({"summary": [json.dumps(self.work(item), default=float) for item in items]})


def _pieces(item: Item, prepare: Prepare) -> Iterator[tuple[Item, Rows]]:
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


def _tell(item: Item, summary: dict[str, Any]) -> pa.Table:
    return pa.table({"summary": [json.dumps(summary, default=float)]})


class _Prepare:
    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield pa.table({"item": [json.dumps(item)], "columns": pack(columns)})


class _Actor:
    def __init__(self, finish: Callable[[], Any], threads: int, give: Give) -> None:
        import torch

        torch.set_num_threads(threads)
        self.finish, self.give = finish(), give

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.finished(json.loads(batch.column("item")[0].as_py()), unpack(batch.column("columns")))

    def finished(self, item: Item, columns: Rows) -> pa.Table:
        return self.give(item, self.finish(item, columns))


class _Both:
    """`_Prepare` and `_Actor` in a task: the process keeps the last actor that was made, for the tasks that follow."""

    kept: tuple[bytes, _Actor] | None = None

    def __init__(self, prepare: Prepare, finish: bytes, threads: int, give: Give) -> None:
        self.prepare, self.finish, self.threads, self.give = prepare, finish, threads, give

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        from ray import cloudpickle

        kept = _Both.kept
        if kept is None or kept[0] != self.finish:
            _Both.kept = None  # before the next model is loaded
            kept = _Both.kept = self.finish, _Actor(cloudpickle.loads(self.finish), self.threads, self.give)
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield kept[1].finished(item, columns)


def pack(columns: Rows) -> pa.Array:
    """An array of one row: names, dtypes and shapes as JSON, and then each column's bytes, copied once.

    One row a shard, since Ray Data may cut or merge blocks of rows and a shard must stay whole.
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
    """Inverse of `pack`; the arrays are the caller's own."""
    return {name: value.copy() for name, value in views(packed, row).items()}


def views(packed: pa.ChunkedArray | pa.Array, row: int = 0) -> Rows:
    """`unpack` without the copy: arrays that cannot be written to, and that hold the block they lie in."""
    head, *content = packed[row].values
    return {
        name: np.frombuffer(value.as_buffer(), dtype=dtype).reshape(shape)
        for (name, dtype, shape), value in zip(json.loads(head.as_py()), content, strict=True)
    }
