from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from photo import make_photo
from PIL import Image
from torchvision.models.segmentation.lraspp import LRASPP

from ktray.errors import KtrayError
from ktray.models.features import Maps, freeze_idle
from ktray.models.flops import forward_flops, on_meta, train_flops
from ktray.models.maps import map_loss, resize_map
from ktray.models.student.classifier import build_student
from ktray.models.student.classifier_io import load_student
from ktray.models.student.segmenter import Segmenter, build_segmenter
from ktray.models.student.segmenter_io import load_segmenter, save_segmenter
from ktray.tasks.students import load_student as load_any

NAMES = ["sky", "sea", "sand"]
# Backbone, arguments, image size, head, side of the logits.
STUDENTS = [
    ("test_resnet", {"output_stride": 8}, 32, "lraspp", 16),
    ("test_resnet", {"output_stride": 8}, 32, "deeplabv3", 4),
    ("fastvit_s12", {}, 64, "lraspp", 16),
    ("mobilevitv2_100", {}, 64, "lraspp", 16),
    ("mobilevitv2_100", {}, 64, "deeplabv3", 2),
    ("vit_small_patch16_224", {"depth": 4}, 64, "lraspp", 4),
    ("vit_small_patch16_224", {"depth": 4}, 64, "deeplabv3", 4),
]


def small(head: str = "lraspp", classes: int = 3, size: int = 32) -> Segmenter:
    return build_segmenter("test_resnet", {"output_stride": 8}, classes, size, head=head)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "kwargs", "size", "head", "side"), STUDENTS, ids=[f"{s[0]}-{s[3]}" for s in STUDENTS])
def test_published_backbones_give_maps_of_logits_and_train(name, kwargs, size, head, side):
    student = build_segmenter(name, kwargs, 5, size, head=head)
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    logits = student.train().logits(pixels)
    assert tuple(logits.shape) == (2, 5, side, side)
    assert student.model.shape == (5, side, side)
    map_loss(logits, torch.randint(0, 5, (2, size, size))).backward()
    unused = {n.split(".")[1] for n, p in student.model.named_parameters() if p.grad is None}
    # Between the last map and the classifier that a segmenter does not have.
    assert unused == ({"final_conv"} if name == "fastvit_s12" else set())
    freeze_idle(student.model, student.model, size)
    assert all(p.requires_grad == (p.grad is not None) for p in student.model.parameters())
    assert student.features(student.preprocess.normalise(pixels)).shape == (2, student.feature_dim)
    assert any("coarse" in w for w in student.warnings) == (side < 4)


def test_lraspp_equals_torchvisions_own_on_the_same_levels():
    student = small().eval()
    levels = timm.create_model("test_resnet", output_stride=8, num_classes=0, features_only=True, out_indices=(0, 4))
    wanted = {k: v for k, v in student.model.backbone.state_dict().items() if k in levels.state_dict()}
    levels.load_state_dict(wanted)

    class Backbone(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            low, high = levels(x)
            return {"low": low, "high": high}

    reference = LRASPP(Backbone(), 32, 96, 3, student.model.width)
    reference.classifier.load_state_dict(student.model.head.state_dict())
    x = torch.randn(2, 3, 32, 32)
    levels.eval()
    with torch.no_grad():
        found = resize_map(student(x), (32, 32))
        assert torch.allclose(found, reference.eval()(x)["out"], atol=1e-5)


def test_rates_of_deeplabv3_are_the_published_ones_at_the_published_sizes():
    def rates(size: int, stride: int) -> list[int]:
        with torch.device("meta"):
            student = build_segmenter("test_resnet", {"output_stride": stride}, 3, size, head="deeplabv3")
        return [m.dilation[0] for m in student.model.head[0].convs[1:4].modules() if isinstance(m, torch.nn.Conv2d)]

    assert rates(512, 8) == [12, 24, 36]
    assert rates(512, 16) == [6, 12, 18]
    assert rates(32, 8) == [1, 2, 2]


def test_the_backbone_loads_in_plain_timm(tmp_path: Path):
    student = build_segmenter("vit_small_patch16_224", {"depth": 2}, 3, 64).eval()
    plain = timm.create_model("vit_small_patch16_224", num_classes=0, **student.kwargs)
    plain.load_state_dict(student.model.backbone.state_dict())
    save_segmenter(student, tmp_path, NAMES)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), loaded(x))
        assert torch.allclose(student.features(x), loaded(x), atol=1e-6)


