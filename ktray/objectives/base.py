"""The contract of an objective, which defines how the student is pretrained.

A file in this folder (or a module of another package, in the entry point group ``ktray.objectives``) has

- a subclass of `ObjectiveConfig` with the recipe keys of the objective, registered by
  ``@OBJECTIVES.register(NAME)``. It has `Traits` (the outputs of the teacher and data of the images that it needs, and
  that TEACH stores), settings for comparisons, searches and plots, and ``build``, which creates
- a subclass of `Objective`, which computes a loss from the student's output and a batch. It owns the other modules that
  it trains; they never become a part of the student. It must not import Ray, so that it also runs in a notebook.
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
    """The sizes and modules that an objective gets in `Objective.setup`.

    Attributes:
        num_classes: number of classes of the task.
        student_dim, student_map_dim: widths of the student's pooled features and of its last map. They differ if there
            is a layer between the two. The latter is set only if the traits have ``reads="map"``.
        teacher_dim, teacher_patch_dim: widths of the teacher's embedding and of its patch embeddings; None if TEACH
            does not store them.
        seed: seed of everything random in the objective's modules.
        student: the module that ``step`` calls, for objectives that keep a copy of it.
        image_size: side of the student's input, pixels.
        vocabulary, text_length: number of different tokens, and of tokens in a caption; 0 without captions.
        source_classes: number of classes of the labelled generic set; 0 without one.
        teacher_sample: embeddings (M, D) float32 of some views of the transfer set, the same for every worker; None
            unless the traits have ``sampled=True``.
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
    teacher_sample: torch.Tensor | None = None


class Objective(nn.Module):
    """The loss of an objective, and the modules that are trained together with the student. Its `Traits` define the
    columns of a batch.

    Attributes:
        matching: how predictions are matched, for an objective that learns from the teacher's predictions.
    """

    matching: Matching = ClassMatching()

    @property
    def frozen_share(self) -> float:
        """Share of the steps, at the start, in which the student's weights do not change."""
        return 0.0

    def match_with(self, matching: Matching) -> None:
        """Set how predictions are matched, which depends on the task kind."""
        self.matching = matching

    def setup(self, context: ObjectiveContext) -> None:
        """Create the modules that depend on sizes. It is called once, before the optimizer is created."""

    def prepare(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Change a batch (with float images in ``images``) before the student sees it, for example by mixing pairs."""
        return batch

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """Return ``{"loss": scalar, ...}``; further entries are detached scalars for the log."""
        raise NotImplementedError

    def step(
        self, student: nn.Module, normalise: Normalise, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Compute the loss of a batch. An objective that does not call the student exactly once overrides this method.

        Args:
            student: the student, whose output is set by ``reads`` of the traits.
            normalise: a function from images (N, 3, H, W) with values 0..255, uint8 or float, to the student's input,
                without resizing.
            batch: ``pixels`` (N, 3, H, W) uint8; ``view_key`` (N,) int64, which for the n-th visit of an image does not
                depend on the worker, the order or restarts (see `ktray.data.augment.random_views`); and the targets.
            generator: a generator on the device of the batch, seeded by seed, step and rank.
        """
        batch = self.prepare({**batch, "images": batch["pixels"].float()}, generator)
        return self.loss(student(normalise(batch["images"])), batch)

    def after_step(self, student: nn.Module, progress: float) -> None:
        """Called after each optimizer step, for example to update an averaged copy.

        Args:
            progress: share of the steps that are finished, above 0 and at most 1.
        """

    def finish(self, model: nn.Module) -> None:
        """Write what the objective has learned for the student into the student, a timm model. It is called on models
        for validation and on the final model, and must be idempotent."""

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """FLOPs of training for one image.

        Args:
            train, forward: functions from the side of the input in pixels to the FLOPs of the student's training step
                and of its forward pass, for one image.
            size: side of the student's input.
        """
        return train(size)
