"""Select the images that are most similar to any of the queries."""

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
    """Selects the images that are most similar to any of the queries, without equal shares. Use it if similarity
    matters more than balance. A query without similar images may contribute no image."""

    name: Literal["best_first"] = "best_first"

    order: ClassVar[int] = 30
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return best_first(candidates.similarity, candidates.index, size, exclude=exclude)


def best_first(similarity: np.ndarray, index: np.ndarray, size: int, *, exclude: Excluded = ()) -> Selection:
    """The ``size`` images that are most similar to any of the queries.

    Args:
        similarity, index, size, exclude: as for `in_turn`.
    """
    flat = first_of_each(similarity, index)
    chosen = in_turn(*as_table([flat], similarity, index), size, exclude=exclude)
    return traced(chosen, [flat], index, size)
