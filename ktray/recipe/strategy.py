"""What the recipe and the pipeline know of a strategy of `ktray/retrieval/strategies/`."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from ktray.recipe.section import Section


class StrategyConfig(Section):
    """Which of the images that the queries find are taken. Each strategy has a subclass with its own keys, if any; they
    all have defaults.

    Class attributes:
        needs_predictions: it asks for the teacher's predictions, which segmentation has none of.
        searched: whether it is in the default search space of jobs/tune.py.
        compared: whether CURATE notes of each image which of the strategies that have this would take it too.
        order: its place among the strategies.
    """

    name: str = Field("", description="which of the images that the queries find are taken")

    needs_predictions: ClassVar[bool] = False
    searched: ClassVar[bool] = False
    compared: ClassVar[bool] = False
    order: ClassVar[int] = 1000  # those of other packages come after ktray's own

    def select(self, candidates: Any, size: int, exclude: Any = ()) -> Any:
        """A `ktray.retrieval.select.Selection` of ``size`` images, or of as many as there are.

        Args:
            candidates: `ktray.retrieval.strategies.base.Candidates`.
            exclude: gallery rows that must not be taken.
        """
        raise NotImplementedError

    @classmethod
    def strategy_name(cls) -> str:
        """The value of ``transfer.strategy`` that chooses it."""
        return str(cls.model_fields["name"].default)
