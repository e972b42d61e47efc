"""The size of the windows in which training reads rows that do not stay in memory.

With large windows, images that are in one batch in one epoch are rarely together in the next one.
"""

from __future__ import annotations

FEWEST_BYTES, USUAL_BYTES, MOST_BYTES = 256_000_000, 1_000_000_000, 2_000_000_000
_SHARE = 8  # of the memory; a worker holds a window, parts of the next ones, and its model


def window_bytes(memory: float, row_bytes: int, views: int, batch: int, computed: bool) -> int:
    """The size of the windows of a worker, in bytes: a share of its memory, between `FEWEST_BYTES` and `USUAL_BYTES`,
    or up to `MOST_BYTES` where a batch in which no two views show the same image needs as much
    (`ktray.training.sampler.spread_views`).

    Rows that are computed during training take time. Their windows are only as large as such batches need.

    Args:
        memory: memory of a worker, in bytes; 0 if it is not known.
        row_bytes: size of a row.
        views: number of views of each image.
        batch: number of rows in the batch of a worker.
        computed: whether rows are computed during training.
    """
    room = min(MOST_BYTES, max(FEWEST_BYTES, int(memory / _SHARE)))
    return min(room, max(FEWEST_BYTES if computed else USUAL_BYTES, 2 * views * batch * row_bytes))
