from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image

from ktray.data.preprocess import Preprocess
from ktray.models.teacher.load import build_teacher
from ktray.models.teacher.teacher import TeacherSource

CLIP = Preprocess.from_open_clip({"size": 224})


def images(photo: np.ndarray) -> list[np.ndarray]:
    """Wide, tall, smaller than the input, exactly its size."""
    return [photo, photo.transpose(1, 0, 2).copy(), photo[:40, :61].copy(), photo[:128, :128].copy()]


def compare(p: Preprocess, theirs, photo: np.ndarray) -> None:
    mean, std = torch.tensor(p.mean).view(3, 1, 1), torch.tensor(p.std).view(3, 1, 1)
    for image in images(photo):
        expected = theirs(Image.fromarray(image))
        pixels = torch.from_numpy(p.eval_transform(image))
        assert pixels.dtype == torch.uint8
        assert (pixels / 255 - (expected * std + mean)).abs().max() <= 1 / 255
        normalised = p.normalise(pixels[None])[0]
        assert (normalised - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clip(photo: np.ndarray, mode: str, interpolation: str) -> None:
    cfg = {"size": 96, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    theirs = open_clip.image_transform(96, is_train=False, resize_mode=mode, interpolation=interpolation, fill_color=7)
    compare(Preprocess.from_open_clip(cfg), theirs, photo)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "test_vit", "mobilenetv3_small_050", "convnext_atto"])
def test_equals_timm(photo: np.ndarray, name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    compare(Preprocess.from_timm(model), theirs, photo)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_equals_timms_crop_modes_on_oblong_inputs(photo: np.ndarray, crop_mode: str) -> None:
    cfg = {"input_size": (3, 64, 96), "crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": "bilinear"}
    model = torch.nn.Identity()
    model.pretrained_cfg = {**cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}  # type: ignore[assignment]
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    compare(Preprocess.from_timm(model), theirs, photo)


def test_vit_b_32_takes_open_clips_defaults() -> None:
    p = build_teacher(TeacherSource("open_clip:ViT-B-32/openai"), device="meta").preprocess
    assert (p.size, p.interpolation, p.resize_mode) == ((224, 224), "bicubic", "shortest")
    assert p.mean == open_clip.OPENAI_DATASET_MEAN
    assert p == CLIP


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, 160])
def test_a_batch_of_another_size_is_resized_as_pil_would(photo: np.ndarray, interpolation: str, size: int) -> None:
    p = replace(CLIP, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1)).with_size(size)
    # Away from black and white: PIL clips between its two passes, where a device clips once.
    crop = photo[:100, :100] // 2 + 64
    kernel = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    expected = np.asarray(Image.fromarray(crop).resize((size, size), kernel)).transpose(2, 0, 1) / 255
    got = p.normalise(torch.from_numpy(crop.copy()).permute(2, 0, 1)[None])[0].numpy()
    assert got.shape == (3, size, size)
    # PIL rounds after each of its two passes.
    assert np.abs(got - expected).max() <= 1.6 / 255


def test_round_trip_through_json_and_fingerprint() -> None:
    p = Preprocess.from_open_clip({"size": [32, 48], "mean": 0.5, "std": 0.25})
    again = Preprocess.from_dict(json.loads(json.dumps(p.to_dict())))
    assert again == p
    assert again.fingerprint == p.fingerprint
    changed = [
        p.with_size(33),
        replace(p, mean=(0.5, 0.5, 0.51)),
        replace(p, std=(0.25, 0.2, 0.25)),
        replace(p, interpolation="bilinear"),
        replace(p, resize_mode="squash"),
        replace(p, crop_pct=0.9),
        replace(p, fill=(1, 0, 0)),
    ]
    assert len({q.fingerprint for q in [p, *changed]}) == 8


def test_timm_config_is_the_inverse_of_from_timm() -> None:
    p = Preprocess((64, 96), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", "squash", 0.8, (26, 51, 76))
    model = torch.nn.Identity()
    model.pretrained_cfg = p.timm_config()  # type: ignore[assignment]
    assert Preprocess.from_timm(model) == p
