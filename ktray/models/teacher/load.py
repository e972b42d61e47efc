"""Load a teacher of any family by name.

Weights come either from a file (``teacher.checkpoint``, or a file of the package) or from the published weights of the
family's library. Random weights are never used silently.
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
    """Load a teacher, in evaluation mode and float32.

    Args:
        name: the family, and the name of the model in this family: ``open_clip:<model>[/<pretrained>]``,
            ``timm:<model>[.<pretrained>]``, ``miniverse``, or a name of another family.
        checkpoint: weights, local or ``s3://``: safetensors, or a torch file with only tensors.
        config: an open_clip model config (path, or the parsed JSON). It determines the architecture, so that
            ``<model>`` may be any name. Files with ``model_cfg`` and ``preprocess_cfg`` are accepted as well.
        device: the device of the result.
        image_size: input size in pixels, if it differs from the model's own; position embeddings are resampled.

    Raises:
        KtrayError: the name is unknown, there are no weights or they cannot be fetched, or a file is missing, damaged,
            contains more than tensors, or does not fit.
    """
    return _build(TeacherSource(name, checkpoint, config, image_size), load=True).to(device)


def build_teacher(source: TeacherSource, device: str = "cpu") -> Teacher:
    """The architecture of a teacher without its weights, for callers that load weights themselves, or that only plan
    (``device="meta"``). Its fingerprint is empty.
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


def _fingerprint(family: TeacherFamily, resolved: ResolvedTeacher) -> str:
    weights = file_digest(fetch(resolved.checkpoint)) if resolved.checkpoint else "published"
    content = [resolved.library, family.architecture(resolved), resolved.tag, weights, resolved.source.image_size]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build(source: TeacherSource, load: bool, device: str = "cpu") -> Teacher:
    family = family_of(source.name)
    resolved = family.resolve(source)
    # The file is checked first, because building a large model takes longer than detecting a missing file.
    path = fetch(resolved.checkpoint) if resolved.checkpoint and load else None
    parts = family.build(resolved, path, load and path is None, device)
    widths = family.map_widths(parts.image_tower)
    teacher = Teacher(
        parts.image_tower,
        parts.text,
        parts.preprocess,
        embed_dim=parts.embed_dim,
        # The channels of the last map, because some convolutional models have wider layers after it.
        patch_dim=widths[-1] if widths else None,
        source=source,
        fingerprint=_fingerprint(family, resolved) if load else "",
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
            f"Teacher '{teacher.name}' cannot process images of {image_size} px: {cause(error)}",
            "Choose a multiple of its patch size, or remove the image size.",
        ) from error
