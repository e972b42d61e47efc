"""Decode and crop, from encoded images to a model's input: Ray Data against the bare decoder on the same cores."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

import torch

from ktray.data.decode import MAX_PIXELS
from ktray.data.fingerprints import fingerprint
from ktray.data.preprocess import Preprocess
from ktray.data.sources.base import Shard
from ktray.data.sources.fetch import decode_image
from ktray.data.sources.shards import read_shard
from ktray.distributed.allocation import Allocation
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.jobs.bench.rows import BenchRow, in_turns
from ktray.retrieval.crops import Crops
from ktray.stages.index.decode import DecodeGallery
from ktray.storage.columns import Rows

SIDE = 224


def reading(shards: list[Shard], plan: Allocation, cores: int, repeats: int) -> BenchRow:
    """Measure INDEX's reading (from files to pixels of 224 px and fingerprints at the input of the encoder) against the
    same functions on bytes in memory, with one process for each core and no communication."""
    preprocess = Preprocess(size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3)
    limit, reached = in_turns(
        lambda: bare(shards, preprocess, cores), lambda: through_ray(shards, preprocess, plan), repeats
    )
    alone = bare(shards, preprocess, cores, prints=False)
    facts: dict[str, float | int | str] = {"images_per_core_second_without_fingerprints": alone / cores, "side": SIDE}
    return BenchRow(
        "decode, crop, fingerprint", "images/s", f"same functions in {cores} bare processes", limit, reached, facts
    )


def through_ray(shards: list[Shard], preprocess: Preprocess, plan: Allocation) -> float:
    """Measure images a second, from the call to the last image."""
    items: list[Item] = [{"shard": i, "name": s.fingerprint, "source": s.paths[0]} for i, s in enumerate(shards)]
    began = time.perf_counter()
    images = sum(
        done["rows"]
        for done in map_shards(items, DecodeGallery(shards, preprocess, Crops(), MAX_PIXELS), _Count(), plan)
    )
    return images / (time.perf_counter() - began)


class _Count:
    """Work without a model."""

    reads: tuple[str, ...] = ()

    @property
    def model(self) -> _Count:
        return self

    def load(self) -> None:
        return None

    def compute(self, model: None, columns: Rows) -> Rows:
        return {}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        return {"rows": len(columns["pixels"])}


def bare(shards: list[Shard], preprocess: Preprocess, cores: int, prints: bool = True) -> float:
    """Measure images a second of ``cores`` processes together, without their start-up and the reading of files."""
    context = multiprocessing.get_context("spawn")
    work = _Bare(shards, preprocess, prints)
    ready, results = context.Barrier(cores), context.SimpleQueue()
    processes = [context.Process(target=work, args=(part, cores, ready, results)) for part in range(cores)]
    for process in processes:
        process.start()
    timings = [results.get() for _ in processes]
    for process in processes:
        process.join()
    images, began, ended = zip(*timings, strict=True)
    return sum(images) / (max(ended) - min(began))


@dataclass(frozen=True)
class _Bare:
    shards: list[Shard]
    preprocess: Preprocess
    prints: bool

    def __call__(self, part: int, parts: int, ready: Any, results: Any) -> None:
        torch.set_num_threads(1)
        records = [r for shard in self.shards for r in read_shard(shard)][part::parts]
        kept = None
        ready.wait()
        began = time.monotonic()
        for record in records:
            image = decode_image(record.uri, record.data, record.error, max_pixels=MAX_PIXELS)
            kept = self.preprocess.eval_transform(image), fingerprint([image]) if self.prints else None
        ended = time.monotonic()
        assert kept is not None
        results.put((len(records), began, ended))
