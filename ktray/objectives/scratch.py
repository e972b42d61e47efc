"""No pretraining: the student starts from its initial weights and sees the labels alone. The floor.

Use it to learn what pretraining is worth. It needs no teacher, no transfer set and no targets.
"""

from __future__ import annotations

from ktray.objectives.base import Objective, Target


class Scratch(Objective):
    """Nothing to pretrain with: FINETUNE trains by the loss of the labels alone (`ktray.models.maps.label_loss`)."""

    name = "scratch"
    targets_needed: frozenset[Target] = frozenset()
