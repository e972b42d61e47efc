"""The outputs of the teacher for views: the part of TEACH that runs on devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ktray.models.flops import count_flops
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.teacher import embed_with_patches, fitting_batch, patch_embeddings
from ktray.storage.columns import Rows
from ktray.targets.top_k import columns, sparsify

Batch = dict[str, torch.Tensor]
_COUNTED = 2  # views with which FLOPs are counted


class Loads(Protocol):
    """A picklable description of a teacher, which can load it."""

    def load(self) -> AdaptedTeacher: ...


@dataclass(frozen=True)
class Predict:
    """Which outputs of a teacher to compute. It is picklable.

    Attributes:
        source: the teacher.
        targets: the targets that the objective needs, of ``logits``, ``embedding`` and ``patch_embedding``.
        student_size: side of the student's images, in pixels.
        patch_side: side of the student's last feature map, to which patch embeddings are resized.
        batch: number of images per batch.
        top_k: number of classes whose logits are kept (`ktray.targets.top_k`); 0: all.
        relative: whether only differences between logits matter, as before a softmax; the largest is then stored as 0.
    """

    source: Loads
    targets: tuple[str, ...]
    student_size: int
    patch_side: int
    batch: int = 256
    top_k: int = 0
    relative: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns in which the targets are stored."""
        return columns(self.targets, self.top_k)

    def load(self) -> Loaded:
        """Load the teacher on the device of this process."""
        return Loaded(self, self.source.load())

    def resized(self, columns: Rows) -> Rows:
        """The column ``pixels`` (N, 3, H, W) uint8 at the student's size."""
        pixels = torch.from_numpy(columns["pixels"])
        return {"pixels": fit_pixels(pixels, self.student_size).numpy()}


class Loaded:
    """A loaded teacher that computes the outputs of a `Predict`.

    Attributes:
        flops: FLOPs for one view, counted on the graph of all outputs.
    """

    def __init__(self, plan: Predict, teacher: AdaptedTeacher) -> None:
        self.plan, self.teacher = plan, teacher
        self.device = next(teacher.image_tower.parameters()).device
        # What is executed, because some outputs need a pass of the tower of their own.
        size = max(max(part.preprocess.size) for part in teacher.members)
        views = torch.zeros((_COUNTED, 3, size, size), dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            self.flops = count_flops(lambda: self._batch(views)) / _COUNTED

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> Batch:
        """Compute the targets of views.

        Args:
            pixels: (N, 3, H, W) uint8, on any device.

        Returns:
            ``pixels`` of the student's size, uint8, and the targets, float16, all on the teacher's device: calibrated
            ``logits`` (N, C) or maps of logits (N, C, h, w), or the result of `sparsify` for either; ``embedding``
            (N, D); ``patch_embedding`` (N, D, side, side), not normalised.
        """
        views = pixels.to(self.device, non_blocking=True)
        return {"pixels": fit_pixels(views, self.plan.student_size), **self._outputs(views)}

    @torch.no_grad()
    def targets(self, pixels: np.ndarray) -> Rows:
        """The same targets, without the pixels, as NumPy arrays, for views (N, 3, H, W) uint8; N may be 0."""
        if not len(pixels):
            example = self._outputs(torch.zeros((1, *pixels.shape[1:]), dtype=torch.uint8))
            return {name: value[:0].cpu().numpy() for name, value in example.items()}
        return {name: value.cpu().numpy() for name, value in self._outputs(torch.from_numpy(pixels)).items()}

    def _outputs(self, pixels: torch.Tensor) -> Batch:
        size = fitting_batch(self.teacher.preprocess, self.device, self.plan.batch)
        parts = [self._batch(pixels[at : at + size]) for at in range(0, len(pixels), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _batch(self, pixels: torch.Tensor) -> Batch:
        plan, teacher = self.plan, self.teacher
        views = pixels.to(self.device, non_blocking=True)
        outputs: Batch = {}
        embedding: torch.Tensor | None = None
        if "patch_embedding" in plan.targets:
            first = teacher.members[0]  # the teacher whose embeddings the targets are
            tower = first.image_tower, first.preprocess, first.source, views
            if "embedding" in plan.targets or "logits" in plan.targets:
                embedding, maps = embed_with_patches(*tower)
            else:
                maps = patch_embeddings(*tower)
            outputs["patch_embedding"] = fit_maps(maps, plan.patch_side).half()
        if "embedding" in plan.targets:
            embedding = teacher.embed(views).float() if embedding is None else embedding
            outputs["embedding"] = embedding.half()
        if "logits" in plan.targets:
            logits = teacher.logits(views, embedding)
            if plan.relative:
                # Half precision has steps of 0.25 above 256, and ends at 65,504.
                logits = logits - logits.amax(1, keepdim=True)
            outputs |= sparsify(logits, plan.top_k) if plan.top_k else {"logits": logits.half()}
        return outputs


def fit_pixels(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 to (N, 3, size, size) uint8, antialiased."""
    if pixels.shape[-1] == size and pixels.shape[-2] == size:
        return pixels
    x = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def fit_maps(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Resize (N, D, h, w) to (N, D, side, side), by averaging or interpolation."""
    if min(maps.shape[2:]) >= side:
        return F.adaptive_avg_pool2d(maps, side)
    return F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
