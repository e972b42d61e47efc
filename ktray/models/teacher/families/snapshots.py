"""Teachers by repository or folder: ``hf-hub:ORG/NAME[@REVISION]`` and ``local-dir:FOLDER``, with the config of timm,
open_clip or transformers (DINOv2, DINOv3 and the image tower of SigLIP)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.models.features import feature_dim
from ktray.models.snapshots import FOLDER, HUB, OPEN_CLIP, TRANSFORMERS, Snapshot, open_snapshot
from ktray.models.teacher.families.base import (
    UNKNOWN_LICENCE,
    ResolvedTeacher,
    TeacherFamily,
    TeacherParts,
    TeacherSource,
    cannot_build,
    model_of,
    not_a_name,
)
from ktray.models.teacher.families.open_clip import OpenClipFamily, check_config
from ktray.models.teacher.families.timm import TimmFamily
from ktray.models.transformers_forms import timm_form
from ktray.models.weights import load_timm_state, load_timm_weights, read_weights
from ktray.recipe.registries import TEACHERS

_KEY = "teacher.name"


class SnapshotFamily(TeacherFamily):
    """Models of a repository on the Hugging Face hub, or of a folder with the same files.

    Args:
        prefix: the word before the colon.
        syntax: see `TeacherFamily.syntax`.
    """

    def __init__(self, prefix: str, syntax: str) -> None:
        self.prefix, self.syntax = prefix, syntax

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        if not model_of(source.name):
            raise not_a_name(source.name)
        found = open_snapshot(source.name, _KEY)
        if found.kind == OPEN_CLIP:
            check_config(found.config, source.name)
        elif found.kind == TRANSFORMERS:
            timm_form(found.config, source.name)
        checkpoint = source.checkpoint or (str(found.weights()) if self.prefix == FOLDER else None)
        tag = None if checkpoint else found.commit
        return ResolvedTeacher(source, found.kind, model_of(source.name), tag, checkpoint, found.config)

    def architecture(self, found: ResolvedTeacher) -> Any:
        return found.config

    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        snapshot = open_snapshot(found.source.name, _KEY)
        path = snapshot.weights() if published else weights
        if snapshot.kind == OPEN_CLIP:
            # The name becomes that of a file in open_clip.
            inner = replace(found, model=found.model.strip("/").replace("/", "--"), tag=None)
            return OpenClipFamily().build(inner, path, False, device)
        return _build(found, snapshot, path)

    def map_widths(self, tower: nn.Module) -> list[int]:
        return _library(tower).map_widths(tower)

    def patch_maps(self, tower: nn.Module, x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        return _library(tower).patch_maps(tower, x, levels)

    def output_and_maps(self, tower: nn.Module, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        return _library(tower).output_and_maps(tower, x)

    def licence(self, model: str) -> str:
        return f"{UNKNOWN_LICENCE} (the model card of {model})" if self.prefix == HUB else UNKNOWN_LICENCE


def _library(tower: nn.Module) -> TeacherFamily:
    return OpenClipFamily() if isinstance(tower, TimmModel | VisionTransformer | ModifiedResNet) else TimmFamily()


def _build(found: ResolvedTeacher, snapshot: Snapshot, path: Path | None) -> TeacherParts:
    form = timm_form(snapshot.config, snapshot.name) if snapshot.kind == TRANSFORMERS else None
    architecture = form.architecture if form else snapshot.architecture
    arguments, cfg, size = form.kwargs if form else snapshot.arguments, snapshot.pretrained_cfg, found.source.image_size
    if size and not form and cfg.get("fixed_input_size"):
        arguments = {**arguments, "img_size": size}
    try:
        model = timm.create_model(
            architecture, pretrained=False, num_classes=0, pretrained_cfg_overlay=cfg or None, **arguments
        )
    except Exception as error:
        raise cannot_build(found, error) from error
    if path is not None and form:
        load_timm_state(model, form.convert(read_weights(path, _KEY)), path, _KEY)
    elif path is not None:
        load_timm_weights(model, path, _KEY)
    preprocess = Preprocess.from_timm(model)
    return TeacherParts(model, preprocess.with_size(size) if size else preprocess, feature_dim(model))


TEACHERS.register(HUB)(SnapshotFamily(HUB, "hf-hub:ORG/NAME"))
TEACHERS.register(FOLDER)(SnapshotFamily(FOLDER, "local-dir:FOLDER"))
