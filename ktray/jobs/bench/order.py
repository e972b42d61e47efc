"""How well training mixes its images at the counts of a large task, compared with a uniform shuffle.

It runs TEACH's division into shards and the sampler of training on row numbers only: no image is made or read. The
images of a transfer set are sorted by class, as those of a labelled set and of a balanced retrieval are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from ktray.jobs.bench.rows import BenchRow
from ktray.stages.teach.items import images_per_shard, shard_numbers
from ktray.storage.columns import Rows
from ktray.training.sampler import RowSampler, Window
from ktray.training.window_size import FEWEST_BYTES, window_bytes

SEED = 0
STEPS = 300


_MEMORY = 64e9  # of a worker


@dataclass(frozen=True)
class OrderCase:
    """A transfer set and a training on it.

    Attributes:
        images, classes, views: numbers of images, of classes, and of views of each image.
        batch: number of rows of a step, over all workers.
        size: side of a view, pixels.
        ranks: number of virtual ranks.
        window: size of a worker's window in bytes; None: that of a worker with much memory.
    """

    name: str
    images: int
    classes: int
    views: int
    batch: int
    ranks: int = 1
    size: int = 224
    window: int | None = None

    @property
    def labels(self) -> np.ndarray:
        """(images,) the class of each image, sorted."""
        return np.arange(self.images) * self.classes // self.images

    @property
    def window_rows(self) -> int:
        """Number of rows in the window of a virtual rank."""
        row = 3 * self.size**2
        window = self.window or window_bytes(_MEMORY, row, self.views, self.batch, computed=False)
        return int(max(self.batch // self.ranks, window // row // self.ranks))


CASES = [
    OrderCase("retrieved", 153_600, 1000, 4, 1024),
    OrderCase("target", 12_811, 1000, 4, 512),
    OrderCase("supervised", 1_281_167, 1000, 4, 1024),
    OrderCase("own photos", 20_000, 10, 4, 512),
    OrderCase("retrieved, 4 workers", 153_600, 1000, 4, 1024, ranks=4),
    OrderCase("retrieved, smallest windows", 153_600, 1000, 4, 512, window=FEWEST_BYTES),
    OrderCase("supervised, one view, smallest windows", 1_281_167, 1000, 1, 1024, window=FEWEST_BYTES),
]


@dataclass(frozen=True)
class Mix:
    """Means over batches.

    Attributes:
        images, classes: number of distinct images and classes.
        run: length of the longest sequence of rows of one class.
    """

    images: float
    classes: float
    run: float


def mix(batches: Sequence[np.ndarray], labels: np.ndarray) -> Mix:
    """Measure batches, each (n,) image numbers."""
    found = []
    for images in batches:
        classes = labels[images]
        ends = np.flatnonzero(np.diff(classes, append=-1))
        found.append((len(np.unique(images)), len(np.unique(classes)), int(np.diff(ends, prepend=-1).max())))
    return Mix(*(mean(values) for values in zip(*found, strict=True)))


def trained_order(case: OrderCase, steps: int, shards: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    """The images (batch,) of ``steps`` batches of the second epoch, as training reads them from disk.

    Args:
        shards: the images of each shard; None: as TEACH divides them.
    """
    if shards is None:
        shards = shard_numbers(case.images, images_per_shard(case.images, case.views, case.size), SEED)
    images_of = {f"{number}": images for number, images in enumerate(shards)}

    def read(windows: Iterable[Window]) -> Iterator[Rows]:
        for window in windows:
            parts = [np.repeat(images_of[s.shard][s.start :: s.step], s.views) for s in window]
            yield {"image": np.concatenate(parts)}

    sampler = RowSampler(
        [(name, len(images) * case.views) for name, images in images_of.items()],
        read,
        batch=case.batch // case.ranks,
        ranks=range(case.ranks),
        rank_count=case.ranks,
        seed=SEED,
        window_rows=case.window_rows,
        views=case.views,
    )
    first = case.images * case.views // case.batch
    return [rows["image"] for rows in sampler.batches(first, first + steps)]


def uniform_order(case: OrderCase, steps: int) -> list[np.ndarray]:
    """The images (batch,) of ``steps`` batches of uniform shuffles of all views."""
    rng, batches = np.random.default_rng(SEED), list[np.ndarray]()
    while len(batches) < steps:
        rows = rng.permutation(case.images * case.views) // case.views
        batches += [rows[i : i + case.batch] for i in range(0, len(rows) - case.batch + 1, case.batch)]
    return batches[:steps]


def order(steps: int = STEPS) -> Iterator[BenchRow]:
    """Compare the batches of training with those of a uniform shuffle. A ratio of 100% is as good as uniform; for the
    longest sequence of one class, lower is better."""
    for case in CASES:
        limit, reached = (mix(batches(case, steps), case.labels) for batches in (uniform_order, trained_order))
        facts: dict[str, float | int | str] = {
            "images": case.images,
            "views": case.views,
            "classes": case.classes,
            "batch": case.batch,
            "workers": case.ranks,
            "window (rows)": case.window_rows * case.ranks,
        }
        for what, unit, field in (
            ("images in a batch", "distinct", "images"),
            ("classes in a batch", "distinct", "classes"),
            ("longest sequence of one class", "rows", "run"),
        ):
            uniform, trained = ([float(getattr(mixed, field))] for mixed in (limit, reached))
            name = f"{case.name}: {what}"
            yield BenchRow(name, unit, "uniform shuffle", uniform, trained, facts if field == "images" else {})
