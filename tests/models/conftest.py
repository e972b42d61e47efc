"""Tiny models with random weights, saved as the checkpoints that a user would hand over."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An open_clip model of two blocks: config, checkpoint, and open_clip's own build of it."""
    folder = tmp_path_factory.mktemp("clip")
    config = folder / "tiny-reference.json"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    torch.manual_seed(1)
    model, _, transform = open_clip.create_model_and_transforms("tiny-reference", load_weights=False)
    model.eval()
    checkpoint = folder / "tiny.safetensors"
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, str(checkpoint))
    return SimpleNamespace(
        config=str(config),
        checkpoint=str(checkpoint),
        model=model,
        transform=transform,
        tokenizer=open_clip.get_tokenizer("tiny-reference"),
    )


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A timm ViT with a classifier of 1,000 classes, saved whole."""
    torch.manual_seed(2)
    model = timm.create_model("test_vit").eval()
    checkpoint = tmp_path_factory.mktemp("vit") / "test_vit.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    return SimpleNamespace(checkpoint=str(checkpoint), model=model)


@pytest.fixture
def root() -> Path:
    return Path(__file__).parents[2]
