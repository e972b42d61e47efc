"""Maps over shards with Ray Data: CPU tasks prepare the shards, a device computes, and the CPU tasks store the result.

A shard is one unit of work, which is done once its file is in the store. A killed stage therefore resumes with the
missing shards.

On GPUs, a CPU task sends the columns that the device needs to a device worker (`ktray.distributed.device_workers`), and
stores the shard with what comes back. There are two tasks for each CPU: while one waits for the device, the other
decodes. Without GPUs, the task itself computes, because passing pixels to another process would copy them. The process
of such a task keeps the model for the next task. Ray also gives the same processes to the next stage, which saves some
seconds of imports.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from ktray.distributed.allocation import Allocation
from ktray.distributed.assigned import use_assigned_device
from ktray.distributed.device_calls import first_result, map_on_workers
from ktray.distributed.device_work import DeviceWork, Item, in_this_process
from ktray.distributed.device_workers import WORKERS, BorrowedWorker
from ktray.distributed.freed_memory import give_back
from ktray.distributed.packing import pack, unpack
from ktray.distributed.ray_internals import capture_executor, rest_between_steps
from ktray.distributed.watchdog import iterate_watched, waiting_for
from ktray.storage.columns import Rows

Prepare = Callable[[Item], Rows | Iterator[Rows]]
# Turns the result of `DeviceWork.finish` for an item into a table with one row.
ToTable = Callable[[Item, Any], pa.Table]


def map_shards(items: Sequence[Item], prepare: Prepare, work: DeviceWork, plan: Allocation) -> Iterator[dict[str, Any]]:
    """Run every item through ``prepare`` (on a CPU) and ``work``. Yields summaries as they arrive.

    Args:
        items: JSON-able descriptions of shards.
        prepare: turns an item into columns of equal length; it runs on any node. For an item that is too large for the
            memory, it returns an iterator of pieces. Each piece is finished separately: its item has the number of the
            piece as ``piece``, and the item of the last piece has the number of pieces as ``pieces``.
        work: what a device computes from the columns, and how the shard is stored; it returns the summary.
    """
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    # Ray Data passes each result on as soon as it is there: a piece of a shard is finished or reported while the next
    # piece is read.
    dataset.context.target_max_block_size = 1
    pool = WorkerPool(
        min(plan.actors, len(rows)), plan.decode_cpus, plan.actor_cpus, plan.actor_gpus, plan.actor_threads
    )
    if not pool.gpus:
        waiting_for("its tasks", f"{pool.cpus:g} CPUs each")
        yield from _summaries(map_items(dataset, prepare, work, pool, _summary_table))
        return
    waiting_for(
        "its device workers and tasks",
        f"{pool.gpus:g} GPUs and {pool.cpus:g} CPUs each, {pool.decode_cpus:g} CPUs to decode",
    )
    with WORKERS.borrow(pool.size, pool.cpus, pool.gpus, pool.threads) as workers:
        sent = _PrepareSendFinish(prepare, work, workers)
        options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
        yield from _summaries(dataset.map_batches(sent, num_cpus=pool.decode_cpus / 2, **options))


@dataclass(frozen=True)
class WorkerPool:
    """The device workers: ``size`` workers with ``cpus``, ``gpus`` and ``threads`` each.

    On GPUs, they get their input from decode tasks with ``decode_cpus`` each.
    """

    size: int
    decode_cpus: float
    cpus: float
    gpus: float
    threads: int


def map_items(dataset: Any, prepare: Prepare, work: DeviceWork, pool: WorkerPool, to_table: ToTable) -> Any:
    """Run the dataset's items through ``prepare`` and ``work``; returns the dataset of the tables of ``to_table``."""
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    if pool.gpus:
        return dataset.map_batches(_Prepare(prepare), num_cpus=pool.decode_cpus, **options).map_batches(
            _Actor,
            fn_constructor_args=(work, pool.threads, to_table),
            # Fewer actors are enough while the decode tasks are slower, or while a machine of the cluster is missing.
            compute=ActorPoolStrategy(min_size=1, max_size=pool.size),
            num_gpus=pool.gpus,
            num_cpus=pool.cpus,
            **options,
        )
    both = _PrepareAndFinish(prepare, work, pool.threads, to_table)
    # Each task holds a model, so the memory limits their number.
    return dataset.map_batches(both, compute=TaskPoolStrategy(size=pool.size), num_cpus=pool.cpus, **options)


