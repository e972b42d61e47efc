"""Predictions over many classes as their largest ones and the mass of the rest.

A row keeps its ``k`` largest logits, which classes they are, and one value for all others: the logit that each of them
has when they share their probability evenly,

    r = logsumexp(the other logits) - log(C - k),

the marginal smoothing of Shen & Xing, arXiv 2112.01528, section 3. ``softmax`` of the restored logits is the teacher's
on the ``k`` classes exactly, and has its mass on the others together; at other temperatures than 1 it is near to it.
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
    """The columns in which targets are stored."""
    return tuple(name for t in targets for name in (COLUMNS if t == LOGITS and top_k else (t,)))


def per_prediction(classes: int, top_k: int) -> int:
    """Half-precision numbers that a stored prediction takes; an index takes as much as two."""
    return 3 * top_k + 1 if top_k else classes


def sparsify(logits: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
    """Logits (N, C) or maps of them (N, C, h, w) to ``logits_top`` float16 and ``logits_index`` int32, both (N, k) or
    (N, k, h, w) and largest first, and ``logits_rest`` float16 (N, 1) or (N, 1, h, w)."""
    classes = logits.shape[1]
    if not 0 < top_k < classes:
        raise ValueError(f"{top_k} of {classes} classes cannot be kept apart from a rest")
    wide = logits.float()
    top, index = wide.topk(top_k, dim=1)
    # Not the total less the top ones: the rest may be the last digits of a confident teacher's total.
    others = wide.scatter(1, index, -math.inf)
    rest = others.logsumexp(dim=1, keepdim=True) - math.log(classes - top_k)
    return {TOP: top.half(), INDEX: index.int(), REST: rest.half()}


def densify(batch: Mapping[str, torch.Tensor], classes: int) -> dict[str, torch.Tensor]:
    """The batch with ``logits`` (N, C, ...) float16 in place of what `sparsify` gave; unchanged where there is none."""
    if TOP not in batch:
        return dict(batch)
    top, index, rest = (batch[name] for name in COLUMNS)
    dense = rest.expand(-1, classes, *rest.shape[2:]).scatter(1, index.long(), top)
    kept = {name: value for name, value in batch.items() if name not in COLUMNS}
    return {**kept, LOGITS: dense}


def dense_rows(rows: Rows, names: Sequence[str], classes: int) -> Rows:
    """`densify` for arrays, of the columns ``names``."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in names}
    return {name: value.numpy() for name, value in densify(tensors, classes).items()}
