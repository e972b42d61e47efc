"""Image towers of transformers' checkpoints as models of timm: DINOv2 (with and without registers), DINOv3 and SigLIP.

The architecture is timm's own; only the names and the grouping of the weights change. No code of the checkpoint runs.
The names of transformers 4 and of transformers 5 are understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ktray.errors import KtrayError
from ktray.models.weights import Tensors

_PREFIXES = re.compile(r"^(?:(?:dinov2|dinov2_with_registers|dinov3_vit|vision_model|model)\.)+")
_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(?P<block>\d+)\.(?P<rest>.+)")
# What a part of a block is called in one of the checkpoints, and here; q, k and v are joined afterwards.
_PARTS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(?:norm1|layer_norm1)\.", "norm1."),
        (r"(?:norm2|layer_norm2)\.", "norm2."),
        (r"(?:attention\.attention\.query|(?:attention|self_attn)\.q_proj)\.", "q."),
        (r"(?:attention\.attention\.key|(?:attention|self_attn)\.k_proj)\.", "k."),
        (r"(?:attention\.attention\.value|(?:attention|self_attn)\.v_proj)\.", "v."),
        (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
        (r"layer_scale(?P<n>[12])\.lambda1$", r"ls\g<n>.gamma"),
        (r"mlp\.(?:fc1|weights_in)\.", "mlp.fc1."),
        (r"mlp\.(?:fc2|weights_out|down_proj)\.", "mlp.fc2."),
        (r"mlp\.gate_proj\.", "gate."),
        (r"mlp\.up_proj\.", "up."),
    )
)
_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.mask_token": "",
    "head.probe": "attn_pool.latent",
}
_PREFIXED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
        (r"(?:layernorm|norm|post_layernorm)\.", "norm."),
        (r"head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"head\.layernorm\.", "attn_pool.norm."),
        (r"head\.mlp\.", "attn_pool.mlp."),
    )
)


@dataclass(frozen=True)
class TimmForm:
    """A checkpoint of transformers as a model of timm.

    Attributes:
        architecture: the name in timm.
        kwargs: arguments of ``timm.create_model`` that give it the checkpoint's sizes.
        convert: takes the checkpoint's weights and returns them under timm's names.
    """

    architecture: str
    kwargs: dict[str, Any]
    convert: Callable[[Tensors], Tensors]


def timm_form(config: Mapping[str, Any], where: str) -> TimmForm:
    """The model of timm for a ``config.json`` of transformers.

    Args:
        config: the parsed file.
        where: the repository or folder, for messages.

    Raises:
        KtrayError: the kind of model is not known here, or the config lacks a size.
    """
    kind = str(config.get("model_type"))
    if kind not in FORMS:
        raise KtrayError(
            f"'{where}' is a model of transformers of the type {kind}, which ktray does not convert",
            f"Use a checkpoint of the type {', '.join(sorted(FORMS))}, or one for timm or open_clip.",
        )
    try:
        return FORMS[kind](config)
    except (KeyError, TypeError, ValueError) as error:
        raise KtrayError(f"The config.json of '{where}' lacks a value: {error}", "Download it again.") from error


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = int(config["hidden_size"])
    return {
        "embed_dim": hidden,
        "depth": int(config["num_hidden_layers"]),
        "num_heads": int(config["num_attention_heads"]),
        "patch_size": int(config.get("patch_size", 16)),
        "img_size": int(config.get("image_size", 224)),
        "dynamic_img_size": True,
    }


def _ratio(width: int, embed_dim: int) -> float:
    """The ratio for which timm's ``int(embed_dim * ratio)`` is the width, whatever the rounding."""
    return (width + 0.5) / embed_dim


