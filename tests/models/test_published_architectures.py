"""The two architectures that people start with, at full size with random weights, against their own libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file

from ktray.models.teacher.adapted import AdaptedTeacher
from ktray.models.teacher.heads import probe_head, text_head
from ktray.models.teacher.load import load_teacher

pytestmark = pytest.mark.slow


def compare(teacher, theirs, reference, photo: np.ndarray) -> None:
    photos = [photo, np.ascontiguousarray(photo.transpose(1, 0, 2)[:, :, ::-1])]
    expected = torch.stack([theirs(Image.fromarray(p)) for p in photos])
    pixels = torch.from_numpy(np.stack([teacher.preprocess.eval_transform(p) for p in photos]))
    std = torch.tensor(teacher.preprocess.std).view(3, 1, 1)
    assert ((teacher.preprocess.normalise(pixels) - expected) * std).abs().max() <= 1 / 255
    with torch.inference_mode():
        got, wanted = teacher.embed(pixels), reference(expected)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    # Two images differ by more than the tolerance, so the comparison sees the pixels.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2


def test_vit_b_32(tmp_path: Path, photo: np.ndarray) -> None:
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", load_weights=False)
    model.eval()
    path = tmp_path / "vit-b-32.pt"
    torch.save(model.state_dict(), path)
    teacher = load_teacher("open_clip:ViT-B-32", checkpoint=str(path))
    compare(teacher, transform, model.encode_image, photo)
    theirs = open_clip.image_transform(224, is_train=False)
    compare(teacher, theirs, model.encode_image, photo)

    classes = ["daisy", "rose"]
    head = text_head(teacher, classes)
    embeddings = torch.randn(8, 512)
    probe = probe_head(embeddings, torch.arange(8) % 2, 2, start=head)
    AdaptedTeacher(teacher, probe, classes).save(tmp_path / "adapted")
    again = AdaptedTeacher.load(tmp_path / "adapted")
    batch = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        expected = probe(teacher.embed(batch))
        torch.testing.assert_close(again.logits(batch), expected)


@pytest.mark.parametrize("image_size", [None, 98])
def test_vit_small_patch14_dinov2(image_size: int | None, tmp_path: Path, photo: np.ndarray) -> None:
    sized = {"img_size": image_size} if image_size else {}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sized).eval()
    # Layer scale starts at 1e-5, which would hide the blocks.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gamma" in name:
                p.fill_(0.5)
    path = tmp_path / "dinov2.safetensors"
    save_file(model.state_dict(), str(path))
    teacher = load_teacher("timm:vit_small_patch14_dinov2", checkpoint=str(path), image_size=image_size)
    cfg = timm.data.resolve_model_data_config(model)
    if image_size:
        cfg["input_size"] = (3, image_size, image_size)
    compare(teacher, timm.data.create_transform(**cfg, is_training=False), model, photo)
    assert teacher.preprocess.size == ((image_size or 518),) * 2


def test_dinov2_at_224_from_native_weights(tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    path = tmp_path / "dinov2.safetensors"
    save_file({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, str(path))
    teacher = load_teacher("timm:vit_small_patch14_dinov2", checkpoint=str(path), image_size=224)
    assert teacher.image_tower.pos_embed.shape[1] == 1 + 16 * 16
    assert torch.equal(teacher.image_tower.cls_token, model.cls_token)
