"""Loading a teacher by name, whatever family it is of.

There are only two ways to weights: a file (``teacher.checkpoint``, or one that ships), or what the family's library
publishes. Random weights are never used silently.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from ktray.errors import KtrayError
from ktray.models.messages import cause
from ktray.models.teacher.families.base import ResolvedTeacher, TeacherFamily, family_of
from ktray.models.teacher.teacher import Teacher, TeacherSource
from ktray.models.weights import fetch, file_digest


def load_teacher(
    name: str,
    checkpoint: str | None = None,
    config: str | dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> Teacher:
    """A teacher in evaluation mode, float32.

    Args:
        name: the family and its name of the model: ``open_clip:<model>[/<pretrained>]``,
            ``timm:<model>[.<pretrained>]``, ``miniverse``, or what another family reads.
        checkpoint: weights, local or ``s3://``; safetensors, or a torch file of tensors only.
        config: an open_clip model config (path, or the parsed JSON); it decides the architecture, and
            ``<model>`` is then free. Files with ``model_cfg`` and ``preprocess_cfg`` work too.
        device: where to put it.
        image_size: input size other than the model's own, pixels; position embeddings are resampled.

    Raises:
        KtrayError: unknown name; no weights to load, or none that can be fetched; a file that is missing,
            damaged, not tensors only, or does not fit.
    """
    return _build(TeacherSource(name, checkpoint, config, image_size), load=True).to(device)


def build_teacher(source: TeacherSource, device: str = "cpu") -> Teacher:
    """A teacher's architecture without its weights: for callers that fill it at once, or (``device="meta"``) plan.

    Its fingerprint is empty.
    """
    with torch.device(device):
        return _build(source, load=False, device=device)


def teacher_fingerprint(
    name: str,
    checkpoint: str | None = None,
    config: str | dict[str, Any] | None = None,
    image_size: int | None = None,
) -> str:
    """`Teacher.fingerprint` without building the model (the weights file is read once to hash it).

    SHA-256 of the architecture's config, the weights file's content (or the published tag), and the image size.
    """
    family, source = family_of(name), TeacherSource(name, checkpoint, config, image_size)
    return _fingerprint(family, family.resolve(source))


def _fingerprint(family: TeacherFamily, found: ResolvedTeacher) -> str:
    weights = file_digest(fetch(found.checkpoint)) if found.checkpoint else "published"
    content = [found.library, family.architecture(found), found.tag, weights, found.source.image_size]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build(source: TeacherSource, load: bool, device: str = "cpu") -> Teacher:
    family = family_of(source.name)
    found = family.resolve(source)
    # The file is checked first: building a large model takes longer than finding that it is not there.
    path = fetch(found.checkpoint) if found.checkpoint and load else None
    parts = family.build(found, path, load and path is None, device)
    widths = family.map_widths(parts.image_tower)
    teacher = Teacher(
        parts.image_tower,
        parts.text,
        parts.preprocess,
        embed_dim=parts.embed_dim,
        # The last map's channels: some convolutional models widen after it.
        patch_dim=widths[-1] if widths else None,
        source=source,
        fingerprint=_fingerprint(family, found) if load else "",
    ).eval()
    if source.image_size:
        _check_size(teacher, source.image_size)
    return teacher


def _check_size(teacher: Teacher, image_size: int) -> None:
    try:
        with torch.inference_mode():
            device = next(teacher.image_tower.parameters()).device
            teacher.embed(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device))
    except Exception as error:
        raise KtrayError(
            f"Teacher '{teacher.name}' cannot see images of {image_size} px: {cause(error)}",
            "Choose a multiple of its patch size, or its own size.",
        ) from error
