"""Two phases: first the teacher's features on a generic set, then its predictions on the transfer set of the recipe.

The generic phase is `ktray.objectives.agnostic`, the specific one `ktray.objectives.oriented`; they share the steps
(G2SD, CVPR 2023). Each phase is a complete recipe, so a run of its objective with the same keys has the same stages,
and they are reused.

Use it when there is a gallery and there are many steps: the student first learns general features, then the classes. Do
not use it with few steps: both phases are then too short.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from ktray.objectives.agnostic import Match
from ktray.objectives.base import OBJECTIVES, ObjectiveConfig, Traits
from ktray.objectives.oriented import Oriented


@OBJECTIVES.register("agnostic_then_oriented")
class AgnosticThenOrientedConfig(ObjectiveConfig):
    """Two phases that share the steps: agnostic on a generic set, then oriented on the transfer set of the recipe. Use
    it when there is a gallery and there are many steps. Do not use it with few steps: both phases are then too
    short."""

    name: Literal["agnostic_then_oriented"] = "agnostic_then_oriented"
    generic_share: float = Field(0.5, gt=0, lt=1, description="share of the steps for the generic phase")
    match: Match = Field("cosine", description="loss between the features of student and teacher")
    patches: float = Field(0.0, ge=0, description="weight of the loss on patch features; 0: only pooled features")
    temperature: float = Field(
        1.0, gt=0, description="temperature that softens both predictions, in addition to the fitted one"
    )
    mixup: float | None = Field(
        None, ge=0, description="alpha of mixup on images and targets; 0: no mixup; null: chosen by the kind of images"
    )
    cutmix: float | None = Field(
        None,
        ge=0,
        description="alpha of CutMix on images and targets; 0: no CutMix; null: chosen by the kind of images",
    )

    sources: ClassVar[tuple[str, ...]] = ("retrieved", "generic")  # the first phase needs a gallery
    order: ClassVar[int] = 40
    colour: ClassVar[str] = "#cc79a7"

    @property
    def traits(self) -> Traits:
        """The traits of the last phase, which FINETUNE follows."""
        return Traits(frozenset({"logits"}))

    def build(self, *, hflip: float = 0.5) -> Oriented:
        """The objective of the last phase, whose loss FINETUNE may continue to use."""
        return Oriented(self.temperature, self.mixup or 0.0, self.cutmix or 0.0)

    def phases(self, steps: int) -> list[tuple[str, dict[str, Any]]]:
        first = min(max(1, steps - 1), max(1, round(self.generic_share * steps)))
        generic = {"objective.name": "agnostic", "transfer.source": "generic", "train.steps": first}
        specific = {"objective.name": "oriented", "train.steps": max(1, steps - first)}
        return [("generic", generic), ("specific", specific)]

    @classmethod
    def comparisons(cls, possible: Any) -> dict[str, dict[str, Any]]:
        """One row, whose name has no source, because the objective has two transfer sets."""
        (keys,) = super().comparisons(possible).values()
        return {cls.objective_name(): keys}
