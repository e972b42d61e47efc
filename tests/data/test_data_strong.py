"""Strong views against torchvision, Pillow and a computation box by box."""

import numpy as np
import pytest
import torch
from image_zoo import photo
from PIL import Image, ImageEnhance, ImageOps

from ktray.data import strong
from ktray.data.augment import view_keys
from ktray.data.strong import LEVELS, OPERATIONS, PLAIN, StrongPolicy, apply, signed_level, strong_views

ALL = StrongPolicy(crop_min=0.3, hflip=0.5, photometric=2, erase=0.5)


@pytest.fixture(scope="module")
def images():
    return torch.stack([torch.tensor(photo(i, 32, 40)[:32, :32]).permute(2, 0, 1) for i in range(24)])


def keys(count, visit=0, seed=0):
    return view_keys(seed, np.arange(count), np.full(count, visit))


def test_a_strong_view_follows_from_its_key_alone(images):
    first = strong_views(images, ALL, keys(24))
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    torch.manual_seed(7)
    order = np.random.default_rng(0).permutation(24)
    assert torch.equal(first[order], strong_views(images[order], ALL, keys(24)[order]))
    assert torch.equal(first[5:9], strong_views(images[5:9], ALL, keys(24)[5:9]))
    for other in (keys(24, visit=1), keys(24, seed=1)):
        changed = (strong_views(images, ALL, other) != first).flatten(1).any(1)
        assert changed.float().mean() > 0.9


def test_the_plain_policy_changes_nothing(images):
    assert not PLAIN.active
    assert torch.equal(strong_views(images, PLAIN, keys(24)), images)
    for policy in (
        StrongPolicy(crop_min=0.9),
        StrongPolicy(hflip=0.1),
        StrongPolicy(photometric=1),
        StrongPolicy(erase=0.1),
    ):
        assert policy.active


def pillow(image, name, strength):
    """The operation by Pillow, for one image (3, H, W)."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhance:
        picture = enhance[name](picture).enhance(1 + 0.9 * strength)
    elif name == "posterize":
        picture = ImageOps.posterize(picture, 8 - round(4 * abs(strength)))
    elif name == "solarize":
        picture = ImageOps.solarize(picture, int(255 * (1 - abs(strength))))
    elif name != "identity":
        picture = getattr(ImageOps, name)(picture)
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("strength", [-1.0, -0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(images, name, strength):
    got = apply(images[:6], name, strength)
    for mine, image in zip(got, images[:6], strict=True):
        expected = pillow(image, name, strength)
        inside = (slice(None), slice(1, -1), slice(1, -1))  # Pillow does not sharpen the border
        difference = (mine.int() - expected.int()).abs()[inside].float()
        # Solarize: a value at the threshold may fall on either side of it.
        assert (difference > 2).float().mean() < (0.02 if name in ("solarize", "equalize") else 0.001)


def test_each_image_has_its_own_operation_and_strength(images, monkeypatch):
    calls = []
    original = strong.apply

    def recorded(part, name, strength):
        calls.append((name, strength, len(part)))
        return original(part, name, strength)

    monkeypatch.setattr(strong, "apply", recorded)
    many = images[:1].expand(4000, 3, 32, 32)
    strong_views(many, StrongPolicy(photometric=1, magnitude=0.5), keys(4000))
    count = {name: sum(n for other, _, n in calls if other == name) for name in OPERATIONS}
    for name in OPERATIONS[1:]:
        assert count[name] == pytest.approx(4000 / len(OPERATIONS), rel=0.2)
    strengths = {s for name, s, _ in calls if name == "contrast"}
    assert strengths == {0.5 * signed_level(level) for level in range(2 * LEVELS)}
    assert max(strengths) == -min(strengths) == 0.5
    assert 0 not in strengths


def test_an_unknown_operation_is_refused(images):
    with pytest.raises(ValueError, match="'rotate' is not an operation"):
        apply(images, "rotate", 1.0)


def test_erased_boxes_have_the_mean_colour_and_the_areas_of_the_paper():
    flat = torch.zeros(3000, 3, 40, 60, dtype=torch.uint8)
    flat[:, :, :, 30:] = 200
    out = strong_views(flat, StrongPolicy(erase=0.4), keys(3000))
    erased = out[:, 0] == 100
    shares = erased.flatten(1).float().mean(1)
    assert (shares > 0).float().mean() == pytest.approx(0.4, abs=0.03)
    for box in erased[shares > 0][:50]:
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert int(box.sum()) == int(rows * columns)
    inside = shares[shares > 0]
    assert inside.min() > 0.015
    assert inside.max() < 0.36
    assert inside.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert torch.equal(out[:, 0][~erased], flat[:, 0][~erased])
