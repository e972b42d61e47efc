"""What a way of pretraining is.

An objective says what it needs from the teacher (`targets_needed`, stored by TEACH), turns the student's
output and a batch into a loss, and owns whatever else it trains; those modules never enter the student.
It must not import Ray: it runs in a notebook as in a worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Target = Literal["logits", "embedding", "patch_embedding", "text"]
Reads = Literal["logits", "features"]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Context:
    """What an objective may know when it is set up."""

    num_classes: int
    student_dim: int
    teacher_dim: int | None
    seed: int


class Objective(nn.Module):
    """A way of pretraining. Parameters of this module are trained beside the student's.

    Attributes:
        reads: what ``loss`` takes of the student: ``logits`` (N, C), or ``features`` (N, F), pooled, before the
            classifier, which then stays as it was.
    """

    name: str
    targets_needed: frozenset[Target]
    reads: Reads = "logits"

    def setup(self, context: Context) -> None:
        """Create the modules that depend on sizes. Called once, before the optimizer is made."""

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change a batch (float images under ``images``) before the student sees it, e.g. mixing pairs."""
        return batch

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """``{"loss": scalar, ...}``; further entries are detached scalars for the log."""
        raise NotImplementedError
