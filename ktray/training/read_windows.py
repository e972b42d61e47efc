"""Windows of rows for `sampler.RowSampler`, from shards that are stored or made when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from ktray.distributed.ray_data import Item, WorkerPool, map_items, ordered, pack, views
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Dir
from ktray.targets.jpeg import decode_views
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Predict
from ktray.training.messages import BadImages, TeacherFlops
from ktray.training.sampler import Reader, Window

Report = Callable[[BadImages | TeacherFlops], None]


def read_windows(directory: Dir, columns: Sequence[str]) -> Reader:
    """A reader that reads stored shards in this process; for sets that stay in memory."""

    def read(windows: Sequence[Window]) -> Iterator[Rows]:
        # Lanes that share a shard each take some of its rows; it is read once.
        shared = len({s.shard for w in windows for s in w}) < sum(map(len, windows))
        whole = (cache if shared else lambda plain: plain)(lambda shard: read_rows(directory, shard, columns))
        for window in windows:
            yield _concat([decode_views(_every(whole(s.shard), s.start, s.step)) for s in window])

    return read


def stream_windows(directory: Dir, columns: Sequence[str], cpus: float) -> Reader:
    """A reader through Ray Data: tasks read stored shards ahead while the step runs, in the feed's order."""
    return _Streamed(lambda dataset: _handed(dataset, _ReadSlice(directory, columns), cpus))


def made_windows(
    directory: Dir, cut: MakeViews, predict: Predict | None, columns: Sequence[str], crew: WorkerPool, report: Report
) -> Reader:
    """A reader whose rows are made when they are asked for: images are decoded and cut, and, with ``predict``, shown to
    a teacher beside the training.

    Args:
        directory: of TEACH, with a list of images for each shard's name.
        predict: without it the views keep the size they were cut at.
        columns: that the rows have.
        crew: who makes them; without ``predict`` only its decoders.
        report: gets `BadImages` (each image once) and `TeacherFlops`.
    """
    cutting = _CutSlice(directory, cut, columns)
    if predict is None:
        return _Streamed(lambda dataset: _handed(dataset, cutting, crew.decode_cpus), report)
    return _Streamed(lambda dataset: map_items(dataset, cutting, _Answer(predict), crew, _hand), report)


class _Streamed:
    """Windows as one dataset of slices, in order."""

    def __init__(self, made: Callable[[Any], Any], report: Report | None = None) -> None:
        self.made, self.report = made, report
        self.told: set[str] = set()

    def __call__(self, windows: Sequence[Window]) -> Iterator[Rows]:
        rows = [
            {"item": json.dumps({"shard": s.shard, "start": s.start, "step": s.step, "last": i == len(window) - 1})}
            for window in windows
            for i, s in enumerate(window)
        ]
        parts: list[Rows] = []
        for batch in self.made(ordered(rows)).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            for i in range(batch.num_rows):
                parts.append(self._told(views(batch.column("columns"), i)))
                if batch.column("last")[i].as_py():
                    yield _concat(parts)
                    parts = []

    def _told(self, rows: Rows) -> Rows:
        bad, flops = rows.pop("bad", None), rows.pop("flops", None)
        if self.report is not None and flops is not None:
            self.report(TeacherFlops(float(flops.sum())))
        if self.report is not None and bad is not None:
            new = tuple((str(uri), str(reason)) for uri, reason in bad.tolist() if uri not in self.told)
            self.told |= {uri for uri, _ in new}
            if new:
                self.report(BadImages(new))
        return rows


def _handed(dataset: Any, prepare: Callable[[Item], Rows], cpus: float) -> Any:
    # Ray Data starts a task up to 0.1 s after it could, and a slice takes as long: two for each CPU keep it busy.
    return dataset.map_batches(_Handed(prepare), batch_size=1, batch_format="pyarrow", num_cpus=cpus / 2)


class _Handed:
    def __init__(self, prepare: Callable[[Item], Rows]) -> None:
        self.prepare = prepare

    def __call__(self, batch: pa.Table) -> pa.Table:
        item = json.loads(batch.column("item")[0].as_py())
        return _hand(item, self.prepare(item))


def _hand(item: Item, rows: Rows) -> pa.Table:
    return pa.table({"columns": pack(rows), "last": [bool(item["last"])]})


@dataclass(frozen=True)
class _ReadSlice:
    directory: Dir
    columns: Sequence[str]

    def __call__(self, item: Item) -> Rows:
        return _read(self.directory, self.columns, item["shard"], item["start"], item["step"])


@dataclass(frozen=True)
class _CutSlice:
    directory: Dir
    cut: MakeViews
    columns: Sequence[str]

    def __call__(self, item: Item) -> Rows:
        found = self.cut.some(self.directory.read_json(listed(item["shard"])), item["start"], item["step"])
        return {name: value for name, value in found.items() if name in self.columns or name == "bad"}


@dataclass(frozen=True)
class _Answer:
    """Makes the teacher's half where it runs."""

    predict: Predict

    def __call__(self) -> Callable[[Item, Rows], Rows]:
        loaded = self.predict.load()

        def answer(item: Item, rows: Rows) -> Rows:
            pixels = rows.pop("pixels")
            return {**loaded.rows(pixels), **rows, "flops": np.array([loaded.flops * len(pixels)])}

        return answer


def listed(shard: str) -> str:
    """The file with the list of a shard's images: ``uris`` and ``beside``, as `MakeViews` takes them."""
    return f"{shard}.images"


def _read(directory: Dir, columns: Sequence[str], shard: str, start: int, step: int) -> Rows:
    return decode_views(_every(read_rows(directory, shard, columns), start, step))


def _every(rows: Rows, start: int, step: int) -> Rows:
    return rows if (start, step) == (0, 1) else {k: v[start::step] for k, v in rows.items()}


def _concat(parts: Sequence[Rows]) -> Rows:
    """Arrays of their own, a single part's too: it may lie in Ray's store, which is not to hold a whole window."""
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
