"""Checkpoints of transformers as models of timm: the same outputs as transformers' own models, in small sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from ktray.errors import KtrayError
from ktray.models.transformers_forms import timm_form
from ktray.models.weights import mismatch

SIDE = 56
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}


def checkpoint(folder: Path, kind: str, config: dict[str, Any]) -> Any:
    """A model of transformers with random weights, saved as its library saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Dinov2", {**COMMON}),
        ("Dinov2", {**COMMON, "use_swiglu_ffn": True}),
        ("Dinov2WithRegisters", {**COMMON, "num_register_tokens": 3}),
        ("DINOv3ViT", {**COMMON, "intermediate_size": 64, "num_register_tokens": 4}),
        ("DINOv3ViT", {**COMMON, "intermediate_size": 64, "use_gated_mlp": True, "hidden_act": "silu"}),
        ("SiglipVision", {**COMMON, "intermediate_size": 64}),
    ],
)  # fmt: skip
def test_the_outputs_are_those_of_transformers(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    reference = checkpoint(tmp_path, kind, config)
    form = timm_form(reference.config.to_dict(), "here")
    model = timm.create_model(form.architecture, num_classes=0, **form.kwargs).eval()
    state = form.convert(load_file(tmp_path / "model.safetensors"))
    assert mismatch(model, state) == ""
    model.load_state_dict(state)
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected.pooler_output, atol=2e-5, rtol=1e-4)
        maps = model.forward_intermediates(x, indices=1, intermediates_only=True, norm=True)[0]
    patches = expected.last_hidden_state[:, -((SIDE // 14) ** 2) :]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), patches, atol=2e-5, rtol=1e-4)


def test_both_towers_of_siglip_in_one_file(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"text_config": small, "vision_config": {**small, "image_size": SIDE, "patch_size": 14}}
    reference = checkpoint(tmp_path, "Siglip", config)
    form = timm_form(reference.config.to_dict(), "here")
    model = timm.create_model(form.architecture, num_classes=0, **form.kwargs).eval()
    model.load_state_dict(form.convert(load_file(tmp_path / "model.safetensors")))
    x = torch.randn(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference.vision_model(x).pooler_output, atol=2e-5, rtol=1e-4)


def test_names_of_transformers_4() -> None:
    names = {
        "dinov2.encoder.layer.0.attention.attention.query.weight": torch.zeros(4, 4),
        "dinov2.encoder.layer.0.attention.attention.key.weight": torch.ones(4, 4),
        "dinov2.encoder.layer.0.attention.attention.value.weight": torch.zeros(4, 4),
        "dinov2.encoder.layer.0.attention.output.dense.bias": torch.zeros(4),
        "dinov2.encoder.layer.0.layer_scale1.lambda1": torch.zeros(4),
        "dinov2.embeddings.patch_embeddings.projection.bias": torch.zeros(4),
        "dinov2.embeddings.mask_token": torch.zeros(1, 4),
        "dinov2.layernorm.weight": torch.zeros(4),
        "classifier.weight": torch.zeros(2, 8),
    }
    found = timm_form({"model_type": "dinov2", **COMMON}, "here").convert(names)
    assert sorted(found) == [
        "blocks.0.attn.proj.bias", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma", "norm.weight",
        "patch_embed.proj.bias",
    ]  # fmt: skip
    assert found["blocks.0.attn.qkv.weight"][4:8].eq(1).all()


def test_other_models_and_broken_configs() -> None:
    with pytest.raises(KtrayError, match=r"'me/x' is a model of transformers of the type bert.*dinov2, "):
        timm_form({"model_type": "bert"}, "me/x")
    with pytest.raises(KtrayError, match=r"config\.json of 'me/x' lacks a value: 'hidden_size'"):
        timm_form({"model_type": "dinov2"}, "me/x")
