"""The teacher's outputs on views: the device half of TEACH, the same wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ktray.models.flops import forward_flops
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.teacher import patch_embeddings
from ktray.storage.columns import Rows
from ktray.targets.top_k import columns, sparsify

Batch = dict[str, torch.Tensor]


class Loads(Protocol):
    """A teacher as a picklable description."""

    def load(self) -> AdaptedTeacher: ...


@dataclass(frozen=True)
class Predict:
    """What to ask a teacher; picklable.

    Attributes:
        targets: ``logits``, ``embedding``, ``patch_embedding``: those of them that the objective needs.
        student_size: side of the pixels that go to the student.
        patch_side: side of the student's last map, to which patch embeddings are fitted.
        batch: images at once.
        top_k: classes whose logits are kept one by one (`ktray.targets.top_k`); 0: all.
    """

    source: Loads
    targets: tuple[str, ...]
    student_size: int
    patch_side: int
    batch: int = 256
    top_k: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """What the targets are called where they are stored."""
        return columns(self.targets, self.top_k)

    def load(self) -> Loaded:
        """With the teacher, on this process's device."""
        return Loaded(self, self.source.load())


class Loaded:
    """A teacher that answers."""

    def __init__(self, plan: Predict, teacher: AdaptedTeacher) -> None:
        self.plan, self.teacher = plan, teacher
        self.device = next(teacher.image_tower.parameters()).device
        self.flops = forward_flops(teacher.image_tower, (3, *teacher.preprocess.size))

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Batch:
        """Views (N, 3, H, W) uint8 on any device to ``pixels`` of the student's size (uint8), calibrated ``logits``
        (N, C) or maps of them (N, C, h, w), or what `sparsify` makes of either, ``embedding`` (N, D),
        ``patch_embedding`` (N, D, side, side), not normalised; all float16, on the teacher's device."""
        parts = [self._batch(pixels[at : at + self.plan.batch]) for at in range(0, len(pixels), self.plan.batch)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rows(self, pixels: np.ndarray) -> Rows:
        """The same for arrays in memory."""
        if not len(pixels):
            one = self(torch.zeros((1, *pixels.shape[1:]), dtype=torch.uint8))
            return {name: value[:0].cpu().numpy() for name, value in one.items()}
        return {name: value.cpu().numpy() for name, value in self(torch.from_numpy(pixels)).items()}

    def _batch(self, pixels: torch.Tensor) -> Batch:
        plan, teacher = self.plan, self.teacher
        views = pixels.to(self.device, non_blocking=True)
        found = {"pixels": fit_pixels(views, plan.student_size)}
        if "patch_embedding" in plan.targets:
            maps = patch_embeddings(teacher.image_tower, teacher.preprocess, teacher.source, views)
            found["patch_embedding"] = fit_maps(maps, plan.patch_side).half()
        embedding: torch.Tensor | None = None
        if "embedding" in plan.targets:
            embedding = teacher.embed(views).float()
            found["embedding"] = embedding.half()
        if "logits" in plan.targets:
            logits = teacher.logits(views, embedding)
            found |= sparsify(logits, plan.top_k) if plan.top_k else {"logits": logits.half()}
        return found


def fit_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 to (N, 3, size, size) uint8, antialiased."""
    if pixels.shape[-1] == size and pixels.shape[-2] == size:
        return pixels
    x = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def fit_maps(maps: torch.Tensor, side: int) -> torch.Tensor:
    """(N, D, h, w) averaged or interpolated to (N, D, side, side)."""
    if min(maps.shape[2:]) >= side:
        return F.adaptive_avg_pool2d(maps, side)
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
