"""Self-supervised pretraining of the student by self-distillation (DINO, arXiv 2104.14294), from images alone.

The student processes two large (global) and several small (local) random crops of an image. The momentum teacher, a
moving average of the student, processes the global crops. Both have a projection head: an MLP to unit vectors, and
their cosines ``z`` with K prototypes. With the teacher's outputs centred by ``c`` and sharpened,

    q = softmax((z_teacher - c) / T_teacher),   loss = - mean over pairs of q log softmax(z_student / T_student),

over all pairs of a global crop (teacher) and another crop (student) of an image (section 3.1, algorithm 1). Gradients
flow only through the student. After a step

    c       <- m_c c + (1 - m_c) mean(z_teacher)      over the batch of all workers
    teacher <- m teacher + (1 - m) student            m from ``momentum`` to 1 along a half cosine.

Centring alone drives the outputs to a uniform distribution, sharpening alone to one prototype; together they prevent
both. As published, batch norm in the teacher uses its own batches and stochastic layers are off, the prototypes have
unit length and are not trained in the first steps, the teacher's temperature rises in the first steps, and the result
is the teacher.

The defaults differ from the paper's ImageNet setting: 1024 prototypes instead of 65536 and a head of 512/128 instead of
2048/256, because a set of about ten thousand images cannot use more; and an initial momentum of 0.99 instead of 0.996.
The average covers about 1 / (1 - m) steps: 250 of the paper's 125 000. In a run of a thousand steps, it would contain
the random initial weights for a quarter of the time; 100 steps are the shortest average that is stable. There is no
blur and no greyscale.

Use it when only images are available. Do not use it when any teacher is available: it needs many times the steps, and
small models gain little from self-supervision (SEED, arXiv 2101.04731).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ktray.data.augment import random_views
from ktray.data.views import ViewPolicy
from ktray.objectives.base import (
    OBJECTIVES,
    Batch,
    FlopsOf,
    Normalise,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    Traits,
)

_STUDENT_TEMPERATURE = 0.1
_CENTRE_MOMENTUM = 0.9
# Shares of the steps in which the teacher's temperature rises, and in which the prototypes are not trained.
_WARM, _REST = 0.1, 0.01


@OBJECTIVES.register("dino")
class DinoConfig(ObjectiveConfig):
    """Self-supervised pretraining of the student by self-distillation (DINO), from images alone. Use it when only
    images are available. Do not use it when any teacher is available: it needs many times the steps, and small models
    gain little from self-supervision."""

    name: Literal["dino"] = "dino"
    prototypes: int = Field(1024, ge=2, description="number of outputs of the projection head")
    local_crops: int = Field(
        6, ge=0, description="number of small crops of an image, in addition to the two large ones"
    )

    sources: ClassVar[tuple[str, ...]] = ("generic", "target", "retrieved")
    order: ClassVar[int] = 70
    colour: ClassVar[str] = "#8250a0"

    @property
    def traits(self) -> Traits:
        return Traits(reads="features", views="canvas")

    def build(self, *, hflip: float = 0.5) -> Dino:
        return Dino(self.prototypes, self.local_crops, hflip=hflip)


class Head(nn.Module):
    """Projection head of DINO (section 3.2): an MLP of three layers, normalisation, and cosines with K prototypes.

    Args:
        dim: width of the features.
        hidden, bottleneck: widths of the MLP.
        prototypes: K.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        layers = [nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, features: torch.Tensor, learn: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Cosines (N, K) from features (N, F). ``learn``: factor on the gradient of the prototypes, 0 or 1."""
        weight = self.prototypes.weight
        weight = weight.detach() + learn * (weight - weight.detach())
        inner = F.normalize(self.mlp(features).float(), dim=1)
        # In full precision: cosines are divided by temperatures as low as 0.04, and three digits are not enough.
        with torch.autocast(inner.device.type, enabled=False):
            return F.linear(inner, F.normalize(weight, dim=1))


class Dino(Objective):
    """See the docstring of the module. Batch: ``pixels`` (N, 3, H, W) uint8, whole images, and ``view_key`` (N,).

    Args:
        prototypes, hidden, bottleneck: sizes of the projection heads.
        local_crops: number of small crops.
        global_scale, local_scale: ranges of the area of the crops, as shares of the image.
        jitter: strength of brightness, contrast and saturation changes.
        hflip: probability of a horizontal flip; 0 for images that a flip changes.
        momentum: initial momentum of the teacher.
        teacher_temperature: the teacher's temperature at the start and after a tenth of the steps.
    """

    center: torch.Tensor
    progress: torch.Tensor

    def __init__(
        self,
        prototypes: int = 1024,
        local_crops: int = 6,
        hidden: int = 512,
        bottleneck: int = 128,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        jitter: tuple[float, float, float] = (0.4, 0.4, 0.2),
        hflip: float = 0.5,
        momentum: float = 0.99,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
    ) -> None:
        super().__init__()
        self.sizes = hidden, bottleneck, prototypes
        self.local_crops, self.momentum, self.teacher_temperature = local_crops, momentum, teacher_temperature
        brightness, contrast, saturation = jitter
        self.global_policy = ViewPolicy(
            scale=global_scale, hflip=hflip, brightness=brightness, contrast=contrast, saturation=saturation
        )
        self.local_policy = replace(self.global_policy, scale=local_scale)
        self.fits = True

    def setup(self, context: ObjectiveContext) -> None:
        """Create the heads and the teacher. Raises ValueError if the student or its input size is not known."""
        if context.student is None or not context.image_size:
            raise ValueError("Dino needs Context.student and Context.image_size")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            self.head = Head(context.student_dim, *self.sizes)
        self.image_size = context.image_size
        self.fits = _runs(context.student, local_side(context.image_size))
        self.teacher = deepcopy(context.student).requires_grad_(False)
        self.teacher_head = deepcopy(self.head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(self.sizes[-1]))
        # A buffer, so that checkpoints contain it.
        self.register_buffer("progress", torch.zeros(()))
        self.train()

    def train(self, mode: bool = True) -> Dino:
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
            for module in self.teacher.modules():
                if isinstance(module, _BatchNorm):
                    module.train(mode)
        return self

    def step(
        self, student: nn.Module, normalise: Normalise, batch: Batch, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        large = torch.cat(self._crops(batch, self.global_policy, range(2), self.image_size))
        features = [student(normalise(large))]
        if self.local_crops:
            places = range(2, 2 + self.local_crops)
            small = self._crops(batch, self.local_policy, places, self._local(self.image_size))
            features.append(student(normalise(torch.cat(small))))
        learn = (self.progress >= _REST).float()
        outputs = torch.cat([self.head(f.float(), learn) for f in features])
        with torch.no_grad():
            target = self.teacher_head(self.teacher(normalise(large)).float())
        losses = self.loss(outputs, {"teacher": target})
        if self.training:
            self._move_center(target)
        spread = F.normalize(features[0].detach().float(), dim=1).std(0).square().sum().sqrt()
        return {**losses, "feature_std": spread}

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss of the outputs of the heads.

        Args:
            student_out: ((2 + L) N, K), crop by crop, with the global crops first.
            batch: ``teacher`` (2 N, K), the teacher's outputs of the global crops.

        Returns:
            ``loss``; ``teacher_entropy``, the mean entropy over the images, and ``used_entropy``, the entropy of the
            mean over the images, both as shares of log K. If both are 0, the outputs have collapsed to one prototype;
            if both are 1, to a uniform distribution.
        """
        start, end = self.teacher_temperature
        heat = start + (end - start) * (self.progress / _WARM).clamp(max=1.0)
        q = F.softmax((batch["teacher"] - self.center) / heat, dim=1)
        log_p = F.log_softmax(student_out / _STUDENT_TEMPERATURE, dim=1)
        loss = cross_view_loss(log_p.chunk(2 + self.local_crops), q.chunk(2))
        most = math.log(q.shape[1])
        own, used = torch.special.entr(q).sum(1).mean() / most, torch.special.entr(q.mean(0)).sum() / most
        return {"loss": loss, "teacher_entropy": own, "used_entropy": used}

    @torch.no_grad()
    def after_step(self, student: nn.Module, progress: float) -> None:
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        averaged: list[torch.Tensor] = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        current: list[torch.Tensor] = [*student.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - momentum)
        self.progress.fill_(progress)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Write the momentum teacher into the student, as in the paper (section 5.2: it is better throughout
        training)."""
        for mine, theirs in (
            (self.teacher.parameters(), model.parameters()),
            (self.teacher.buffers(), model.buffers()),
        ):
            for source, target in zip(mine, theirs, strict=True):
                target.copy_(source)

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """FLOPs of all crops in the student and of the global crops in the teacher, without the heads."""
        return 2 * train(size) + self.local_crops * train(self._local(size)) + 2 * forward(size)

    def _local(self, size: int) -> int:
        return local_side(size) if self.fits else size

    def _crops(self, batch: Batch, policy: ViewPolicy, salts: Sequence[int], size: int) -> list[torch.Tensor]:
        return [random_views(batch["pixels"], policy, batch["view_key"], salt=i, size=size) for i in salts]

    @torch.no_grad()
    def _move_center(self, target: torch.Tensor) -> None:
        mean = target.mean(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - _CENTRE_MOMENTUM)


def cross_view_loss(log_p: Sequence[torch.Tensor], q: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over all pairs of a crop of the teacher and another crop of the student.

    Args:
        log_p: log probabilities (N, K) of the student for each crop, with the global crops first.
        q: probabilities (N, K) of the teacher for each global crop.
    """
    pairs = [-(a * b).sum(1).mean() for i, a in enumerate(q) for j, b in enumerate(log_p) if i != j]
    return torch.stack(pairs).mean()


def local_side(size: int) -> int:
    """Side of the local crops in pixels, a multiple of 8 and at least 16, for global crops of side ``size``. The ratio
    is that of the paper, 96 to 224."""
    return min(size, max(16, 8 * round(size * 96 / 224 / 8)))


@torch.no_grad()
def _runs(student: nn.Module, side: int) -> bool:
    """Whether the student accepts images of this size; a student with a fixed input size does not."""
    training, first = student.training, next(student.parameters())
    student.eval()
    try:
        student(torch.zeros(1, 3, side, side, device=first.device, dtype=first.dtype))
    except (AssertionError, RuntimeError, ValueError):
        return False
    finally:
        student.train(training)
    return True
