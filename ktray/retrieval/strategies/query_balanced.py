"""Every query brings the same number of images, none twice: the paper's choice.

arXiv 2311.18237, section on retrieval. The released lists show the arithmetic: 1,200 queries that count themselves
among their 128 bring 127 x 1,200 = 152,400 retrieved images.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, in_turn


@STRATEGIES.register("query_balanced")
class QueryBalanced(StrategyConfig):
    """Every query brings the same number of images, none twice (arXiv 2311.18237). Use it by default: each labelled
    image has an equal share of the transfer set. Other strategies differ from it in one respect each."""

    name: Literal["query_balanced"] = "query_balanced"

    order: ClassVar[int] = 10
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return in_turn(candidates.similarity, candidates.index, size, exclude=exclude)