@pytest.mark.parametrize("head", ["lraspp", "deeplabv3"])
def test_save_and_load_give_the_same_masks(tmp_path: Path, head):
    student = small(head)
    # Batch norm's running statistics must survive too.
    student.train().logits(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    save_segmenter(student.eval(), tmp_path, NAMES)
    loaded = load_any(tmp_path)
    assert isinstance(loaded, Segmenter)
    assert loaded.classes == NAMES
    assert not loaded.training
    assert loaded.preprocess == student.preprocess
    photo = make_photo(40, 60)
    a, b = student.predict([photo])[0], loaded.predict([photo])[0]
    assert np.array_equal(a.mask, b.mask)
    assert np.array_equal(a.probability, b.probability)
    assert load_student(tmp_path).feature_dim == student.feature_dim


def test_predictions_have_the_images_own_size_and_are_the_upsampled_argmax(tmp_path: Path):
    student = small(classes=40).eval()
    student.classes = [f"c{i}" for i in range(40)]
    photo = make_photo(50, 70)
    Image.fromarray(photo).save(tmp_path / "a.png")
    first, second, third = student.predict([photo, tmp_path / "a.png", Image.fromarray(photo[:, :33])], batch=2)
    assert first.mask.shape == (50, 70)
    assert first.mask.dtype == np.uint8
    assert third.mask.shape == (50, 33)
    assert np.array_equal(first.mask, second.mask)
    squashed = np.asarray(Image.fromarray(photo).resize((32, 32), Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = student.logits(torch.from_numpy(squashed.transpose(2, 0, 1).copy())[None])
    probabilities = F.interpolate(logits, (50, 70), mode="bilinear").softmax(1)[0]
    assert np.array_equal(first.mask, probabilities.argmax(0).numpy())
    assert np.allclose(first.probability, probabilities.amax(0).numpy(), atol=1e-5)
    shares = first.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares[f"c{first.mask[0, 0]}"] == pytest.approx((first.mask == first.mask[0, 0]).mean())


def test_it_starts_from_a_backbones_checkpoint(tmp_path: Path):
    plain = timm.create_model("test_resnet", output_stride=8, num_classes=11)
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    student = build_segmenter("test_resnet", {"output_stride": 8}, 3, 32, checkpoint=str(tmp_path / "w.pth"))
    own = plain.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in student.model.backbone.state_dict().items())
    assert not student.warnings


def test_features_and_maps_for_feature_matching():
    student = small().eval()
    x = torch.randn(2, 3, 32, 32)
    pooled, last = Maps(student.model.backbone)(x)
    assert torch.equal(pooled, student.features(x))
    assert last.shape == (2, 96, 4, 4)
    classifier = build_student("test_resnet", {"output_stride": 8}, 4, 32)
    assert student.feature_dim == classifier.feature_dim


@pytest.mark.parametrize("head", ["lraspp", "deeplabv3"])
def test_flops_are_counted_without_memory_and_hold_what_is_known(head):
    counted = forward_flops(on_meta(lambda: small(head).model), (3, 32, 32))
    assert counted == forward_flops(small(head).model, (3, 32, 32))
    backbone = forward_flops(small(head).model.backbone, (3, 32, 32))
    # Multiply-adds of torchvision's heads by hand: 1x1 convolutions on 4x4, 1x1 and 16x16 maps.
    if head == "lraspp":
        extra = 96 * 128 * 16 + 96 * 128 + 32 * 3 * 256 + 128 * 3 * 256
    else:
        extra = 16 * (96 * 256 * (1 + 27) + 1280 * 256 + 256 * 256 * 9 + 256 * 3) + 96 * 256
    assert counted == backbone + 2 * extra
    assert train_flops(small(head).model, (3, 32, 32)) > 2.5 * counted


def test_what_cannot_be_is_said():
    with pytest.raises(KtrayError, match="2 to 255 classes"):
        small(classes=256)
    with pytest.raises(KtrayError, match="test_resnett"):
        build_segmenter("test_resnett", {}, 3, 32)
    with pytest.raises(KtrayError, match=r"student\.kwargs\.features_only"):
        build_segmenter("test_resnet", {"features_only": True}, 3, 32)


def test_saving_needs_a_name_for_each_class_and_loading_a_folder(tmp_path: Path):
    with pytest.raises(KtrayError, match="3 logits for 2"):
        save_segmenter(small(), tmp_path, NAMES[:2])
    with pytest.raises(KtrayError, match="no segmentation student"):
        load_segmenter(tmp_path)
    save_segmenter(small(), tmp_path, NAMES)
    (tmp_path / "head.safetensors").write_bytes(b"broken")
    with pytest.raises(KtrayError):
        load_segmenter(tmp_path)


def test_it_learns_a_small_task():
    """A box in one of two colours: a few steps must beat the most frequent class by far."""
    rng = np.random.default_rng(0)
    masks = np.zeros((12, 32, 32), np.uint8)
    for mask in masks:
        x, y = rng.integers(0, 16, 2)
        mask[y : y + 16, x : x + 16] = rng.integers(1, 3)
    colours = np.array([[40, 40, 40], [200, 60, 60], [60, 60, 200]], np.uint8)
    images = torch.from_numpy(colours[masks].transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(masks)
    student = small().train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(25):
        loss = map_loss(student.logits(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()
    with torch.no_grad():
        right = resize_map(student.logits(images), (32, 32)).argmax(1) == labels
    assert right.float().mean() > 0.9 > 0.8 > (labels == 0).float().mean()
