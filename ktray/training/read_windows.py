"""Readers of windows of rows for `ktray.training.sampler.RowSampler`: rows are stored, or computed when needed."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa

from ktray.distributed.device_work import Item
from ktray.distributed.packing import views
from ktray.distributed.ray_data import WorkerPool, map_items, ordered
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Dir
from ktray.targets.jpeg import decode_views
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Loaded, Predict
from ktray.training.messages import BadImages, TeacherFlops
from ktray.training.read_slices import ReadSlice, SliceTask, slice_table, some_images
from ktray.training.sampler import Reader, Window
from ktray.training.window_buffers import FillingWindow, WindowBuffers

T = TypeVar("T")
Report = Callable[[BadImages | TeacherFlops], None]
# Slices of a dataset: reading them takes minutes, starting the dataset a fraction of a second. Each dataset starts new
# teachers on GPUs, which takes as long as 50 slices, so it then has the slices of an hour.
SLICES, SLICES_ON_GPUS = 512, 8192


def read_windows(directory: Dir, columns: Sequence[str], version: str = "") -> Reader:
    """A reader that reads stored shards in this process, for sets of rows that stay in memory.

    Args:
        version: version of the shards (`ktray.storage.node_cache.read_through`).
    """

    def read(windows: Iterable[Window]) -> Iterator[Rows]:
        windows = list(windows)  # one for each virtual rank
        # A shard that several virtual ranks share is read once, and each takes its rows of it.
        shared = len({s.shard for w in windows for s in w}) < sum(map(len, windows))
        whole = (cache if shared else lambda plain: plain)(lambda shard: read_rows(directory, shard, columns, version))
        for window in windows:
            yield _concat([decode_views(some_images(whole(s.shard), s.start, s.step, s.views)) for s in window])

    return read


def stream_windows(
    directory: Dir, columns: Sequence[str], cpus: float, version: str = "", apart: bool = False
) -> Reader:
    """A reader that uses Ray Data: tasks read stored shards in the sampler's order, ahead of the training steps.

    Args:
        cpus: CPUs of a task.
        version: version of the shards, of which each node then keeps copies (`ktray.storage.node_cache`).
        apart: as for `_StreamReader`.
    """
    read = ReadSlice(directory, columns, version)
    return _StreamReader(lambda dataset: _map_slices(dataset, read, cpus), None, SLICES, apart)


def made_windows(
    directory: Dir,
    cut: MakeViews,
    predict: Predict | None,
    columns: Sequence[str],
    pool: WorkerPool,
    report: Report,
    apart: bool = False,
) -> Reader:
    """A reader that computes rows when they are needed. Images are decoded and cut into views; with ``predict``, a
    teacher that runs during training computes the targets.

    Args:
        directory: the directory of TEACH, with a list of images for each shard.
        predict: the teacher; without it, the views keep the size at which they were cut.
        columns: the columns of the rows.
        pool: the workers that compute the rows; without ``predict``, only the CPUs of its decode tasks are used.
        report: receives `BadImages` (each image once) and `TeacherFlops`.
        apart: as for `_StreamReader`.
    """
    cut_slice = _CutSlice(directory, cut, columns)
    if predict is None:
        return _StreamReader(lambda dataset: _map_slices(dataset, cut_slice, pool.decode_cpus), report, SLICES, apart)
    slices = SLICES_ON_GPUS if pool.gpus else SLICES
    work = _PredictRows(predict)
    return _StreamReader(lambda dataset: map_items(dataset, cut_slice, work, pool, slice_table), report, slices, apart)


class _StreamReader:
    """Reads windows as a chain of datasets of slices, in order.

    Ray Data needs a block for each slice before a dataset starts, about 0.6 ms each. A dataset therefore has the slices
    of a few windows, and the next one starts while the last window of the current one is read.

    Args:
        compute: turns a dataset of items into a dataset of packed rows.
        report: receives messages about the rows.
        slices: number of slices from which a dataset has no further window.
        apart: whether Ray Data schedules its tasks in a process of its own, and not on threads of this one. That takes
            some seconds to start, so the first dataset, for which the first batch waits, is scheduled here.
    """

    def __init__(self, compute: Callable[[Any], Any], report: Report | None, slices: int, apart: bool = False) -> None:
        self.compute, self.report, self.slices, self.apart = compute, report, slices, apart
        self.reported: set[str] = set()  # the uris of bad images
        self.buffers = WindowBuffers()

    def __call__(self, windows: Iterable[Window]) -> Iterator[Rows]:
        groups = group_windows(windows, self.slices)
        group = next(groups, None)
        begun = in_background(partial(self._begin, group, False)) if group else None
        while group and begun:
            batches, sizes = begun.result(), deque(sum(s.count for s in window) for window in group)
            group, begun = next(groups, None), None
            window = FillingWindow(sizes[0], self.buffers)
            for batch in batches:
                if len(sizes) == 1 and group and begun is None:
                    begun = in_background(partial(self._begin, group, self.apart))
                for i in range(batch.num_rows):
                    window.add(self._report(views(batch.column("columns"), i)))
                    if batch.column("last")[i].as_py():
                        yield window.take()
                        sizes.popleft()
                        window = FillingWindow(sizes[0] if sizes else 0, self.buffers)
            if group and begun is None:
                begun = in_background(partial(self._begin, group, self.apart))

    def _begin(self, windows: Sequence[Window], apart: bool) -> Iterator[pa.Table]:
        """The batches of one dataset; the first one is read already."""
        rows = [
            {"item": json.dumps({**asdict(s), "last": i == len(window) - 1})}
            for window in windows
            for i, s in enumerate(window)
        ]
        dataset = self.compute(ordered(rows))
        if apart:
            (dataset,) = dataset.streaming_split(1)
        batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
        return chain([next(batches)], batches)

    def _report(self, rows: Rows) -> Rows:
        """The rows without the columns that are reported to the driver."""
        bad, flops = rows.pop("bad", None), rows.pop("flops", None)
        if self.report is not None and flops is not None:
            self.report(TeacherFlops(float(flops.sum())))
        if self.report is not None and bad is not None:
            new = tuple((str(uri), str(reason)) for uri, reason in bad.tolist() if uri not in self.reported)
            self.reported |= {uri for uri, _ in new}
            if new:
                self.report(BadImages(new))
        return rows


def _map_slices(dataset: Any, prepare: Callable[[Item], Rows], cpus: float) -> Any:
    # Ray Data may start a task 0.1 s late, which is as long as a slice takes: two tasks for each CPU keep it busy.
    return dataset.map_batches(SliceTask(prepare), batch_size=1, batch_format="pyarrow", num_cpus=cpus / 2)


@dataclass(frozen=True)
class _CutSlice:
    directory: Dir
    cut: MakeViews
    columns: Sequence[str]

    def __call__(self, item: Item) -> Rows:
        rows = self.cut.some(self.directory.read_json(listed(item["shard"])), item["start"], item["step"])
        return {name: value for name, value in rows.items() if name in self.columns or name == "bad"}


@dataclass(frozen=True)
class _PredictRows:
    """Adds the teacher's targets to rows."""

    predict: Predict

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> Predict:
        return self.predict

    def compute(self, model: Loaded, columns: Rows) -> Rows:
        pixels = columns["pixels"]
        return {**model.targets(pixels), "flops": np.array([model.flops * len(pixels)])}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> Rows:
        return {**columns, **self.predict.resized(columns), **computed}


def group_windows(windows: Iterable[Window], slices: int) -> Iterator[list[Window]]:
    """Consecutive windows in groups of as few as have together at least ``slices`` slices. A group is returned as soon
    as its windows are known."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if sum(map(len, group)) >= slices:
            yield group
            group = []
    if group:
        yield group


def in_background(call: Callable[[], T]) -> Future[T]:
    """The result of a call on a thread of its own, which does not keep the process alive."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=copy_context().run, args=(run,), name="ktray-read", daemon=True).start()
    return result


def listed(shard: str) -> str:
    """Name of the file with the list of a shard's images: ``uris`` and ``beside``, the input of `MakeViews`."""
    return f"{shard}.images"


def _concat(parts: Sequence[Rows]) -> Rows:
    """The concatenated columns."""
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
