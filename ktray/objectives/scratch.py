"""No pretraining: the student is trained from its initial weights on the labels alone. This is the scratch baseline.

Use it to measure the gain of pretraining. It needs no teacher, no transfer set and no targets.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ktray.objectives.base import NO_SOURCE, OBJECTIVES, Objective, ObjectiveConfig, Traits


@OBJECTIVES.register("scratch")
class ScratchConfig(ObjectiveConfig):
    """No pretraining: the student is trained from its initial weights on the labels alone. It is the baseline that
    shows the gain of pretraining, and needs no teacher, no transfer set and no targets."""

    name: Literal["scratch"] = "scratch"

    sources: ClassVar[tuple[str, ...]] = (NO_SOURCE,)
    order: ClassVar[int] = 80
    colour: ClassVar[str] = "#4a5560"

    @property
    def traits(self) -> Traits:
        return Traits()

    def build(self, *, hflip: float = 0.5) -> Scratch:
        return Scratch()

    @classmethod
    def comparisons(cls, possible: Any) -> dict[str, dict[str, Any]]:
        return {cls.objective_name(): {"objective.name": cls.objective_name()}}


class Scratch(Objective):
    """An objective without a loss: FINETUNE trains on the labels alone, with the loss of the task kind."""
