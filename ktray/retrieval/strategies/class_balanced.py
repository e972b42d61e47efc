"""Select the same number of images for every predicted class."""

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
    """Selects the same number of images for every class that the teacher predicts, independent of the queries. Use it
    if the queries of some classes retrieve few images. It is for classification and needs a teacher that predicts
    classes."""

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
    """In each round, every predicted class selects its most similar image, until there are ``size`` images.

    A class without remaining candidates is skipped in later rounds.

    Args:
        classes: (Q, k) int64 predicted class of each hit; the values where ``index`` is -1 have no meaning.
    """
    flat = first_of_each(similarity, index)
    class_of_each = classes.ravel()[flat]
    groups = [flat[class_of_each == number] for number in np.unique(class_of_each).tolist()]
    chosen = in_turn(*as_table(groups, similarity, index), size, exclude=exclude)
    return traced(chosen, groups, index, size)
