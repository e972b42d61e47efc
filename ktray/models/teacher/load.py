"""Loading a teacher by name: open_clip, timm, or the small one that ships.

There are only three ways to weights: a checkpoint file, a published pretrained tag (fetched from the hub), or
the files of ``miniverse``. Random weights are never used silently.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from torch import nn

import ktray
from ktray.data.preprocess import Preprocess
from ktray.errors import KtrayError
from ktray.models.features import feature_dim
from ktray.models.messages import cause, unknown_name
from ktray.models.teacher.teacher import Teacher, TeacherSource, TextTower, Tokenizer
from ktray.models.weights import describe_keys, fetch, file_digest, load_timm_weights, weight_errors, wrong_keys

MINIVERSE = Path(ktray.__file__).parent / "miniverse" / "teacher"
_WAY_OUT = "Set teacher.checkpoint=FILE, or teacher.name=miniverse to go on with the small one that ships."


@dataclass(frozen=True)
class _Spec:
    """A source, resolved as far as it goes without loading weights."""

    source: TeacherSource
    library: str
    model: str
    tag: str | None
    checkpoint: str | None
    config: dict[str, Any] | None
    image_size: int | None


def load_teacher(
    name: str,
    checkpoint: str | None = None,
    config: str | dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
) -> Teacher:
    """A teacher in evaluation mode, float32.

    Args:
        name: ``open_clip:<model>[/<pretrained>]``, ``timm:<model>[.<pretrained>]`` or ``miniverse``.
        checkpoint: weights, local or ``s3://``; safetensors, or a torch file of tensors only.
        config: an open_clip model config (path, or the parsed JSON); it decides the architecture, and
            ``<model>`` is then free. Files with ``model_cfg`` and ``preprocess_cfg`` work too.
        device: where to put it.
        image_size: input size other than the model's own, pixels; position embeddings are resampled.

    Raises:
        KtrayError: unknown name; no weights to load, or none that can be fetched; a file that is missing,
            damaged, not tensors only, or does not fit.
    """
    source = TeacherSource(name, checkpoint, config, image_size)
    return _build(_resolve(source), load=True).to(device)


def build_teacher(source: TeacherSource, device: str = "cpu") -> Teacher:
    """A teacher's architecture without its weights: for callers that fill it at once, or (``device="meta"``) plan.

    Its fingerprint is empty.
    """
    with torch.device(device):
        return _build(_resolve(source), load=False, device=device)


def teacher_fingerprint(
    name: str,
    checkpoint: str | None = None,
    config: str | dict[str, Any] | None = None,
    image_size: int | None = None,
) -> str:
    """`Teacher.fingerprint` without building the model (the weights file is read once to hash it).

    SHA-256 of the architecture's config, the weights file's content (or the published tag), and the image size.
    """
    return _fingerprint(_resolve(TeacherSource(name, checkpoint, config, image_size)))


def _resolve(source: TeacherSource) -> _Spec:
    library, _, rest = source.name.partition(":")
    checkpoint, config = source.checkpoint, source.config
    if source.name == "miniverse":
        library, rest = "open_clip", "miniverse"
        checkpoint = checkpoint or str(MINIVERSE / "model.safetensors")
        config = config or str(MINIVERSE / "miniverse.json")
    if library == "open_clip" and rest:
        model, _, wanted = rest.partition("/")
        tag = wanted or None
        parsed = _read_config(config) if isinstance(config, str) else config
        if parsed is None and model not in open_clip.list_models():
            raise unknown_name("open_clip model", model, open_clip.list_models(), "teacher.name")
        tags = open_clip.list_pretrained_tags_by_model(model) if parsed is None else []
        if tag and tag not in tags:
            raise unknown_name(f"pretrained tag of open_clip model '{model}'", tag, tags, "teacher.name")
        if not tag and not checkpoint:
            some = f" (or name a pretrained tag, e.g. open_clip:{model}/{tags[0]})" if tags else ""
            raise KtrayError(f"Teacher '{source.name}' names no weights", _WAY_OUT.replace("FILE,", f"FILE{some},"))
        return _Spec(source, library, model, tag, checkpoint, parsed, source.image_size)
    if library == "timm" and rest:
        if not timm.is_model(rest):
            raise unknown_name("timm model", rest, timm.list_models(), "teacher.name")
        tag = _timm_tag(rest, bool(checkpoint))
        if not tag and not checkpoint:
            raise KtrayError(f"timm publishes no weights for teacher '{source.name}'", _WAY_OUT)
        return _Spec(source, library, rest, tag, checkpoint, None, source.image_size)
    raise KtrayError(
        f"'{source.name}' is not the name of a teacher",
        "Set teacher.name=open_clip:<model>/<pretrained>, timm:<model> or miniverse.",
    )


def _timm_tag(model: str, has_checkpoint: bool) -> str | None:
    architecture, _, tag = model.partition(".")
    published = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in published:
        raise unknown_name(f"pretrained tag of timm model '{architecture}'", tag, published, "teacher.name")
    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        return None
    return str(cfg.tag) if tag or not has_checkpoint else None


def _read_config(uri: str) -> dict[str, Any]:
    path = fetch(uri, "teacher.config")
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        towers = parsed.get("model_cfg", parsed)
        if not all(key in towers for key in ("embed_dim", "vision_cfg", "text_cfg")):
            raise ValueError("it lacks embed_dim, vision_cfg or text_cfg")
        _check_config(parsed)
    except (ValueError, AttributeError) as error:
        raise KtrayError(
            f"'{uri}' is not an open_clip model config: {error}", "Set teacher.config= to such a JSON file."
        ) from error
    return dict(parsed)


def _check_config(config: Any) -> None:
    """Raises ValueError where a config names code to run, or a place to load a model from.

    open_clip hands ``tokenizer_kwargs`` to transformers, which runs a repository's own code with
    ``trust_remote_code``, and ``timm_model_name`` to timm, which takes ``hf-hub:`` and ``local-dir:`` too.
    """
    if isinstance(config, list):
        for part in config:
            _check_config(part)
    elif isinstance(config, dict):
        for key, value in config.items():
            if key == "trust_remote_code":
                raise ValueError("it asks to run code of others (trust_remote_code)")
            if key == "timm_model_name" and ":" in str(value):
                raise ValueError(f"timm_model_name '{value}' is a place and not a model of timm")
            _check_config(value)


def _fingerprint(spec: _Spec) -> str:
    architecture: Any = spec.model.partition(".")[0]
    if spec.library == "open_clip":
        architecture = spec.config or open_clip.get_model_config(spec.model)
    weights = file_digest(fetch(spec.checkpoint)) if spec.checkpoint else "published"
    content = [spec.library, architecture, spec.tag, weights, spec.image_size]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build(spec: _Spec, load: bool, device: str = "cpu") -> Teacher:
    # The file is checked first: building a large model takes longer than finding that it is not there.
    path = fetch(spec.checkpoint) if spec.checkpoint and load else None
    if spec.library == "open_clip":
        teacher = _build_open_clip(spec, path, load, device)
    else:
        teacher = _build_timm(spec, path, load)
    teacher.eval()
    if spec.image_size:
        _check_size(teacher, spec.image_size)
    return teacher


def _build_open_clip(spec: _Spec, path: Path | None, load: bool, device: str) -> Teacher:
    registered = _register(spec.model, spec.config) if spec.config else spec.model
    # The tag tells how its weights were trained, also where they come from a local file.
    published = open_clip.get_pretrained_cfg(spec.model, spec.tag) if spec.tag else {}
    known = ("mean", "std", "interpolation", "resize_mode")
    forced = {k: v for k, v in published.items() if k in known} | ((spec.config or {}).get("preprocess_cfg") or {})
    timm_tower = "timm_model_name" in open_clip.get_model_config(registered)["vision_cfg"]
    from_hub = load and path is None
    try:
        with _quiet():
            model = open_clip.create_model(
                registered,
                pretrained=spec.tag if from_hub else None,
                load_weights=from_hub,
                device=device,
                pretrained_text=False,
                force_image_size=None if timm_tower else spec.image_size,
                force_preprocess_cfg=forced or None,
                force_quick_gelu=bool(published.get("quick_gelu", False)),
            )
    except Exception as error:
        raise (_no_hub if from_hub else _cannot_build)(spec, error) from error
    if path is not None:
        with weight_errors(path):
            found = open_clip.load_checkpoint(model, str(path), strict=False, weights_only=True)
        if found and (why := describe_keys(list(found.missing_keys), list(found.unexpected_keys))):
            raise wrong_keys(path, why)
    preprocess = Preprocess.from_open_clip(model)
    tower: nn.Module = model.visual
    if timm_tower and spec.image_size:
        # After loading: timm resamples the position embeddings that it then holds.
        tower.set_input_size(spec.image_size)  # type: ignore[operator]
    make: Any = functools.partial(_tokenizer, spec.model, spec.config)
    return Teacher(
        tower,
        TextTower(model, make),
        preprocess.with_size(spec.image_size) if spec.image_size else preprocess,
        embed_dim=int(open_clip.get_model_config(registered)["embed_dim"]),
        patch_dim=_patch_dim(tower),
        source=spec.source,
        fingerprint=_fingerprint(spec) if load else "",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning of random weights: they are filled, or the load fails."""

    def drop(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root = logging.getLogger()
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)


