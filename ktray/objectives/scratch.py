"""No pretraining: the student starts from its initial weights and sees the labels alone. The floor.

Use it to learn what pretraining is worth. It needs no teacher, no transfer set and no targets.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from ktray.objectives.base import NO_SOURCE, OBJECTIVES, Batch, Objective, ObjectiveConfig, Traits


@OBJECTIVES.register("scratch")
class ScratchConfig(ObjectiveConfig):
    """No pretraining: the student starts from its initial weights and sees the labels alone. It is the floor, which
    says what pretraining is worth, and needs no teacher, no transfer set and no targets."""

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
    """Cross-entropy on labels. Batch: ``images`` (N, 3, H, W) float, ``label`` (N,) int64."""

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(student_out.float(), batch["label"])}
