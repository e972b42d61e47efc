"""What an objective is: how the student is pretrained.

A file of this folder (or a module of another package, named by the entry point group ``ktray.objectives``) holds

- a subclass of `ObjectiveConfig` with the recipe keys of the objective, registered by
  ``@OBJECTIVES.register(NAME)``: `Traits` (what it needs of the teacher and of the images, stored by TEACH), its place
  in comparisons, searches and pictures, and ``build``, which makes
- a subclass of `Objective`: turns the student's output and a batch into a loss, and owns whatever else it trains; those
  modules never enter the student. It must not import Ray: it runs in a notebook as in a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ktray.objectives.matching import ClassMatching, Matching
from ktray.recipe.objective import NO_SOURCE, ObjectiveConfig, Reads, Target, Traits
from ktray.recipe.registries import OBJECTIVES

__all__ = [
    "NO_SOURCE",
    "OBJECTIVES",
    "Batch",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveContext",
    "Reads",
    "Target",
    "Traits",
]

Batch = dict[str, torch.Tensor]
Normalise = Callable[[torch.Tensor], torch.Tensor]
FlopsOf = Callable[[int], float]


@dataclass(frozen=True)
class ObjectiveContext:
    """What an objective may know when it is set up.

    Attributes:
        num_classes: of the target task.
        student_dim, student_map_dim: widths of the student's pooled features and of its last map (they differ where a
            layer stands between them); the latter only where the traits' ``reads`` is ``map``.
        teacher_dim, teacher_patch_dim: widths of the teacher's embedding and of its patch embeddings; None where TEACH
            stores none.
        seed: of everything random in the objective's own modules.
        student: the module that ``step`` calls, for those that keep a copy of it.
        image_size: side of the student's input, pixels.
        vocabulary, text_length: number of different tokens and tokens a caption, where captions are stored.
        source_classes: classes of the labelled generic set, where there is one.
    """

    num_classes: int
    student_dim: int
    teacher_dim: int | None
    seed: int
    teacher_patch_dim: int | None = None
    student: nn.Module | None = None
    image_size: int = 0
    vocabulary: int = 0
    text_length: int = 0
    source_classes: int = 0
    student_map_dim: int = 0


class Objective(nn.Module):
    """The loss of an objective, and what is trained beside the student. Its `Traits` say what a batch has.

    Attributes:
        matching: how predictions are matched, for an objective that learns from the teacher's.
    """

    matching: Matching = ClassMatching()

    def match_with(self, matching: Matching) -> None:
        """Match predictions as the task kind says."""
        self.matching = matching

    def setup(self, context: ObjectiveContext) -> None:
        """Create the modules that depend on sizes. Called once, before the optimizer is made."""

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change a batch (float images under ``images``) before the student sees it, e.g. mixing pairs."""
        return batch

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """``{"loss": scalar, ...}``; further entries are detached scalars for the log."""
        raise NotImplementedError

    def step(
        self, student: nn.Module, normalise: Normalise, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """One batch through the student to the loss; for those that call it otherwise than once.

        Args:
            student: gives what the traits' ``reads`` says.
            normalise: images of 0..255 (N, 3, H, W), uint8 or float, to the student's input; resizes nothing.
            batch: ``pixels`` (N, 3, H, W) uint8, ``view_key`` (N,) int64 (the same for an image at its n-th visit,
                whatever the worker, the order and the restart; see `ktray.data.augment.random_views`), the targets.
            generator: on the batch's device; follows from seed, step and rank.
        """
        batch = self.prepare({**batch, "images": batch["pixels"].float()}, generator)
        return self.loss(student(normalise(batch["images"])), batch)

    def after_step(self, student: nn.Module, progress: float) -> None:
        """Called after each optimizer step, e.g. to move an averaged copy.

        Args:
            progress: share of all steps that are done, above 0, up to 1.
        """

    def finish(self, model: nn.Module) -> None:
        """Put into the student, a timm model, what the objective has learnt for it. Called on what is evaluated and on
        what is handed on; must give the same however often it is called."""

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """FLOPs of one image in training.

        Args:
            train, forward: side of the input in pixels -> FLOPs of the student's training step, of its forward pass.
            size: side of the student's input.
        """
        return train(size)
