"""The architectures that people start with, at random weights, through ADAPT and TEACH of a real job."""

import json

import numpy as np
import open_clip
import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from small_task import SMALL, write_gallery, write_task

from ktray import recipe as recipes
from ktray.pipeline.run import run
from ktray.storage.columns import read_rows
from ktray.storage.store import Stage

pytestmark = pytest.mark.slow


def distil(tmp_path, name, checkpoint, *overrides):
    task = write_task(tmp_path / "task", train=3, val=3, test=3)
    gallery = write_gallery(tmp_path / "gallery", count=24)
    store = tmp_path / "store"
    keys = [
        *SMALL, f"store={store}", f"task.data={task}", f"gallery.data={gallery}", f"teacher.name={name}",
        f"teacher.checkpoint={checkpoint}", "transfer.size=12", "train.steps=4", "finetune.steps=2",
        "baselines.scratch=false", *overrides,
    ]  # fmt: skip
    result = run(recipes.load(None, keys))
    (adapt,) = (store / "stages/adapt").iterdir()
    (teach,) = (store / "stages/teach").iterdir()
    return result, Stage(str(adapt)), Stage(str(teach))


def check(result, adapt, teach, transform, encode, device_flops):
    embedded = read_rows(adapt, "embedding-train.parquet")
    images = [Image.open(str(uri)).convert("RGB") for uri in embedded["uri"]]
    with torch.inference_mode():
        expected = encode(torch.stack([transform(image) for image in images]))
    expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    # 8-bit pixels and fp16 storage stand between the two; different images are much further apart than that.
    np.testing.assert_allclose(embedded["embedding"].astype(np.float32), expected, atol=6e-3)
    assert np.abs(expected[0] - expected[-1]).max() > 2e-2
    shards = teach.manifest()["shards"]
    rows = [read_rows(teach, name, ["logits", "pixels"]) for name, _ in shards]
    logits = np.concatenate([r["logits"] for r in rows])
    assert logits.shape == (24, 3)  # two views of 12 images
    assert np.isfinite(logits).all()
    assert logits.std(0).min() > 0, "the teacher says the same of all images"
    checked = 2 * 4  # views of four images are asked again, to compare
    assert result["cost"]["flops"]["teach"] == pytest.approx((24 + checked) * device_flops, rel=0.05)


@pytest.mark.long
def test_open_clip_vit_b_32(cluster, tmp_path):
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", load_weights=False)
    model.eval()
    path = tmp_path / "vit-b-32.pt"
    torch.save(model.state_dict(), path)
    # 4.4 GMAC an image: the figure that open_clip's model profile lists for its image tower.
    found = distil(tmp_path, "open_clip:ViT-B-32", path, "teacher.adapt=auto", "teacher.candidates=[text, probe]")
    check(*found, transform, model.encode_image, 2 * 4.40e9)
    assert set(json.loads(json.dumps(found[1].manifest()))["scores"]) == {"text", "probe"}


@pytest.mark.long
def test_timm_dinov2_small(cluster, tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=98).eval()
    with torch.no_grad():  # layer scale starts at 1e-5, which would hide the blocks
        for name, p in model.named_parameters():
            if "gamma" in name:
                p.fill_(0.5)
    path = tmp_path / "dinov2.safetensors"
    save_file(model.state_dict(), str(path))
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**{**config, "input_size": (3, 98, 98)}, is_training=False)
    # MACs of 12 blocks of width 384 on 50 tokens, and of the embedding of 49 patches.
    macs = 12 * (12 * 384**2 * 50 + 2 * 50**2 * 384) + 49 * 3 * 14 * 14 * 384
    found = distil(tmp_path, "timm:vit_small_patch14_dinov2", path, "teacher.image_size=98")
    check(*found, transform, model, 2 * macs)