def _dinov2(config: Mapping[str, Any]) -> TimmForm:
    sizes = _sizes({"patch_size": 14, **config})
    sizes["mlp_ratio"] = float(config.get("mlp_ratio", 4))
    if config.get("use_swiglu_ffn"):
        from timm.layers import SwiGLUPacked

        # Two thirds, rounded up to a multiple of 8, and both halves in one layer.
        width = (int(int(sizes["embed_dim"] * sizes["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
        sizes |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
        sizes["mlp_ratio"] = _ratio(2 * width, sizes["embed_dim"])
    registers = int(config.get("num_register_tokens", 0))
    if not registers:
        return TimmForm("vit_small_patch14_dinov2", sizes, _packed)

    def convert(state: Tensors) -> Tensors:
        found = _packed(state)
        # timm adds the position of the class token to the token itself.
        positions = found["pos_embed"]
        return {**found, "cls_token": found["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}

    return TimmForm("vit_small_patch14_reg4_dinov2", {**sizes, "reg_tokens": registers}, convert)


def _dinov3(config: Mapping[str, Any]) -> TimmForm:
    sizes = _sizes(config)
    gated = bool(config.get("use_gated_mlp"))
    biases = bool(config.get("query_bias", True))
    sizes |= {
        "mlp_ratio": _ratio(int(config["intermediate_size"]), sizes["embed_dim"]),
        "num_reg_tokens": int(config.get("num_register_tokens", 0)),
        "rope_temperature": float(config.get("rope_theta", 100)),
        "qkv_bias": biases,
        "global_pool": "token",
        # With an alignment, timm keeps the two halves of a gated MLP apart, as the checkpoint does.
        **({"swiglu_mlp": True, "swiglu_align_to": 1} if gated else {}),
    }

    def convert(state: Tensors) -> Tensors:
        found = _joined(_renamed(state), bias=False)
        out: Tensors = {}
        for name, value in found.items():
            name = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
            name = re.sub(r"\.q\.bias$", ".attn.q_bias", re.sub(r"\.v\.bias$", ".attn.v_bias", name))
            name = name.replace(".gate.", ".mlp.fc1_g.").replace(".up.", ".mlp.fc1_x." if gated else ".mlp.fc1.")
            out[name] = value
        return out

    return TimmForm("vit_small_patch16_dinov3_qkvb", sizes, convert)


def _siglip(config: Mapping[str, Any]) -> TimmForm:
    vision = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        **config.get("vision_config", config),
    }  # fmt: skip
    sizes = _sizes(vision)
    sizes["mlp_ratio"] = _ratio(int(vision["intermediate_size"]), sizes["embed_dim"])
    if "tanh" in str(vision.get("hidden_act", "gelu_pytorch_tanh")):
        sizes["act_layer"] = "gelu_tanh"

    def convert(state: Tensors) -> Tensors:
        image = {name: value for name, value in state.items() if not name.startswith(("text_model.", "logit_"))}
        found = _packed(image)
        for part in ("weight", "bias"):
            query, key_value = found.pop(f"head.attention.in_proj_{part}").tensor_split([sizes["embed_dim"]])
            found[f"attn_pool.q.{part}"], found[f"attn_pool.kv.{part}"] = query, key_value
        return {**found, "pos_embed": found["pos_embed"][None]}

    return TimmForm("vit_base_patch16_siglip_224", sizes, convert)


FORMS: dict[str, Callable[[Mapping[str, Any]], TimmForm]] = {
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "siglip": _siglip,
    "siglip_vision_model": _siglip,
}


def _renamed(state: Tensors) -> Tensors:
    """The weights under names of this module. Names that it does not know stay, so that loading reports them."""
    found: Tensors = {}
    for full, value in state.items():
        name = _PREFIXES.sub("", full)
        block = _BLOCK.fullmatch(name)
        if block:
            found[f"blocks.{block['block']}.{_substituted(block['rest'], _PARTS)}"] = value
        elif (
            value.numel() and (known := _OUTSIDE.get(name, _substituted(name, _PREFIXED))) and "classifier" not in name
        ):
            found[known] = value
    return found


def _substituted(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        if match := pattern.match(name):
            return match.expand(replacement) + name[match.end() :]
    return name


def _joined(state: Tensors, bias: bool) -> Tensors:
    """Join the projections of queries, keys and values of each block, with or without their biases."""
    found = dict(state)
    for name in [name for name in state if name.endswith(".q.weight")]:
        block = name.removesuffix("q.weight")
        for part in ("weight", "bias") if bias else ("weight",):
            parts = [found.pop(f"{block}{which}.{part}", None) for which in "qkv"]
            if all(value is not None for value in parts):
                found[f"{block}attn.qkv.{part}"] = torch.cat([value for value in parts if value is not None])
    return found


def _packed(state: Tensors) -> Tensors:
    """The form of timm's VisionTransformer: joined projections, and both halves of a gated MLP in one layer."""
    found = _joined(_renamed(state), bias=True)
    for name in [name for name in found if ".gate." in name]:
        found[name.replace(".gate.", ".mlp.fc1.")] = torch.cat([found.pop(name), found.pop(name.replace("gate", "up"))])
    return found
