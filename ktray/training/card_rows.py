"""Rows of a set that stays in memory, on a GPU: the host sends the numbers of a batch's rows, and the GPU gathers them.

A batch of 256 views of 224 px has 39 MB. Otherwise, the host gathers and copies them in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from ktray.storage.columns import Rows
from ktray.training.loop import Batch
from ktray.training.sampler import Reader, Window
from ktray.training.weights import WEIGHT

ROW = "row"
# Part of the GPU's free memory. The training, which takes its own later, may need nearly all of it.
_SHARE = 16
_PIECE = 4096  # rows that are copied at once


def fits(device: torch.device, size: int) -> bool:
    """Whether a set of ``size`` bytes may stay on the device: on a GPU, if a sixteenth of what is free is
    enough."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / _SHARE


class CardRows:
    """The columns of one worker's rows, on a device.

    Attributes:
        columns: by name, (N, ...); filled by the first batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.columns: Batch = {}

    def reader(self, read: Reader, weigh: Callable[[Rows], np.ndarray] | None) -> Reader:
        """A reader that moves the rows of another one to the device. Its own rows have ``row``, which is the place in
        `columns`, ``view_id`` and, with ``weigh``, the weight. All windows must be those of a resident set."""

        def moved(windows: Iterable[Window]) -> Iterator[Rows]:
            windows = list(windows)
            total = sum(s.count for window in windows for s in window)
            first = 0
            for rows in read(windows):
                weight = {WEIGHT: weigh(rows)} if weigh else {}
                views = rows["view_id"]  # random numbers are computed from them, on the CPU
                for name in rows.keys() - {"view_id"}:
                    self._fill(name, rows[name], first, total)
                del rows  # this generator waits at its last window for the whole training
                yield {ROW: np.arange(first, first + len(views)), "view_id": views, **weight}
                first += len(views)

        return moved

    def gather(self, rows: torch.Tensor) -> Batch:
        """The columns of the rows (N,) int64, which are on the device."""
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}

    def _fill(self, name: str, values: np.ndarray, first: int, total: int) -> None:
        if name not in self.columns:
            kind = torch.from_numpy(np.empty(0, values.dtype)).dtype
            self.columns[name] = torch.empty((total, *values.shape[1:]), dtype=kind, device=self.device)
        for at in range(0, len(values), _PIECE):
            piece = values[at : at + _PIECE]
            self.columns[name][first + at : first + at + len(piece)] = torch.from_numpy(piece.copy())