def cpu_shards(
    items: Sequence[Item], work: Callable[[Item], dict[str, Any]], plan: Allocation
) -> Iterator[dict[str, Any]]:
    """Run every item through ``work`` in CPU tasks. Yields the summaries that ``work`` returns, as they arrive."""
    import ray

    if not items:
        return
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Work(work), batch_size=1, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    waiting_for("its tasks", f"{plan.decode_cpus:g} CPUs each")
    yield from _summaries(dataset)


def map_numbered(
    items: Sequence[Any], work: Callable[..., Rows], plan: Allocation, shared: Sequence[Any] = ()
) -> Iterator[tuple[int, Rows]]:
    """Run ``work`` on every item in parallel. Yields (number of the item, columns) as they arrive.

    With GPUs, the device workers do it, otherwise CPU tasks. Without GPUs, a single item is processed in this process.

    Args:
        items: picklable.
        work: called with an item and the ``shared`` values.
        shared: large values. They are put into the object store once, and the processes of a node read the same copy,
            so their arrays must not be changed.
    """
    import ray

    if plan.actor_gpus and items:
        waiting_for("its device workers", f"{plan.actor_gpus:g} GPUs and {plan.actor_cpus:g} CPUs each")
        size = min(plan.actors, len(items))
        with WORKERS.borrow(size, plan.actor_cpus, plan.actor_gpus, plan.actor_threads) as workers:
            kept = [ray.put(value) for value in shared]
            yield from iterate_watched(lambda: map_on_workers(workers, items, work, kept), lambda: None)
        return
    if len(items) < 2:
        yield from ((number, work(item, *shared)) for number, item in enumerate(items))
        return
    numbered = _NumberedWork(list(items), work, [ray.put(value) for value in shared])
    rows = [{"number": number} for number in range(len(items))]
    dataset: Any = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        numbered, batch_size=1, batch_format="pyarrow", num_cpus=plan.decode_cpus
    )
    waiting_for("its tasks", f"{plan.decode_cpus:g} CPUs each")
    for batch in _batches(dataset):
        for i in range(batch.num_rows):
            yield batch.column("number")[i].as_py(), unpack(batch.column("columns"), i)


class _NumberedWork:
    def __init__(self, items: list[Any], work: Callable[..., Rows], shared: list[Any]) -> None:
        self.items, self.work, self.shared = items, work, shared

    def __call__(self, batch: pa.Table) -> pa.Table:
        import ray

        use_assigned_device()
        number = batch.column("number")[0].as_py()
        columns = self.work(self.items[number], *ray.get(self.shared))
        return pa.table({"number": [number], "columns": pack(columns)})


def _batches(dataset: Any) -> Iterator[pa.Table]:
    """The dataset's batches, read under the stage's watchdog."""

    executors: list[Any] = []
    capture_executor(dataset, executors.append)
    rest_between_steps(dataset)

    def end() -> None:
        for executor in executors:
            executor.shutdown(force=True)

    options: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow", "prefetch_batches": 0}
    return iterate_watched(lambda: dataset.iter_batches(**options), end)


def ordered(rows: Sequence[dict[str, Any]]) -> Any:
    """A dataset with one block for each row, whose blocks arrive in the order of the rows."""
    import ray

    dataset: Any = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    rest_between_steps(dataset)
    return dataset


def _summaries(dataset: Any) -> Iterator[dict[str, Any]]:
    for batch in _batches(dataset):
        for text in batch.column("summary").to_pylist():
            yield json.loads(text)


