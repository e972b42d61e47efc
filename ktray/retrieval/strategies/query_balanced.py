"""Select the same number of images for every query, without repeats, as in the paper.

See arXiv 2311.18237, section on retrieval. The released lists confirm the numbers: each of 1,200 queries counts itself
among its 128 images, so that 127 x 1,200 = 152,400 images are retrieved.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, in_turn


@STRATEGIES.register("query_balanced")
class QueryBalanced(StrategyConfig):
    """Selects the same number of images for every query, without repeats (arXiv 2311.18237). This is the default: each
    labelled image has an equal share of the transfer set; where images have sets of classes, the images of each class
    together have an equal share. Every other strategy differs from it in one respect."""

    name: Literal["query_balanced"] = "query_balanced"

    order: ClassVar[int] = 10
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        return in_turn(candidates.similarity, candidates.index, size, exclude=exclude, share=candidates.share)
