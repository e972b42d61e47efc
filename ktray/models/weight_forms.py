"""Forms in which weights are published and saved that a model does not take as they are: how they are recognised."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")

# Prefixes that torch.compile, DDP and FSDP add to each name.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrapped(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict without the prefixes of wrappers, in any order and number."""
    return {_without_wrappers(name): value for name, value in state.items()}


def _without_wrappers(name: str) -> str:
    inner = name
    for wrapper in _WRAPPERS:
        # `compile` may also wrap an inner module, so the prefixes occur after any dot.
        inner = inner.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return inner if inner == name else _without_wrappers(inner)


def common_prefix(names: Iterable[str]) -> str:
    """The first part of all names with its dot, such as ``model.`` in the checkpoints of Lightning; "" if they
    differ."""
    first = {name.partition(".")[0] if "." in name else "" for name in names}
    return f"{first.pop()}." if len(first) == 1 and "" not in first else ""


def file_form(path: Path) -> str:
    """What a file is that cannot be read as weights, with what to do, as a sentence; empty if nothing is known."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
    except OSError:
        return ""
    if not head:
        return "It is empty: fetch it again."
    if head.startswith(b"version https://git-lfs"):
        return "It is a pointer of Git LFS, not the weights: run `git lfs pull` in its repository."
    if head.lstrip()[:1] == b"<":
        return "It is an HTML or XML page: the download was refused or needs a login."
    if head[:2] == b"PK" and _is_torchscript(path):
        return "It is a TorchScript archive (as OpenAI publishes CLIP): save its state_dict() as safetensors."
    if path.suffix == ".safetensors" and head[:2] == b"PK":
        return "It is a file of torch.save: rename it to .pt."
    if path.suffix != ".safetensors" and head[8:9] == b"{":
        return "It is a safetensors file: rename it to .safetensors."
    return ""


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def key_form(names: Iterable[str]) -> str:
    """What the names of weights tell about their origin, as a sentence; empty if nothing is known."""
    listed = list(names)
    parts = {part for name in listed for part in name.split(".")}
    if {"vision_model", "text_model"} & parts or {"embeddings", "attention", "layer"} <= parts:
        return (
            "The names are those of transformers: use the weights for timm or open_clip, which model hubs have under "
            "names such as timm/... and open_clip_model.safetensors."
        )
    if any(name.startswith("visual.trunk.") for name in listed):
        return "The names are those of open_clip's model of a timm tower: set teacher.name=open_clip:MODEL."
    if any(name.startswith(("visual.transformer.", "visual.layer1.")) for name in listed):
        return "The names are those of open_clip's models: set teacher.name=open_clip:MODEL."
    if any(".lora_" in name for name in listed):
        return "The file has the low-rank updates of LoRA: merge them into the base model, and save that."
    return ""
