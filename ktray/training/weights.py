"""Weights of the rows of a transfer set, applied by how often a row is drawn.

A row with the weight w, where the mean over the set is 1, is drawn w times an epoch on average. If the loss is a mean
over rows, its expected gradient is that of the mean in which each row has the factor w. No objective needs to know
about it, and rows may be mixed with others. Epochs use systematic sampling (Madow, Ann. Math. Stat. 20, 1949, page
333): in each epoch a row is drawn w times, rounded down or up.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from ktray.retrieval.on_task import confidence
from ktray.storage.columns import Rows
from ktray.targets.top_k import COLUMNS, LOGITS, TOP, dense_rows

WEIGHT = "weight"  # name of the column
COPIES = 1 << 20  # draws of a row in one epoch are numbered below this
_ROWS_AT_ONCE = 4_096


class Weigh(Protocol):
    """Weights (N,) of rows, at least 0."""

    def __call__(self, rows: Rows, classes: int) -> np.ndarray: ...


def confidence_weight(rows: Rows, classes: int) -> np.ndarray:
    """The confidence of the teacher's calibrated predictions: 1 minus their entropy as a share of log C.

    Args:
        rows: with ``logits`` (N, C) or maps (N, C, h, w), or the columns of `ktray.targets.top_k.sparsify`.
        classes: C, if only the largest logits are stored.

    Returns:
        (N,) float32 from 0 (uniform prediction) to 1 (certain); for maps, the mean over positions.
    """
    names = COLUMNS if TOP in rows else (LOGITS,)
    count = len(rows[names[0]])
    weights = np.zeros(count, dtype=np.float32)
    for at in range(0, count, _ROWS_AT_ONCE):
        part = {name: rows[name][at : at + _ROWS_AT_ONCE] for name in names}
        logits = torch.from_numpy(dense_rows(part, names, classes)[LOGITS]).float()
        flat = logits.softmax(1).flatten(2).movedim(1, -1) if logits.ndim > 2 else logits.softmax(1)[:, None]
        values = confidence(flat.reshape(-1, logits.shape[1]).numpy())
        weights[at : at + len(logits)] = values.reshape(len(logits), -1).mean(1).clip(0, 1)
    return weights


WEIGHTS: dict[str, Weigh] = {"confidence": confidence_weight}


def draw(weight: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many rows as there are weights, by systematic sampling in random order.

    Args:
        weight: (N,) at least 0. If all are 0, each row is drawn once.

    Returns:
        (N,) int64 row of each draw, and (N,) int64 how often the row was drawn before in this call.
    """
    count = len(weight)
    order = rng.permutation(count)
    total = float(weight.sum(dtype=np.float64))
    if total <= 0:
        return order, np.zeros(count, dtype=np.int64)
    ends = np.cumsum(weight[order], dtype=np.float64) * (count / total)
    at = np.searchsorted(ends, rng.random() + np.arange(count), side="right").clip(max=count - 1)
    first = np.searchsorted(at, at, side="left")  # the draws of a row follow each other
    shuffled = rng.permutation(count)
    return order[at][shuffled], (np.arange(count) - first)[shuffled]