def _build_timm(spec: _Spec, path: Path | None, load: bool) -> Teacher:
    cfg = timm.get_pretrained_cfg(spec.model)
    sized: dict[str, Any] = (
        {"img_size": spec.image_size} if spec.image_size and cfg is not None and cfg.fixed_input_size else {}
    )
    from_hub = load and path is None
    try:
        model = timm.create_model(spec.model, pretrained=from_hub, num_classes=0, **sized)
    except Exception as error:
        raise (_no_hub if from_hub else _cannot_build)(spec, error) from error
    if path is not None:
        load_timm_weights(model, path, "teacher.checkpoint")
    preprocess = Preprocess.from_timm(model)
    return Teacher(
        model,
        None,
        preprocess.with_size(spec.image_size) if spec.image_size else preprocess,
        embed_dim=feature_dim(model),
        patch_dim=_patch_dim(model),
        source=spec.source,
        fingerprint=_fingerprint(spec) if load else "",
    )


def _register(model: str, config: dict[str, Any]) -> str:
    """Make open_clip know a config, under a name of its own so that no built-in model is shadowed."""
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


def _patch_dim(tower: nn.Module) -> int | None:
    if isinstance(tower, TimmModel):
        tower = tower.trunk
    if not hasattr(tower, "forward_intermediates"):
        return None
    info: Any = getattr(tower, "feature_info", None)
    # The last stage's channels: some convolutional models widen after it (num_features).
    width = info[-1]["num_chs"] if info else getattr(getattr(tower, "transformer", None), "width", None)
    return int(width) if width else None


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


def _no_hub(spec: _Spec, error: Exception) -> KtrayError:
    return KtrayError(
        f"The weights of teacher '{spec.source.name}' cannot be fetched, there is no network or no hub "
        f"({cause(error)})",
        _WAY_OUT,
    )


def _cannot_build(spec: _Spec, error: Exception) -> KtrayError:
    return KtrayError(
        f"Teacher '{spec.source.name}' cannot be built: {cause(error)}", "Check teacher.name and teacher.config."
    )
