"""No training of the student: a linear head on the features of its initial weights, which stay frozen.

With published weights this linear probe is the cheapest way to a small model for a task (Kornblith et al., Do Better
ImageNet Models Transfer Better?, CVPR 2019), so distillation must be better than it. It needs no teacher, no transfer
set and no targets.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ktray.objectives.base import NO_SOURCE, OBJECTIVES, Objective, ObjectiveConfig, Traits


@OBJECTIVES.register("probe")
class ProbeConfig(ObjectiveConfig):
    """No training of the student: a linear head on the frozen features of its initial weights (linear probe). It is the
    cheapest baseline for a student with published weights."""

    name: Literal["probe"] = "probe"

    sources: ClassVar[tuple[str, ...]] = (NO_SOURCE,)
    order: ClassVar[int] = 79
    colour: ClassVar[str] = "#8c959e"

    @property
    def traits(self) -> Traits:
        return Traits(frozen=True, classes=True)

    def build(self, *, hflip: float = 0.5) -> Probe:
        return Probe()

    @classmethod
    def comparisons(cls, possible: Any) -> dict[str, dict[str, Any]]:
        return {cls.objective_name(): {"objective.name": cls.objective_name()}}


class Probe(Objective):
    """An objective without a loss: FINETUNE fits the head on the features, with the regularisation that is best on
    validation."""
