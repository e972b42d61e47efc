"""Each query's share is what the teacher is least sure of."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, reordered


@STRATEGIES.register("informative")
class Informative(StrategyConfig):
    """Every query has an equal share, filled with those of its candidates that the teacher is least sure of (margin
    sampling, Scheffer et al. 2001). Use it when the teacher is good and easy images teach the student little. It is for
    classification, and needs a teacher that predicts classes."""

    name: Literal["informative"] = "informative"

    order: ClassVar[int] = 50
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True
    needs_predictions: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        best = np.sort(candidates.probability, axis=1)
        margin = (best[:, -1] - best[:, -2])[candidates.rows]
        return informative(candidates.similarity, candidates.index, margin, size, exclude=exclude)


def informative(
    similarity: np.ndarray, index: np.ndarray, margin: np.ndarray, size: int, *, exclude: Excluded = ()
) -> Selection:
    """`in_turn` with each query's candidates by how undecided the teacher is about them.

    Args:
        margin: (Q, k) difference of the two largest predicted probabilities of each hit (margin sampling, Scheffer et
            al. 2001); smaller is nearer to the decision boundary. Equal margins keep the order of similarity.
    """
    order = np.argsort(np.where(index >= 0, margin, np.inf), axis=1, kind="stable")
    return reordered(similarity, index, order, size, exclude)
