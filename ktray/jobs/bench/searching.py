"""Search in synthetic galleries of any size: exact against the bare matrix product, compressed against exact.

The vectors form clusters around centres, like embeddings of images with similar content. Uniform noise would not be
compressible, and its nearest neighbours would be no nearer than any other vector.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ktray.distributed.allocation import Allocation
from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import cpu_shards
from ktray.jobs.bench.rows import BenchRow, in_turns
from ktray.recipe.schema import GalleryConfig
from ktray.retrieval.index_dir import IndexDir, IndexedShard
from ktray.stages.index.compress import compress, nearest
from ktray.stages.index.gallery import Gallery, exact

DIMENSIONS = 512
QUERIES = 1000
K = 100
PART_ROWS = 50_000
# Average number of rows around one centre, and their distance from it: cosines are 0.5 to 0.8 within a cluster, and
# about 0 between clusters.
_ROWS_PER_CENTRE = 200
_SPREAD = 0.8


def searching(
    folder: Path, rows: int, plan: Allocation, cores: int, repeats: int, quick: bool = False
) -> Iterator[BenchRow]:
    """Measure queries a second over a gallery of ``rows`` vectors of 512 dimensions; k is 100.

    Args:
        quick: only exact search. The rotation of the compressed index takes a minute to learn, even with few rows.
    """
    gallery = synthetic(folder, rows, plan)
    rng = np.random.default_rng(1)
    queries = _unit(np.stack(gallery.take("embedding", np.sort(rng.choice(rows, QUERIES, replace=False)))))
    limit, reached = in_turns(
        lambda: _product(queries, gallery, cores), lambda: _timed(lambda: exact(queries, gallery, K, plan)), repeats
    )
    tables = sum(file.stat().st_size for file in Path(gallery.folder.path).glob("shards/*.parquet"))
    facts: dict[str, float | int | str] = {
        "rows": rows,
        "dimensions": DIMENSIONS,
        "queries": QUERIES,
        "k": K,
        "table_bytes_per_row": tables / rows,
    }
    yield BenchRow("exact search", "queries/s", "bare matrix product", limit, reached, facts)
    if quick:
        return
    part = GalleryConfig(search="compressed")
    shutil.rmtree(
        Path(gallery.folder.path) / "search", ignore_errors=True
    )  # the index of an earlier run, since this run measures the build
    began = time.perf_counter()
    index = compress(part, gallery, plan)
    built = time.perf_counter() - began
    search = nearest(index, gallery)
    limit, reached = in_turns(
        lambda: _timed(lambda: exact(queries, gallery, K, plan)), lambda: _timed(lambda: search(queries, K)), repeats
    )
    home = next((Path(gallery.folder.path) / "search").glob("*/merged.ivfdata"))
    more = {
        "factory": index["factory"],
        "probes": index["probes"],
        **{f"recall_at_{k}": share for k, share in index["recall"].items()},
        "build_seconds": built,
        "bytes_per_row": home.stat().st_size / rows,
    }
    yield BenchRow("compressed search", "queries/s", "exact search", limit, reached, {**facts, **more})


def synthetic(folder: Path, rows: int, plan: Allocation) -> Gallery:
    """Return an index of ``rows`` unit vectors, written in parts through Ray; existing parts are kept."""
    index = IndexDir(str(folder / f"vectors-{rows}"))
    index.settle({"teacher": "synthetic", "dimensions": DIMENSIONS})
    items: list[Item] = [
        {"name": f"{first // PART_ROWS:05d}", "rows": min(PART_ROWS, rows - first)}
        for first in range(0, rows, PART_ROWS)
    ]
    whole, _ = index.shards([item["name"] for item in items])
    todo = [item for item in items if item["name"] not in whole]
    for shard in cpu_shards(todo, _Synthesise(index, rows, DIMENSIONS), plan):
        index.finish(IndexedShard.from_json(shard))
    return Gallery(index, [(f"{item['name']}-00000", item["rows"]) for item in items])


@dataclass(frozen=True)
class _Synthesise:
    index: IndexDir
    total: int
    dimensions: int

    def __call__(self, item: Item) -> dict[str, object]:
        centres = np.random.default_rng(0).standard_normal(
            (max(1, self.total // _ROWS_PER_CENTRE), self.dimensions), dtype=np.float32
        )
        rng = np.random.default_rng([2, int(item["name"])])
        near = rng.integers(0, len(centres), item["rows"])
        vectors = rng.standard_normal((item["rows"], self.dimensions), dtype=np.float32)
        vectors = _unit(centres[near] + _SPREAD * vectors)
        uris = np.array([f"synthetic://{item['name']}/{i}" for i in range(item["rows"])])
        # Random values, because neither column of real images is compressible.
        prints = rng.integers(0, 2**64, (2, item["rows"]), dtype=np.uint64)
        columns = {"uri": uris, "caption": np.full(item["rows"], ""), "hash": prints[0], "digest": prints[1]}
        part = self.index.write_part(f"{item['name']}-00000", columns, vectors)
        return IndexedShard(item["name"], (part,), item["rows"], item["rows"]).to_json()


def _timed(search: Callable[[], object]) -> float:
    began = time.perf_counter()
    search()
    return QUERIES / (time.perf_counter() - began)


def _product(queries: np.ndarray, gallery: Gallery, cores: int) -> float:
    """Measure queries a second of only ``queries @ rows.T`` in float32, on as many rows as the gallery has."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        left = torch.from_numpy(queries)
        right = torch.from_numpy(gallery.blocks()[0].embedding().astype(np.float32)).T
        _ = left @ right
        began, done = time.perf_counter(), 0
        while done < gallery.total:
            _ = left @ right
            done += right.shape[1]
        # The last block may exceed the size of the gallery.
        return QUERIES / (time.perf_counter() - began) * done / gallery.total
    finally:
        torch.set_num_threads(before)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
