"""The work of the driver at 15 million gallery images and 100 epochs, with real code on numbers and without images."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GALLERY, EPOCHS, BATCH, VIEWS = 15_000_000, 100, 512, 4
PIXELS = 3 * 224**2
WINDOW_BYTES = 2 << 30


def driver(transfer: int, queries: int) -> list[dict[str, float | str]]:
    """Seconds and peak memory (bytes) of each part, every one in a process of its own.

    Args:
        transfer: number of images of the transfer set.
        queries: number of labelled images.
    """
    found = []
    for name in PARTS:
        command = [sys.executable, str(Path(__file__).resolve()), name, str(transfer), str(queries)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(out.splitlines()[-1]))
    return found


def parts_of_the_index(transfer: int, queries: int) -> str:
    """The index as a table: one part for each tar of 1,000 images, in blocks for the search."""
    from ktray.retrieval.index_dir import IndexDir
    from ktray.stages.index.gallery import Gallery

    gallery = Gallery(IndexDir("/nowhere"), [(f"part-{n:06d}", 1000) for n in range(GALLERY // 1000)])
    return f"{len(gallery.parts):,} parts, {len(gallery.blocks())} blocks"


def merged_hits(transfer: int, queries: int) -> str:
    """The hits of the blocks, merged as they come; their number for each query is what the transfer set needs."""
    import numpy as np

    from ktray.retrieval.search import merge
    from ktray.stages.index.gallery import BLOCK_ROWS

    k = _k(transfer, queries)
    rng = np.random.default_rng(0)
    block = np.sort(rng.random((queries, k), np.float32))[:, ::-1].copy()
    blocks = GALLERY // BLOCK_ROWS
    hits = block, np.zeros((queries, k), np.int64)
    for number in range(1, blocks):
        hits = merge(hits, (block, np.full((queries, k), number, np.int64)))
    return f"{blocks} blocks, {queries:,} queries, {k} hits each"


def selection(transfer: int, queries: int) -> str:
    """The choice of the transfer set among the hits."""
    import numpy as np

    from ktray.retrieval.strategies.base import in_turn

    k = _k(transfer, queries)
    rng = np.random.default_rng(0)
    similarity = np.sort(rng.random((queries, k), np.float32))[:, ::-1].copy()
    chosen = in_turn(similarity, rng.integers(0, GALLERY, (queries, k)), transfer)
    return f"{len(chosen):,} of {queries * k:,} hits"


def shards(transfer: int, queries: int) -> str:
    """TEACH's list of work."""
    import numpy as np

    from ktray.stages.teach.items import images_per_shard, shard_items

    uris = [f"s3://bucket/gallery/{n:05d}.tar/{n:08d}.jpg" for n in range(transfer)]
    items = shard_items(uris, {"query": np.arange(transfer)}, images_per_shard(transfer, VIEWS, 224), 0)
    return f"{len(items):,} shards"


def schedule(transfer: int, queries: int) -> str:
    """The windows of all epochs, as the worker's reader takes them."""
    from ktray.stages.teach.items import images_per_shard, shard_numbers
    from ktray.training.sampler import RowSampler

    numbers = shard_numbers(transfer, images_per_shard(transfer, VIEWS, 224), 0)
    named = [(f"shard-{n:06d}.parquet", len(images) * VIEWS) for n, images in enumerate(numbers)]
    windows: list[int] = []

    def read(asked):
        for window in asked:
            windows.append(len(window))
            yield {}

    sampler = RowSampler(named, read, batch=BATCH, window_rows=WINDOW_BYTES // PIXELS, views=VIEWS)
    steps = EPOCHS * transfer * VIEWS // BATCH
    for number in range(len(sampler.streams)):
        windows.extend(len(part.window) for part in sampler.streams[number].schedule(0, steps))
    return f"{len(windows):,} windows, {sum(windows):,} reads of shards, {steps:,} steps"


def random_draw(transfer: int, queries: int) -> str:
    """A random transfer set of the same gallery."""
    from ktray.retrieval.select import random_selection

    return f"{len(random_selection(GALLERY, transfer, 0)):,} images"


def _k(transfer: int, queries: int) -> int:
    return max(8, 4 * transfer // queries)


PARTS: dict[str, Callable[[int, int], str]] = {
    call.__name__: call for call in (parts_of_the_index, merged_hits, selection, shards, schedule, random_draw)
}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import ktray.stages.index.gallery  # noqa: F401  (imports are not the work)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    what = PARTS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"part": sys.argv[1].replace("_", " "), "what": what, "seconds": seconds, "memory": grown}))
