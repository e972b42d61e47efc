"""Training rows from JPEGs without training: Ray Data against a torch DataLoader with the same decoder on the same
cores, and against the rate of a student."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

from ktray.data.sources.fetch import fetch
from ktray.distributed.allocation import Allocation
from ktray.jobs.bench.lesson import CASES, FEWER, SHARD, BenchTargets, ensure_targets, less
from ktray.jobs.bench.rows import BenchRow, in_turns
from ktray.jobs.bench.training import bare
from ktray.recipe.schema import TrainConfig
from ktray.targets.make_views import MakeViews
from ktray.training.read_windows import listed
from ktray.training.worker import WorkerContext

STUDENT = "mobilenetv3_small_050"
# Only the second half is measured: the processes have started by then, and the rows that are ready in advance are few.
PASSES = 16


def ingest(folder: Path, plan: Allocation, cores: int, repeats: int, quick: bool = False) -> Iterator[BenchRow]:
    """Measure images a second from JPEGs in tar files to batches of views, without a consumer.

    Args:
        quick: use few images.
    """
    targets = ensure_targets(less(CASES[STUDENT]) if quick else CASES[STUDENT], folder, plan)
    data = encoded(targets)
    paths = loose(data, folder / "photos" / "loose")
    what = f"JPEGs of 500 x 375 to {targets.cut.size} px"
    rates = in_turns(lambda: by_loader(targets, paths, cores), lambda: by_ray(targets, plan), repeats)
    yield BenchRow(f"ingest, {what}", "images/s", f"torch DataLoader, {cores} workers, same decoder", *rates)
    steps = 48 // (FEWER if quick else 1)
    rates = in_turns(lambda: bare(targets, steps, plan), lambda: by_ray(targets, plan), repeats, warm=False)
    yield BenchRow(f"ingest, {what}", "images/s", f"rate of the bare step of {targets.case.name}", *rates)
    # Measured in Ray workers: they keep freed memory, while a plain process returns it and causes page faults again.
    in_worker = partial(_in_worker, targets=targets, data=data)
    rates = in_turns(lambda: in_worker(decoded), lambda: in_worker(cut), repeats)
    yield BenchRow(f"decode and crop, {what}", "images/s a core", "the decoder alone", *rates)


def encoded(targets: BenchTargets) -> list[tuple[str, bytes]]:
    """Return the URIs and bytes of the case's images."""
    uris = [uri for name, _ in targets.shards for uri in targets.stage.read_json(listed(name))["uris"]]
    return [(uri, data) for uri, data, _ in fetch(uris) if data is not None]


def loose(data: list[tuple[str, bytes]], folder: Path) -> list[str]:
    """Write images as single files, which are the usual input of a DataLoader; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.jpg" for number in range(len(data))]
    for path, (_, content) in zip(paths, data, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def by_ray(targets: BenchTargets, plan: Allocation) -> float:
    """Measure images a second of TRANSFER's reading of originals in tar files, in a worker like TRANSFER's, with all
    CPUs for its decoders."""
    import ray

    remote: Any = ray.remote(num_cpus=plan.worker_cpus)(_read)
    rate: float = ray.get(remote.remote(targets, plan.decode_cpus))
    return rate


def _read(targets: BenchTargets, decode_cpus: float) -> float:
    env = WorkerContext(torch.device("cpu"), 0, 1, decode_cpus)
    # One shard at a time: if the window were as large as the set, the second pass would be ready before the first ends.
    part = TrainConfig(resident_bytes=0, window_bytes=SHARD * targets.target_set("live").row_bytes)
    batch, steps = targets.case.batch, PASSES * targets.case.images // targets.case.batch
    half, began = steps // 2, 0.0
    for number, _ in enumerate(targets.target_set("live").batches(part, env, batch, 0, 0, steps)):
        if number == half - 1:
            began = time.perf_counter()
    return (steps - half) * batch / (time.perf_counter() - began)


class _Views(Dataset[np.ndarray]):
    def __init__(self, paths: list[str], cut: MakeViews) -> None:
        self.paths, self.cut = paths, cut

    def __len__(self) -> int:
        return PASSES * len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        path = self.paths[row % len(self.paths)]
        return _view(self.cut, path, Path(path).read_bytes())


def _view(cut: MakeViews, uri: str, data: bytes) -> np.ndarray:
    pixels = np.empty((1, 3, cut.size, cut.size), np.uint8)
    cut.views_of(uri, data, None, pixels)
    return pixels[0]


def by_loader(targets: BenchTargets, paths: list[str], cores: int) -> float:
    """Measure images a second of a DataLoader over image files, in random order, with a worker for each core."""
    batch = targets.case.batch
    how: dict[str, Any] = {"shuffle": True, "num_workers": cores, "multiprocessing_context": "fork"}
    loader = DataLoader(_Views(paths, targets.cut), batch_size=batch, **how)
    half, began = len(loader) // 2, 0.0
    for number, _ in enumerate(loader):
        if number == half - 1:
            began = time.perf_counter()
    return (len(loader) - half) * batch / (time.perf_counter() - began)


def _in_worker(
    work: Callable[[BenchTargets, list[tuple[str, bytes]]], float], targets: BenchTargets, data: Any
) -> float:
    import ray

    remote: Any = ray.remote(num_cpus=1)(work)
    rate: float = ray.get(remote.remote(targets, data))
    return rate


def decoded(targets: BenchTargets, data: list[tuple[str, bytes]]) -> float:
    """Measure images a second of the decoder alone, on one core."""
    began = time.perf_counter()
    for _, content in data:
        simplejpeg.decode_jpeg(content, "RGB")
    return len(data) / (time.perf_counter() - began)


def cut(targets: BenchTargets, data: list[tuple[str, bytes]]) -> float:
    """Measure images a second of decoder and views, on one core."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    for uri, content in data:
        _view(targets.cut, uri, content)
    return len(data) / (time.perf_counter() - began)
