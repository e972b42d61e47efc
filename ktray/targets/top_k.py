"""Predictions over many classes, reduced to the largest logits and the probability mass of the rest.

A row keeps its ``k`` largest logits, their classes, and one value for all other classes: the logit that each of them
has if they share their probability evenly,

    r = logsumexp(the other logits) - log(C - k),

the marginal smoothing of Shen & Xing, arXiv 2112.01528, section 3. The ``softmax`` of the restored
logits is equal to that of the teacher on the ``k`` classes, and has the same total mass on the other classes. At
temperatures other than 1 it is an approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ktray.storage.columns import Rows

LOGITS = "logits"
TOP, INDEX, REST = "logits_top", "logits_index", "logits_rest"
COLUMNS = TOP, INDEX, REST


def columns(targets: tuple[str, ...], top_k: int) -> tuple[str, ...]:
    """The names of the columns in which targets are stored."""
    return tuple(name for t in targets for name in (COLUMNS if t == LOGITS and top_k else (t,)))


def per_prediction(classes: int, top_k: int) -> int:
    """The size of a stored prediction, in half-precision numbers; an index has the size of two."""
    return 3 * top_k + 1 if top_k else classes


def sparsify(logits: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """Logits (N, C) or maps of logits (N, C, h, w) to ``logits_top`` float16 and ``logits_index`` int32, both (N, k) or
    (N, k, h, w) in descending order, and ``logits_rest`` float16 (N, 1) or (N, 1, h, w)."""
    classes = logits.shape[1]
    if not 0 < top_k < classes:
        raise ValueError(f"top_k is {top_k}, but with {classes} classes it must be from 1 to {classes - 1}")
    full_precision = logits.float()
    top, index = full_precision.topk(top_k, dim=1)
    # Subtracting the top logits from the total would be inexact: for a confident teacher the rest is tiny.
    other_logits = full_precision.scatter(1, index, -math.inf)
    rest = other_logits.logsumexp(dim=1, keepdim=True) - math.log(classes - top_k)
    return {TOP: top.half(), INDEX: index.int(), REST: rest.half()}


def densify(batch: Mapping[str, torch.Tensor], classes: int) -> dict[str, torch.Tensor]:
    """Replace the result of `sparsify` in a batch with ``logits`` (N, C, ...) float16; other batches stay unchanged."""
    if TOP not in batch:
        return dict(batch)
    top, index, rest = (batch[name] for name in COLUMNS)
    dense = rest.expand(-1, classes, *rest.shape[2:]).scatter(1, index.long(), top)
    kept = {name: value for name, value in batch.items() if name not in COLUMNS}
    return {**kept, LOGITS: dense}


def dense_rows(rows: Rows, names: Sequence[str], classes: int) -> Rows:
    """`densify` for the columns ``names`` of rows of NumPy arrays."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in names}
    return {name: value.numpy() for name, value in densify(tensors, classes).items()}
