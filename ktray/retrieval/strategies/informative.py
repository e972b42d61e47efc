"""Select images for each query about which the teacher is least certain."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ktray.retrieval.strategies.base import STRATEGIES, Candidates, Excluded, Selection, StrategyConfig, reordered


@STRATEGIES.register("informative")
class Informative(StrategyConfig):
    """Every query has an equal share, which consists of the candidates about which the teacher is least certain (margin
    sampling, Scheffer et al. 2001). Use it if the teacher is accurate, so that the student learns little from easy
    images. It is for classification and needs a teacher that predicts classes."""

    name: Literal["informative"] = "informative"

    order: ClassVar[int] = 50
    searched: ClassVar[bool] = True
    compared: ClassVar[bool] = True
    needs_predictions: ClassVar[bool] = True

    def select(self, candidates: Candidates, size: int, exclude: Excluded = ()) -> Selection:
        ascending = np.sort(candidates.probability, axis=1)
        margin = (ascending[:, -1] - ascending[:, -2])[candidates.rows]
        return informative(candidates.similarity, candidates.index, margin, size, exclude=exclude)


def informative(
    similarity: np.ndarray, index: np.ndarray, margin: np.ndarray, size: int, *, exclude: Excluded = ()
) -> Selection:
    """`in_turn` with the candidates of each query ordered by the uncertainty of the teacher, most uncertain first.

    Args:
        margin: (Q, k) difference of the two largest predicted probabilities of each hit (margin sampling, Scheffer et
            al. 2001). A smaller margin is closer to the decision boundary. Equal margins keep the order of similarity.
    """
    order = np.argsort(np.where(index >= 0, margin, np.inf), axis=1, kind="stable")
    return reordered(similarity, index, order, size, exclude)
