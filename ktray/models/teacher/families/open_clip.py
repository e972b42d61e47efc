"""Teachers of open_clip: ``open_clip:<model>[/<pretrained>]``, with an image tower and a text tower."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.messages import cause, unknown_name
from ktray.models.teacher.families import timm as timm_family
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
from ktray.models.weight_forms import common_prefix
from ktray.models.weights import describe_keys, fetch, mismatch, read_weights, weight_errors, wrong_keys
from ktray.recipe.registries import TEACHERS

# Names of the file of weights in a repository that names none, in open_clip's order.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

Tokenizer = Callable[[list[str]], torch.Tensor]


class OpenClipFamily(TeacherFamily):
    """Models of open_clip, including models that a user's config describes."""

    syntax = "open_clip:<model>/<pretrained>"
    has_text = True

    def resolve(self, source: TeacherSource) -> ResolvedTeacher:
        rest, config = model_of(source.name), source.config
        if not rest:
            raise not_a_name(source.name)
        model, _, requested_tag = rest.partition("/")
        tag = requested_tag or None
        parsed = _read_config(config) if isinstance(config, str) else config
        if parsed is None and model not in open_clip.list_models():
            raise unknown_name("open_clip model", model, open_clip.list_models(), "teacher.name")
        tags = open_clip.list_pretrained_tags_by_model(model) if parsed is None else []
        if tag and tag not in tags:
            raise unknown_name(f"pretrained tag of open_clip model '{model}'", tag, tags, "teacher.name")
        if not tag and not source.checkpoint:
            hint = f" (or use a pretrained tag, e.g. open_clip:{model}/{tags[0]})" if tags else ""
            raise KtrayError(f"Teacher '{source.name}' has no weights", WAY_OUT.replace("FILE,", f"FILE{hint},"))
        return ResolvedTeacher(source, "open_clip", model, tag, source.checkpoint, parsed)

    def caution(self, source: TeacherSource) -> str:
        architecture, _, tag = model_of(source.name).partition("/")
        if tag or not source.checkpoint or source.config:
            return ""
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        quick = [t for t in tags if (open_clip.get_pretrained_cfg(architecture, t) or {}).get("quick_gelu")]
        if not quick:
            return ""
        return (
            f"WARNING: teacher.checkpoint is taken for a model with GELU; weights of {', '.join(quick[:3])} need "
            f"QuickGELU and give poor embeddings without it: for them, set teacher.name={source.name}/{quick[0]}."
        )

    def architecture(self, found: ResolvedTeacher) -> Any:
        return found.config or open_clip.get_model_config(found.model)

    def build(self, found: ResolvedTeacher, weights: Path | None, published: bool, device: str) -> TeacherParts:
        registered = _register(found.model, found.config) if found.config else found.model
        towers, size = open_clip.get_model_config(registered), found.source.image_size
        timm_tower = "timm_model_name" in towers["vision_cfg"]
        # The preprocessing and activation of the tag also apply if its weights come from a local file.
        published_cfg = open_clip.get_pretrained_cfg(found.model, found.tag) if found.tag else {}
        options = ("mean", "std", "interpolation", "resize_mode")
        forced = {k: v for k, v in published_cfg.items() if k in options} | (
            (found.config or {}).get("preprocess_cfg") or {}
        )
        try:
            with _quiet():
                model = open_clip.create_model(
                    registered,
                    pretrained=found.tag if published else None,
                    load_weights=published,
                    device=device,
                    pretrained_text=False,
                    force_image_size=None if timm_tower else size,
                    force_preprocess_cfg=forced or None,
                    force_quick_gelu=bool(published_cfg.get("quick_gelu", False)),
                )
        except Exception as error:
            raise (no_hub if published else cannot_build)(found, error) from error
        if weights is not None:
            _fill(model, weights)
        preprocess = Preprocess.from_open_clip(model)
        tower: nn.Module = model.visual
        if timm_tower and size:
            # This must follow loading, because timm resamples the loaded position embeddings.
            tower.set_input_size(size)  # type: ignore[operator]
        text = TextTower(model, functools.partial(_tokenizer, found.model, found.config))
        return TeacherParts(tower, preprocess.with_size(size) if size else preprocess, int(towers["embed_dim"]), text)

    def map_widths(self, tower: nn.Module) -> list[int]:
        if isinstance(tower, TimmModel):
            return timm_family.map_widths(tower.trunk)
        inner: Any = getattr(tower, "transformer", None)
        if not hasattr(tower, "forward_intermediates") or inner is None:
            return []
        return [int(inner.width)] * len(inner.resblocks)

    def patch_maps(self, tower: nn.Module, x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        return list(_intermediates(tower, x, levels, intermediates_only=True)["image_intermediates"])

    def output_and_maps(self, tower: nn.Module, x: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        out = _intermediates(tower, x, 1)
        return out["image_features"], list(out["image_intermediates"])

    def layer_order(self, tower: nn.Module) -> LayerOrder | None:
        if isinstance(tower, TimmModel):
            trunk = timm_family.layer_order(tower.trunk)
            return trunk and LayerOrder({f"trunk.{k}": v for k, v in trunk.prefixes.items()}, trunk.last)
        if isinstance(tower, VisionTransformer):
            stem = ("conv1.", "class_embedding", "positional_embedding", "patch_dropout", "ln_pre.")
            blocks = len(tower.transformer.resblocks)
            prefixes = {**dict.fromkeys(stem, 0), **{f"transformer.resblocks.{i}.": i + 1 for i in range(blocks)}}
            # The last norm and the projection have the learning rate of the last block.
            return LayerOrder(prefixes, blocks)
        if isinstance(tower, ModifiedResNet):
            stages = {f"layer{i}.": i for i in range(1, 5)}
            return LayerOrder({**dict.fromkeys(("conv", "bn"), 0), **stages}, 5)
        return None

    def hub_files(self, model: str) -> tuple[str, tuple[str, ...]] | None:
        architecture, _, tag = model.partition("/")
        place = (open_clip.get_pretrained_cfg(architecture, tag) or {}).get("hf_hub", "")
        # ``owner/name/`` or ``owner/name/file``
        owner, _, rest = place.partition("/")
        name, _, file = rest.partition("/")
        return (f"{owner}/{name}", (file,) if file else HUB_FILES) if name else None

    def licence(self, model: str) -> str:
        # open_clip records the location of the weights, but not their licence.
        architecture, _, tag = model.partition("/")
        place = (open_clip.get_pretrained_cfg(architecture, tag) or {}).get("hf_hub", "").rstrip("/")
        return f"{UNKNOWN_LICENCE} (the model card of {place})" if place else UNKNOWN_LICENCE

    def untrained(self, model: str) -> nn.Module | None:
        module: nn.Module = open_clip.create_model(model, load_weights=False)
        return module


def _intermediates(tower: nn.Module, x: torch.Tensor, levels: int, **options: Any) -> dict[str, Any]:
    # The last norm applies to patch embeddings as well as to the pooled embedding, except after an attention pool of
    # another width.
    normed = getattr(tower, "attn_pool", None) is None
    found: dict[str, Any] = tower.forward_intermediates(  # type: ignore[operator]
        x, indices=levels, normalize_intermediates=normed, **options
    )
    return found


class TextTower(nn.Module):
    """The text tower of an open_clip model.

    Args:
        model: an open_clip model; its image tower is removed.
        make_tokenizer: called for the first text, because some tokenizers are fetched from the hub.
    """

    def __init__(self, model: nn.Module, make_tokenizer: Callable[[], Tokenizer]) -> None:
        super().__init__()
        del model.visual
        self.model = model
        scale: Any = getattr(model, "logit_scale", None)
        has_scale = isinstance(scale, torch.Tensor) and not scale.is_meta
        self.logit_scale = float(scale.detach().exp()) if has_scale else 1.0
        self._make_tokenizer = make_tokenizer
        self._tokenizer: Tokenizer | None = None

    def forward(self, texts: list[str]) -> torch.Tensor:
        """(M, D) float32, L2-normalised."""
        if self._tokenizer is None:
            try:
                self._tokenizer = self._make_tokenizer()
            except Exception as error:
                raise KtrayError(
                    f"The teacher's tokenizer cannot be loaded: {cause(error)}",
                    "Some tokenizers are fetched from the hub: check the network, or set teacher.adapt=probe.",
                ) from error
        tokens = self._tokenizer(texts).to(next(self.model.parameters()).device)
        encoded: torch.Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return F.normalize(encoded.float(), dim=-1)


def _fill(model: nn.Module, weights: Path) -> None:
    """Load a file of weights, with or without the prefixes of wrappers. open_clip takes off one ``module.`` itself."""
    with weight_errors(weights):
        keys = open_clip.load_checkpoint(model, str(weights), strict=False, weights_only=True)
    if not keys or not (why := describe_keys(list(keys.missing_keys), list(keys.unexpected_keys))):
        return
    names: list[str] = []
    if weights.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        state = read_weights(weights)
        names = list(state)
        prefix = common_prefix(names)
        for candidate in (state, {name.removeprefix(prefix): value for name, value in state.items()}):
            if not mismatch(model, candidate):
                model.load_state_dict(candidate)
                return
    raise wrong_keys(weights, why, names=names)


def _read_config(uri: str) -> dict[str, Any]:
    path = fetch(uri, "teacher.config")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _not_a_config(uri, error) from error
    check_config(parsed, uri)
    return dict(parsed)


def check_config(parsed: Any, where: str) -> None:
    """Raises KtrayError if a value is not a config of open_clip, or would run external code."""
    try:
        towers = parsed.get("model_cfg", parsed)
        if not all(key in towers for key in ("embed_dim", "vision_cfg", "text_cfg")):
            raise ValueError("embed_dim, vision_cfg or text_cfg is missing")
        _check_config(parsed)
    except (ValueError, AttributeError) as error:
        raise _not_a_config(where, error) from error


def _not_a_config(where: str, error: Exception) -> KtrayError:
    return KtrayError(
        f"'{where}' is not an open_clip model config: {error}", "Set teacher.config= to a JSON file with such a config."
    )


def _check_config(config: Any) -> None:
    """Raises ValueError if a config would run external code, or load a model from another location.

    open_clip passes ``tokenizer_kwargs`` to transformers, which runs code of the repository with ``trust_remote_code``,
    and ``timm_model_name`` to timm, which also accepts ``hf-hub:`` and ``local-dir:``.
    """
    if isinstance(config, list):
        for part in config:
            _check_config(part)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key == "trust_remote_code":
                raise ValueError("it requests the execution of external code (trust_remote_code)")
            if key == "timm_model_name" and ":" in str(value):
                raise ValueError(f"timm_model_name '{value}' is a location and not a model of timm")
            _check_config(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress open_clip's warning about random weights: weights are loaded later, or loading fails."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root = logging.getLogger()
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)


def _register(model: str, config: dict[str, Any]) -> str:
    """Register a config in open_clip, under a unique name, so that no built-in model is replaced."""
    towers = deepcopy(config.get("model_cfg", config))
    content = json.dumps(towers, sort_keys=True)
    name = f"{model}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory(prefix="ktray-") as folder:
            file = Path(folder) / f"{name}.json"
            file.write_text(content, encoding="utf-8")
            open_clip.add_model_config(file)
    return name


def _tokenizer(model: str, config: dict[str, Any] | None) -> Tokenizer:
    tokenizer: Tokenizer = open_clip.get_tokenizer(_register(model, config) if config else model)
    return tokenizer


TEACHERS.register("open_clip")(OpenClipFamily())
