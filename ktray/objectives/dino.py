"""Self-supervised pretraining of the student by self-distillation (DINO, arXiv 2104.14294): images alone.

Two large (global) and several small (local) random crops of an image go through the student, the global ones also
through its momentum teacher, a moving average of the student. Each of the two has a projection head, an MLP to unit
vectors and their cosines ``z`` with K prototypes. With the teacher's outputs centred by ``c`` and sharpened,

    q = softmax((z_teacher - c) / T_teacher),   loss = - mean over pairs of q log softmax(z_student / T_student),

over all pairs of a global crop (teacher) and another crop (student) of an image (section 3.1, algorithm 1). Gradients
flow through the student alone. After a step

    c       <- m_c c + (1 - m_c) mean(z_teacher)      over the batch of all workers
    teacher <- m teacher + (1 - m) student            m from ``momentum`` to 1 along a half cosine.

Centring alone drives the outputs to uniform, sharpening alone to one prototype; together they prevent both. As
published, batch norm in the teacher uses its own batches and stochastic layers are off, the prototypes are of unit
length and rest for the first steps, the teacher's temperature rises over the first steps, and it is the teacher's
weights that are handed on.

What differs from the paper's ImageNet setting, by default: 1024 prototypes instead of 65536 and a head of 512/128
instead of 2048/256, since a set of some ten thousand images cannot fill more; and momentum from 0.99 instead of 0.996.
The average looks back over about 1 / (1 - m) steps: 250 of the paper's 125 000. A run of a thousand steps would keep
its random start for a quarter of its time; 100 steps are as short as stays steady. There is no blur and no greyscale.

Use it when nothing but images is to be had. Do not when any teacher can be had: it needs many times the steps, and
self-supervision gives small models little (SEED, arXiv 2101.04731).
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
# Shares of the steps: the teacher's temperature rises over the first, the prototypes rest over the second.
_WARM, _REST = 0.1, 0.01


@OBJECTIVES.register("dino")
class DinoConfig(ObjectiveConfig):
    """Self-supervised pretraining of the student by self-distillation (DINO), from images alone. Use it when nothing
    but images can be had. Do not use it when any teacher can be had: it needs many times the steps, and
    self-supervision gives small models little."""

    name: Literal["dino"] = "dino"
    prototypes: int = Field(1024, ge=2, description="outputs of the projection head")
    local_crops: int = Field(6, ge=0, description="small crops beside the two large ones")

    sources: ClassVar[tuple[str, ...]] = ("generic", "target", "retrieved")
    order: ClassVar[int] = 70
    colour: ClassVar[str] = "#8250a0"

    @property
    def traits(self) -> Traits:
        return Traits(reads="features", views="canvas")

    def build(self, *, hflip: float = 0.5) -> Dino:
        return Dino(self.prototypes, self.local_crops, hflip=hflip)


class Head(nn.Module):
    """Projection head of DINO (section 3.2): MLP of three layers, unit length, cosines with K prototypes.

    Args:
        dim: width of the features.
        hidden, bottleneck: of the MLP.
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
        """(N, F) to (N, K) cosines. ``learn``: 0 keeps the gradient from the prototypes, 1 lets it through."""
        weight = self.prototypes.weight
        weight = weight.detach() + learn * (weight - weight.detach())
        inner = F.normalize(self.mlp(features).float(), dim=1)
        # The temperatures divide cosines by as little as 0.04: three digits would not do.
        with torch.autocast(inner.device.type, enabled=False):
            return F.linear(inner, F.normalize(weight, dim=1))


class Dino(Objective):
    """See the module's text. Batch: ``pixels`` (N, 3, H, W) uint8, whole images, and ``view_key`` (N,).

    Args:
        prototypes, hidden, bottleneck: sizes of the projection heads.
        local_crops: number of small crops.
        global_scale, local_scale: areas of the crops, as shares of the image's.
        jitter: strength of brightness, contrast and saturation changes.
        hflip: probability of a horizontal flip; 0 where left and right are not alike.
        momentum: of the teacher at the start.
        teacher_temperature: at the start and after a tenth of the steps.
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
        """Raises ValueError when the student or its size is not known."""
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
        # A buffer, so that a restart goes on where it was.
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
        seen = torch.cat([self.head(f.float(), learn) for f in features])
        with torch.no_grad():
            target = self.teacher_head(self.teacher(normalise(large)).float())
        found = self.loss(seen, {"teacher": target})
        if self.training:
            self._move_center(target)
        spread = F.normalize(features[0].detach().float(), dim=1).std(0).square().sum().sqrt()
        return {**found, "feature_std": spread}

    def loss(self, student_out: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        """The loss from the heads' outputs.

        Args:
            student_out: ((2 + L) N, K), crop by crop, the global ones first.
            batch: ``teacher`` (2 N, K), of the global crops.

        Returns:
            ``loss``; ``teacher_entropy``, mean over the images, and ``used_entropy``, of the mean over the images, both
            as shares of log K: 0 and 0 is collapse to one prototype, 1 and 1 collapse to uniform.
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
        mine: list[torch.Tensor] = [*self.teacher.parameters(), *self.teacher_head.parameters()]
        live: list[torch.Tensor] = [*student.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(mine, live, 1 - momentum)
        self.progress.fill_(progress)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Hand on the momentum teacher, as the paper does (section 5.2: better than the student all along)."""
        for mine, theirs in (
            (self.teacher.parameters(), model.parameters()),
            (self.teacher.buffers(), model.buffers()),
        ):
            for source, target in zip(mine, theirs, strict=True):
                target.copy_(source)

    def flops(self, train: FlopsOf, forward: FlopsOf, size: int) -> float:
        """All crops through the student, the global ones also through the teacher; heads are not counted."""
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
    """Mean cross-entropy over all pairs of a teacher's crop and another crop of the student.

    Args:
        log_p: student's log probabilities (N, K) of each crop, the global ones first.
        q: teacher's probabilities (N, K) of each global crop.
    """
    pairs = [-(a * b).sum(1).mean() for i, a in enumerate(q) for j, b in enumerate(log_p) if i != j]
    return torch.stack(pairs).mean()


def local_side(size: int) -> int:
    """Side of the local crops for global ones of ``size``: 96 of 224 px as published; multiples of 8, at least 16."""
    return min(size, max(16, 8 * round(size * 96 / 224 / 8)))


@torch.no_grad()
def _runs(student: nn.Module, side: int) -> bool:
    """Whether the student sees images of this size; those of a fixed size do not."""
    was, first = student.training, next(student.parameters())
    student.eval()
    try:
        student(torch.zeros(1, 3, side, side, device=first.device, dtype=first.dtype))
    except (AssertionError, RuntimeError, ValueError):
        return False
    finally:
        student.train(was)
    return True
