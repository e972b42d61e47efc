"""Every predicted class brings the same number of images."""

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


@STRATEGIES.register("class_balanced")
class ClassBalanced(StrategyConfig):
    """Every class that the teacher predicts brings the same number of images, whichever queries found them. Use it when
    some classes have queries that find little. It is for classification, and needs a teacher that predicts classes."""

    name: Literal["class_balanced"] = "class_balanced"

    order: ClassVar[int] = 20
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True
    needs_predictions: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        classes = candidates.probability.argmax(1)[candidates.rows]
        return class_balanced(candidates.similarity, candidates.index, classes, size, exclude=exclude)


def class_balanced(
    similarity: np.ndarray, index: np.ndarray, classes: np.ndarray, size: int, *, exclude: Excluded = ()
) -> Selection:
    """Each predicted class in turn takes its most similar image, round after round, until ``size`` are taken.

    A class without candidates left is passed over, and the others go on.

    Args:
        classes: (Q, k) int64 predicted class of each hit; what it holds where ``index`` is -1 does not matter.
    """
    flat = first_of_each(similarity, index)
    of_each = classes.ravel()[flat]
    groups = [flat[of_each == one] for one in np.unique(of_each).tolist()]
    chosen = in_turn(*as_table(groups, similarity, index), size, exclude=exclude)
    return traced(chosen, groups, index, size)
