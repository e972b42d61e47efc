"""Picklable descriptions of teachers, from which a Ray actor loads the model on its node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ktray.data.preprocess import Preprocess
from ktray.models.device import device
from ktray.models.features import is_convolutional
from ktray.models.flops import forward_flops
from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.teacher import Teacher, TeacherSource, fitting_batch, float32_products, rounds
from ktray.reporting.heartbeat import beat
from ktray.storage.store import Dir

COMPARED = 32
_COMPARED: WeakKeyDictionary[Teacher, int] = WeakKeyDictionary()  # by model, the images that were compared


@dataclass(frozen=True)
class TeacherSpec:
    """Description of a frozen teacher; see `Teacher` for the fields."""

    source: TeacherSource
    fingerprint: str
    preprocess: Preprocess
    embed_dim: int
    has_text: bool
    patch_dim: int | None = None

    @classmethod
    def of(cls, source: TeacherSource) -> TeacherSpec:
        """Load the teacher once to determine its properties."""
        from ktray.models.teacher.load import load_teacher, teacher_fingerprint  # slow to import

        teacher = load_teacher(source.name, source.checkpoint, source.config, image_size=source.image_size)
        fingerprint = teacher_fingerprint(source.name, source.checkpoint, source.config, source.image_size)
        return cls(source, fingerprint, teacher.preprocess, teacher.embed_dim, teacher.has_text, teacher.patch_dim)

    def load(self) -> Teacher:
        """Load the teacher with its text tower."""
        from ktray.models.teacher.load import load_teacher  # slow to import

        s = self.source
        return laid_out(load_teacher(s.name, s.checkpoint, s.config, device=device(), image_size=s.image_size))

    def tower(self) -> Teacher:
        """Load the teacher without its text tower."""
        return self.load().drop_text()


@dataclass(frozen=True)
class Tower:
    """Description of a frozen teacher without its text tower."""

    spec: TeacherSpec

    def load(self) -> Teacher:
        return self.spec.tower()


@dataclass(frozen=True)
class AdaptedSpec:
    """Description of an adapted teacher in the store.

    Attributes:
        form: its class.
        base: where the files of the base teacher are now, if they have moved since the teacher was adapted; None: they
            have not.
    """

    directory: Dir
    preprocess: Preprocess
    form: type[AdaptedTeacher] = AdaptedTeacher
    base: TeacherSource | None = None

    def load(self) -> AdaptedTeacher:
        base = self.base
        with self.directory.local() as folder:
            checkpoint, config = (base.checkpoint, base.config) if base else (None, None)
            return laid_out(self.form.load(folder, device(), checkpoint, config))


Model = TypeVar("Model", Teacher, AdaptedTeacher)


def laid_out(model: Model) -> Model:
    """Set the channels-last layout for convolutional towers; returns the model.

    It reduces the time of a forward pass on CPUs by a third, and tensor cores of GPUs need it.
    """
    if is_convolutional(model.image_tower):
        model.image_tower.to(memory_format=torch.channels_last)
    return model


def tower_flops(model: Teacher | AdaptedTeacher) -> float:
    """FLOPs of the image tower for one image; of several teachers, the sum."""
    parts = model.members if isinstance(model, AdaptedTeacher) else [model]
    return sum(forward_flops(part.image_tower, (3, *part.preprocess.size)) for part in parts)


@torch.inference_mode()
def embed_numpy(model: Teacher | AdaptedTeacher, pixels: np.ndarray, batch: int) -> np.ndarray:
    """(N, 3, H, W) uint8 to (N, D) float32, not normalised."""
    return _batched(model, model.embed, pixels, batch, model.embed_dim)


def cosine_to_float32(model: Teacher, pixels: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """How much the number format of this device changes embeddings.

    Args:
        pixels: (N, 3, H, W) uint8.
        usual: (N, D) their embeddings, as they are computed here.

    Returns:
        (M,) float32: cosine similarities of embeddings with those of a pass in float32, for the first `COMPARED` images
        that a loaded model is called with. (0,) for later images, and where all products are in float32.
    """
    compared = _COMPARED.setdefault(model, 0)
    pixels = pixels[: COMPARED - compared]
    if not len(pixels) or not rounds(device()):
        return np.zeros(0, np.float32)
    _COMPARED[model] = compared + len(pixels)
    with float32_products():
        exact = torch.from_numpy(embed_numpy(model, pixels, len(pixels)))
    found = torch.from_numpy(usual[: len(pixels)].astype(np.float32))
    return torch.nn.functional.cosine_similarity(found, exact).numpy()


@torch.inference_mode()
def predict_numpy(model: AdaptedTeacher, pixels: np.ndarray, batch: int) -> np.ndarray:
    """(N, 3, H, W) uint8 to calibrated logits (N, C) float32, or maps of logits (N, C, h, w)."""
    return _batched(model, model.logits, pixels, batch, len(model.classes))


def _batched(model: Teacher | AdaptedTeacher, function: Any, pixels: np.ndarray, batch: int, width: int) -> np.ndarray:
    target = device()
    batch = fitting_batch(model.preprocess, target, batch)
    parts = []
    for first in range(0, len(pixels), batch):
        images = torch.from_numpy(np.ascontiguousarray(pixels[first : first + batch])).to(target)
        parts.append(function(images).float().cpu().numpy())
        beat()
    return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)
