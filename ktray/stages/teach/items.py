"""How TEACH divides a transfer set into shards: images in random order.

Transfer sets are sorted: by query, by class, by path. Training reads a large set in windows of some shards
(`ktray.training.sampler`), so the shards themselves must be random samples of the set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ktray.distributed.device_work import Item

SHARD_BYTES = 64_000_000
_MOST, _FEWEST_SHARDS = 512, 8


def images_per_shard(images: int, views: int, view_size: int) -> int:
    """Number of images in a shard, for pixels of about `SHARD_BYTES`; a small set has several shards.

    Args:
        views: number of views of each image.
        view_size: side of a view, pixels.
    """
    return int(max(1, min(_MOST, SHARD_BYTES // (views * 3 * view_size**2), -(-images // _FEWEST_SHARDS))))


def shard_numbers(images: int, per_shard: int, seed: int) -> list[np.ndarray]:
    """The images of each shard, as (n,) int64 numbers from 0 to ``images - 1`` in random order."""
    order = np.random.default_rng(seed).permutation(images)
    return [order[first : first + per_shard] for first in range(0, images, per_shard)]


def shard_items(uris: Sequence[str], beside: Mapping[str, np.ndarray | None], per_shard: int, seed: int) -> list[Item]:
    """The shards as `ktray.targets.make_views.MakeViews` takes them.

    Args:
        beside: columns with one row for each image; None: the column is left out.
    """
    items = []
    for number, images in enumerate(shard_numbers(len(uris), per_shard, seed)):
        along: dict[str, Any] = {name: rows[images].tolist() for name, rows in beside.items() if rows is not None}
        items.append(
            {"name": f"shard-{number:06d}.parquet", "uris": [uris[i] for i in images.tolist()], "beside": along}
        )
    return items
