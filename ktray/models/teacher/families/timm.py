"""Teachers of timm: ``timm:<model>[.<pretrained>]``, with only an image tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import nn

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import feature_dim
from ktray.models.messages import unknown_name
from ktray.models.teacher.families.base import (
    UNKNOWN_LICENCE,
    WAY_OUT,
    ResolvedTeacher,
    TeacherFamily,
    TeacherParts,
    TeacherSource,
    cannot_build,
    model_of,
    no_hub,
    not_a_name,
)
from ktray.models.teacher.layers import LayerOrder
from ktray.models.weights import load_timm_weights
from ktray.recipe.registries import TEACHERS


class TimmFamily(TeacherFamily):
    """Models of timm without their classifier."""

    syntax = "timm:<model>"

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        model = model_of(source.name)
        if not model:
            raise not_a_name(source.name)
        if not timm.is_model(model):
            raise unknown_name("timm model", model, timm.list_models(), "teacher.name")
        tag = _tag(model, bool(source.checkpoint))
        if not tag and not source.checkpoint:
            raise KtrayError(f"timm publishes no weights for teacher '{source.name}'", WAY_OUT)
        return ResolvedTeacher(source, "timm", model, tag, source.checkpoint)

    def architecture(self, found: ResolvedTeacher) -> Any:
        return found.model.partition(".")[0]

    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        cfg, size = timm.get_pretrained_cfg(found.model), found.source.image_size
        size_arguments: dict[str, Any] = {"img_size": size} if size and cfg is not None and cfg.fixed_input_size else {}
        try:
            model = timm.create_model(found.model, pretrained=published, num_classes=0, **size_arguments)
        except Exception as error:
            raise (no_hub if published else cannot_build)(found, error) from error
        if weights is not None:
            load_timm_weights(model, weights, "teacher.checkpoint")
        preprocess = Preprocess.from_timm(model)
        return TeacherParts(model, preprocess.with_size(size) if size else preprocess, feature_dim(model))

    def map_widths(self, tower: nn.Module) -> list[int]:
        return map_widths(tower)

    def patch_maps(self, tower: nn.Module, x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        # The last norm applies to patch embeddings as well as to the pooled embedding.
        return list(tower.forward_intermediates(x, indices=levels, intermediates_only=True, norm=True))  # type: ignore[operator]

    def output_and_maps(self, tower: nn.Module, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        final, maps = tower.forward_intermediates(x, indices=1, norm=True)  # type: ignore[operator]
        return tower.forward_head(final), list(maps)  # type: ignore[operator]

    def layer_order(self, tower: nn.Module) -> LayerOrder | None:
        return layer_order(tower)

    def hub_files(self, model: str) -> tuple[str, tuple[str, ...]] | None:
        return hub_files(model)

    def licence(self, model: str) -> str:
        return licence(model)

    def untrained(self, model: str) -> nn.Module | None:
        module: nn.Module = timm.create_model(model)
        return module


def map_widths(tower: nn.Module) -> list[int]:
    """`TeacherFamily.map_widths` for a timm model, which may be a part of another model."""
    info: Any = getattr(tower, "feature_info", None)
    if not info or not hasattr(tower, "forward_intermediates"):
        return []
    return [int(level["num_chs"]) for level in info]


def layer_order(tower: nn.Module) -> LayerOrder | None:
    """`TeacherFamily.layer_order` for a timm model, which may be a part of another model."""
    if not hasattr(tower, "group_matcher"):
        return None
    matcher: Any = tower.group_matcher
    by_layer = group_parameters(tower, matcher(coarse=False))
    return LayerOrder({n: i for i, names in by_layer.items() for n in names}, max(by_layer))


def hub_files(model: str) -> tuple[str, tuple[str, ...]] | None:
    """`TeacherFamily.hub_files` for any name of a timm model."""
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if cfg is None or not cfg.hf_hub_id:
        return None
    return str(cfg.hf_hub_id), (str(cfg.hf_hub_filename or "model.safetensors"), "pytorch_model.bin")


def licence(model: str) -> str:
    """Licence of a model's published weights, as timm states it."""
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    return f"{cfg.license} (according to timm for {model})" if cfg is not None and cfg.license else UNKNOWN_LICENCE


def _tag(model: str, has_checkpoint: bool) -> str | None:
    architecture, _, tag = model.partition(".")
    published = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in published:
        raise unknown_name(f"pretrained tag of timm model '{architecture}'", tag, published, "teacher.name")
    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        return None
    return str(cfg.tag) if tag or not has_checkpoint else None


TEACHERS.register("timm")(TimmFamily())
