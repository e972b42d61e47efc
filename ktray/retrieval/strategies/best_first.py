"""The images most similar to any query."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ktray.retrieval.strategies.base import (
    STRATEGIES,
    Candidates,
    Excluded,
    Selection,
    StrategyConfig,
    as_table,
    first_of_each,
    in_turn,
    traced,
)


@STRATEGIES.register("best_first")
class BestFirst(StrategyConfig):
    """The images most similar to any query are taken, without equal shares. Use it when similarity says more than
    balance. A query whose images are all far away may then bring nothing."""

    name: Literal["best_first"] = "best_first"

    order: ClassVar[int] = 30
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return best_first(candidates.similarity, candidates.index, size, exclude=exclude)


def best_first(similarity: np.ndarray, index: np.ndarray, size: int, *, exclude: Excluded = ()) -> Selection:
    """The ``size`` images most similar to any query, whichever that is.

    Args:
        similarity, index, size, exclude: as for `in_turn`.
    """
    flat = first_of_each(similarity, index)
    chosen = in_turn(*as_table([flat], similarity, index), size, exclude=exclude)
    return traced(chosen, [flat], index, size)
