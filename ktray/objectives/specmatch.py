"""Spectral feature matching: the student matches the frozen teacher's features along their principal directions.

Let ``t`` be the teacher's embedding of a view, ``m`` the mean and ``u_1..u_D`` the principal directions of the
embeddings of the transfer set, and ``v`` the mean variance over the D dimensions. For the student's pooled features
``f`` and a projection ``p = Linear(LayerNorm(f))`` to the teacher's width, which is dropped after the training,

    e_k  = mean over the views of ( u_k . (p - (t - m) / sqrt(v)) )^2
    loss = 1 / D * sum over k of (e_k + eps)^beta,             1 / beta = 3.

This is SpecMatch (Saito and Ushiku). A squared error is dominated by the few directions with a large variance. The
power below 1 gives an error in a direction the weight ``beta (e_k + eps)^(beta - 1)``, so that directions with a small
variance, in which a small error remains, are learned as well. ``beta = 1`` is the squared error. The mean over k and
the scale ``v`` are ktray's: they give the loss and ``eps`` the same size for every teacher.

In the first steps only the projection is trained (500 in the paper; here ``warmup``, a share of the steps), because the
gradients of an untrained projection would damage the features of a pretrained student. The student's weights do not
change in these steps; the statistics of its batch norms do.

The directions are computed once, in float64, from rows that are spread over the stored targets. They are a part of the
checkpoint, and DDP sends those of the first worker to all others. ``e_k`` is the mean over the batches of all workers,
so the number of workers does not change the gradient.

Use it instead of agnostic when the images are those of the task. Do not use it when the teacher can predict the task's
classes well, and when the targets cannot be stored (teach.mode=live, streamed).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn

from ktray.objectives.base import OBJECTIVES, Batch, Objective, ObjectiveConfig, ObjectiveContext, Traits


@OBJECTIVES.register("specmatch")
class SpecmatchConfig(ObjectiveConfig):
    """Spectral feature matching: the student matches the frozen teacher's features along their principal directions,
    also along those with a small variance. Use it instead of agnostic when the images are those of the task. Do not use
    it when the teacher predicts the task's classes well."""

    name: Literal["specmatch"] = "specmatch"
    power: float = Field(1 / 3, gt=0, le=1, description="exponent of the error in a direction; 1: squared error")
    epsilon: float = Field(
        1e-4, gt=0, description="error that is added in each direction; the mean variance of a direction is 1"
    )
    warmup: float = Field(
        0.05, ge=0, lt=1, description="share of the steps at the start in which only the projection is trained"
    )

    order: ClassVar[int] = 48
    colour: ClassVar[str] = "#e69f00"

    @property
    def traits(self) -> Traits:
        return Traits(frozenset({"embedding"}), reads="features", sampled=True)

    def build(self, *, hflip: float = 0.5) -> Specmatch:
        return Specmatch(self.power, self.epsilon, self.warmup)

    @classmethod
    def search_space(cls) -> dict[str, Any]:
        return {"power": [1 / 3, 0.5]}


class Specmatch(Objective):
    """See the docstring of the module. Batch: ``embedding`` (N, D) of the frozen teacher. It reads features (N, F).

    Args:
        power: beta.
        epsilon: eps.
        warmup: share of the steps in which only the projection is trained.
    """

    progress: torch.Tensor

    def __init__(self, power: float = 1 / 3, epsilon: float = 1e-4, warmup: float = 0.05) -> None:
        super().__init__()
        self.power, self.epsilon, self.warmup = power, epsilon, warmup

    @property
    def frozen_share(self) -> float:
        return self.warmup

    def setup(self, context: ObjectiveContext) -> None:
        """Create the projection, and compute the directions. Raises ValueError if the width of the embedding or the
        sample is not known."""
        if context.teacher_dim is None or context.teacher_sample is None:
            raise ValueError("Specmatch needs Context.teacher_dim and teacher_sample")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.project = nn.Sequential(
                nn.LayerNorm(context.student_dim), nn.Linear(context.student_dim, context.teacher_dim)
            )
        mean, directions, variance = principal(context.teacher_sample)
        scale = torch.where(variance > 0, variance, 1.0).rsqrt()  # a sample of one image has no variance
        # Parameters that are not trained: DDP sends them once, but sends buffers in each step.
        self.mean, self.directions, self.scale = (
            nn.Parameter(value.float(), requires_grad=False) for value in (mean, directions, scale)
        )
        # A buffer, so that checkpoints contain it.
        self.register_buffer("progress", torch.zeros(()))

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        features = student_out.float()
        # A gradient of 0 instead of none, because DDP waits for a gradient of each parameter.
        learn = (self.progress >= self.warmup).float()
        features = features.detach() + learn * (features - features.detach())
        with torch.autocast(features.device.type, enabled=False):
            target = (batch["embedding"].float() - self.mean) * self.scale
            difference = self.project(features) - target
            errors = (difference @ self.directions).square().mean(0)
            everywhere = _mean_over_workers(errors, len(features)) + self.epsilon
            # The gradient of the mean over all workers: DDP averages the gradients of the workers, and the weight of an
            # error depends on all of them.
            weight = self.power * everywhere ** (self.power - 1)
            surrogate = (weight * errors).mean()
            value = (everywhere**self.power).mean()
        loss = surrogate + (value - surrogate).detach()
        explained = 1 - difference.detach().square().sum() / target.square().sum().clamp(min=1e-12)
        return {"loss": loss, "explained": explained}

    def after_step(self, student: nn.Module, progress: float) -> None:
        self.progress.fill_(progress)


@torch.no_grad()
def principal(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (D,), principal directions (D, D) as columns by descending variance, and the mean variance over the
    dimensions, a scalar, of embeddings (M, D). All are float64 on the CPU."""
    rows = sample.double().cpu()
    mean = rows.mean(0)
    centred = rows - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(rows))
    return mean, directions.flip(1), variances.clamp(min=0).mean()


@torch.no_grad()
def _mean_over_workers(errors: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean of each error over the rows of all workers, whose numbers of rows may differ."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return errors.detach()
    total = torch.cat([errors.detach() * rows, errors.new_tensor([rows])])
    dist.all_reduce(total)
    return total[:-1] / total[-1]