class _Work:
    def __init__(self, work: Callable[[Item], dict[str, Any]]) -> None:
        self.work = work

    def __call__(self, batch: pa.Table) -> pa.Table:
        use_assigned_device()
        items = [json.loads(text) for text in batch.column("item").to_pylist()]
        return pa.table({"summary": [json.dumps(self.work(item), default=float) for item in items]})


def _pieces(item: Item, prepare: Prepare) -> Iterator[tuple[Item, Rows]]:
    """The columns that ``prepare`` returns. If they are pieces, each item has the number of its piece."""
    prepared = prepare(item)
    if isinstance(prepared, dict):
        yield item, prepared
        return
    number, held = 0, next(prepared)  # one piece is held back, to know which one is the last
    for columns in prepared:
        yield {**item, "piece": number}, held
        number, held = number + 1, columns
    yield {**item, "piece": number, "pieces": number + 1}, held


def _summary_table(item: Item, summary: dict[str, Any]) -> pa.Table:
    return pa.table({"summary": [json.dumps(summary, default=float)]})


class _Prepare:
    def __init__(self, prepare: Prepare) -> None:
        self.prepare = prepare

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        use_assigned_device()
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield pa.table({"item": [json.dumps(item)], "columns": pack(columns)})


class _PrepareSendFinish:
    """A CPU task for a shard, whose model is in device workers."""

    def __init__(self, prepare: Prepare, work: DeviceWork, workers: Sequence[BorrowedWorker]) -> None:
        import ray
        from ray import cloudpickle

        content = cloudpickle.dumps(work)
        self.prepare, self.work, self.workers = prepare, work, list(workers)
        self.key, self.reference = hashlib.sha256(content).hexdigest(), ray.put(content)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        use_assigned_device()
        text = batch.column("item")[0].as_py()
        first = zlib.crc32(text.encode())
        for item, columns in _pieces(json.loads(text), self.prepare):
            sent = pa.table({"columns": pack({name: columns[name] for name in self.work.reads})})
            start = partial(self._start, sent)
            computed = unpack(first_result(self.workers, first, start, text[:200]).column("columns"))
            yield _summary_table(item, self.work.finish(item, columns, computed))

    def _start(self, sent: pa.Table, worker: BorrowedWorker) -> Any:
        return worker.compute(self.key, [self.reference], sent)


class _Actor:
    def __init__(self, work: DeviceWork, threads: int, to_table: ToTable) -> None:
        import torch

        use_assigned_device()
        torch.set_num_threads(threads)
        self.finish, self.to_table = in_this_process(work, work.model.load()), to_table

    def __call__(self, batch: pa.Table) -> pa.Table:
        item = json.loads(batch.column("item")[0].as_py())
        return self.to_table(item, self.finish(item, unpack(batch.column("columns"))))


class _PrepareAndFinish:
    """`_Prepare` and `_Actor` in one task. The process keeps the last model for the tasks that follow."""

    kept: tuple[bytes, Any] | None = None

    def __init__(self, prepare: Prepare, work: DeviceWork, threads: int, to_table: ToTable) -> None:
        from ray import cloudpickle

        self.prepare, self.work, self.threads, self.to_table = prepare, work, threads, to_table
        self.name = hashlib.sha256(cloudpickle.dumps(work.model)).digest()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        import torch

        kept = _PrepareAndFinish.kept
        if kept is None or kept[0] != self.name:
            kept = _PrepareAndFinish.kept = None  # dropped before the next model is loaded
            use_assigned_device()
            torch.set_num_threads(self.threads)
            kept = _PrepareAndFinish.kept = self.name, self.work.model.load()
        finish = in_this_process(self.work, kept[1])
        for item, columns in _pieces(json.loads(batch.column("item")[0].as_py()), self.prepare):
            yield self.to_table(item, finish(item, columns))
        give_back()


def forget_model() -> None:
    """Drop the model that tasks have left in this process, and give freed memory back."""
    _PrepareAndFinish.kept = None
    give_back(now=True)
