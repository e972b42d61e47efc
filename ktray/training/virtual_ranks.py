"""Lanes: the order of training rows as parallel streams whose number does not depend on how many workers there are.

A worker that comes or goes changes who feeds a lane, not what the lane holds. So each step has the same rows with any
number of workers, a run that goes on with fewer sees no image twice or never, and the whole batch keeps its size.
"""

from __future__ import annotations

import math

MOST = 4  # lanes for each of the most workers: more of them even out the workers, and cut the shards finer


def virtual_ranks(low: int, high: int, *batches: int) -> int:
    """How many lanes there are for ``low`` to ``high`` workers.

    Each lane has a row of each batch at least, and lanes divide the batches where they can, so that all give as many
    rows a step. Among those, the number with which the busiest worker has the least more than its share.

    Args:
        batches: rows of a step over all workers.
    """
    if low == high:
        return high
    rows = math.gcd(*batches)
    fit = [n for n in range(high, MOST * high + 1) if rows % n == 0]
    return min(fit or [high], key=lambda n: (max(math.ceil(n / w) * w / n for w in range(low, high + 1)), n))


def ranks_of_worker(rank: int, world: int, of: int) -> range:
    """The lanes, of ``of``, that a worker feeds; each has its lanes next to each other, and no two differ by more than
    one."""
    return range(rank * of // world, (rank + 1) * of // world)
