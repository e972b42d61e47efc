"""Two phases: the teacher's features on a generic set first, then its predictions on the recipe's own transfer set.

The generic phase is `ktray.objectives.agnostic`, the specific one `ktray.objectives.oriented`; they share the steps
(G2SD, CVPR 2023). A phase is a recipe of its own, so that its stages are those of a plain run of that objective with
the same keys, and are reused.

Use it when there is a gallery and the steps are many: the student first learns to see, then to tell the classes. Do not
use it with few steps: both phases then end early.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ktray.objectives.agnostic import Match
from ktray.objectives.base import OBJECTIVES, ObjectiveConfig, Traits
from ktray.objectives.oriented import Oriented


@OBJECTIVES.register("agnostic_then_oriented")
class AgnosticThenOrientedConfig(ObjectiveConfig):
    """Two phases: agnostic on a generic set, then oriented on the recipe's own transfer set, with shared steps. Use it
    when there is a gallery and the steps are many. Do not use it with few steps: both phases then end early."""

    name: Literal["agnostic_then_oriented"] = "agnostic_then_oriented"
    generic_share: float = Field(0.5, gt=0, lt=1, description="share of the steps that go to the generic phase")
    match: Match = Field("cosine", description="how the teacher's features are matched")
    patches: float = Field(0.0, ge=0, description="weight of the patch features; 0 matches the pooled alone")
    temperature: float = Field(1.0, gt=0, description="softens both predictions, on top of the fitted temperature")
    mixup: float = Field(0.0, ge=0, description="alpha of mixup on images and targets; 0 switches it off")

    sources: ClassVar[tuple[str, ...]] = ("retrieved", "generic")  # its first phase needs a gallery
    order: ClassVar[int] = 40
    colour: ClassVar[str] = "#cc79a7"

    @property
    def traits(self) -> Traits:
        """Those of the last phase, which FINETUNE follows."""
        return Traits(frozenset({"logits"}))

    def build(self, *, hflip: float = 0.5) -> Oriented:
        """The objective of the last phase, whose loss FINETUNE may keep."""
        return Oriented(self.temperature, self.mixup)

    def phases(self, steps: int) -> list[tuple[str, dict[str, Any]]]:
        first = min(max(1, steps - 1), max(1, round(self.generic_share * steps)))
        generic = {"objective.name": "agnostic", "transfer.source": "generic", "train.steps": first}
        specific = {"objective.name": "oriented", "train.steps": max(1, steps - first)}
        return [("generic", generic), ("specific", specific)]

    @classmethod
    def comparisons(cls, possible: Any) -> dict[str, dict[str, Any]]:
        """One row, named without a source: it has two transfer sets."""
        (keys,) = super().comparisons(possible).values()
        return {cls.objective_name(): keys}
