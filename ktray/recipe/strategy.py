"""What the recipe and the pipeline need to know about a strategy of `ktray/retrieval/strategies/`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ktray.recipe.section import Section


class StrategyConfig(Section):
    """A strategy, which chooses the transfer set among the images that the queries find. Each strategy has a subclass;
    all of its keys have defaults.

    Class attributes:
        needs_predictions: whether it needs class predictions of the teacher, which segmentation does not have.
        searched: whether it is in the default search space of jobs/tune.py.
        compared: whether CURATE records, for each chosen image, if this strategy would also choose it.
        order: sort key of the strategy in lists.
    """

    name: str = Field("", description="strategy that chooses the transfer set among the images that the queries find")

    needs_predictions: ClassVar[bool] = False
    searched: ClassVar[bool] = False
    compared: ClassVar[bool] = False
    order: ClassVar[int] = 1000  # strategies of other packages come after those of ktray

    def select(self, candidates: Any, size: int, exclude: Any = ()) -> Any:
        """Choose ``size`` images, or fewer if there are fewer, as a `ktray.retrieval.select.Selection`.

        Args:
            candidates: `ktray.retrieval.strategies.base.Candidates`.
            exclude: gallery rows that must not be chosen.
        """
        raise NotImplementedError

    @classmethod
    def strategy_name(cls) -> str:
        """The value of ``transfer.strategy`` that chooses the strategy."""
        return str(cls.model_fields["name"].default)
