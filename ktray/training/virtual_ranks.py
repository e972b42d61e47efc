"""Virtual ranks: parallel streams of training rows whose number does not depend on the number of workers.

If a worker joins or leaves, other workers feed some of the virtual ranks, but the rows of each virtual rank stay the
same. Each step therefore has the same rows with any number of workers: a run that resumes with fewer workers neither
repeats nor misses an image, and the batch over all workers keeps its size.
"""

from __future__ import annotations

import math

# The maximum number of virtual ranks for each worker, when there are the most workers. With more virtual ranks, the
# workers have more equal shares, but the shards are divided into smaller parts.
MOST = 4


def virtual_ranks(low: int, high: int, *batches: int) -> int:
    """The number of virtual ranks for ``low`` to ``high`` workers.

    The number divides the batches if possible, so that all virtual ranks have equally many rows in a step; each has at
    least one row of each batch. Among these numbers, it is the one with which the busiest worker exceeds an equal share
    the least.

    Args:
        batches: sizes of the batches of a step, in rows over all workers.
    """
    if low == high:
        return high
    rows = math.gcd(*batches)
    fit = [n for n in range(high, MOST * high + 1) if rows % n == 0]
    return min(fit or [high], key=lambda n: (max(math.ceil(n / w) * w / n for w in range(low, high + 1)), n))


def ranks_of_worker(rank: int, world: int, count: int) -> range:
    """The virtual ranks that a worker feeds, of ``count``.

    They are consecutive, and the numbers of any two workers differ by at most one.

    Args:
        rank: rank of the worker.
        world: number of workers.
    """
    return range(rank * count // world, (rank + 1) * count // world)
