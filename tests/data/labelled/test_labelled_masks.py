import io

import numpy as np
import pytest
import torch
from PIL import Image

from ktray.data.augment import random_views, view_keys
from ktray.data.labelled.masks import check_mask, decode_mask, eval_mask
from ktray.data.preprocess import Preprocess
from ktray.data.views import View, ViewPolicy, make_view, render
from ktray.errors import BadImage

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 10]], np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    """An image (90, 130, 3) whose colours say the class, and its mask (90, 130): a few large boxes."""
    mask = np.zeros((90, 130), np.uint8)
    mask[:50, 70:], mask[40:80, 10:60], mask[55:, 80:120] = 1, 2, 3
    return COLOURS[mask], mask


def classes_of(image: np.ndarray) -> np.ndarray:
    """The nearest colour's class, (H, W), of (H, W, 3)."""
    return np.abs(image[..., None, :].astype(int) - COLOURS).sum(-1).argmin(-1)


def inside(mask: np.ndarray) -> np.ndarray:
    """Pixels whose neighbourhood of 5 x 5 has one class."""
    padded = np.pad(mask, 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
    return windows.min((2, 3)) == windows.max((2, 3))


def agree(image: np.ndarray, mask: np.ndarray) -> None:
    where = inside(mask)
    assert where.mean() > 0.4
    assert len(np.unique(mask)) > 1
    assert np.array_equal(classes_of(image)[where], mask[where])
    # Were the mask moved by a pixel or mirrored, these would not agree; boundaries must be nearly right too.
    assert (classes_of(image) == mask).mean() > 0.93


@pytest.mark.parametrize("index", range(6))
def test_a_view_of_an_image_shows_its_crop(scene, index):
    image, mask = scene
    view = make_view(ViewPolicy(scale=(0.3, 1.0)), "key", index, 0, *mask.shape)
    crop = mask[view.y : view.y + view.height, view.x : view.x + view.width]
    labels = np.asarray(Image.fromarray(np.ascontiguousarray(crop)).resize((48, 40), Image.Resampling.NEAREST))
    agree(render(image, view, (40, 48)).transpose(1, 2, 0), labels[:, ::-1] if view.flip else labels)


def test_a_view_of_the_same_size_is_the_crop_itself(scene):
    image = scene[0]
    found = render(image, View(5, 7, 60, 50, flip=1), (50, 60))
    assert np.array_equal(found.transpose(1, 2, 0), image[7:57, 5:65][:, ::-1])
    assert found.flags.c_contiguous


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_evaluation_view_of_the_mask_is_the_images(scene, mode, crop_pct):
    image, mask = scene
    preprocess = Preprocess((48, 48), (0, 0, 0), (1, 1, 1), "bilinear", mode, crop_pct, fill=(1, 2, 3))
    pixels = preprocess.eval_transform(image).transpose(1, 2, 0)
    labels = eval_mask(preprocess, mask)
    assert labels.dtype == np.uint8
    assert labels.shape == (48, 48)
    bars = (labels == 255).all(1)
    assert bars.any() == (mode == "longest")
    assert (pixels[bars] == (1, 2, 3)).all()
    assert not (labels[~bars] == 255).any()
    agree(pixels[~bars], labels[~bars])


def test_random_views_of_images_and_masks_are_the_same(scene):
    image, mask = scene
    n = 8
    images = torch.from_numpy(image.transpose(2, 0, 1).copy()).expand(n, -1, -1, -1)
    masks = torch.from_numpy(mask).expand(n, -1, -1)
    policy = ViewPolicy(scale=(0.3, 1.0), hflip=0.5)
    keys = view_keys(0, np.arange(n), np.zeros(n, int))
    views, labels = random_views(images, policy, keys, size=64, masks=masks)
    assert torch.equal(views, random_views(images, policy, keys, size=64))
    assert labels.shape == (n, 64, 64)
    assert labels.dtype == torch.uint8
    assert len({m.numpy().tobytes() for m in labels}) == n
    for view, label in zip(views, labels, strict=True):
        agree(view.permute(1, 2, 0).numpy(), label.numpy())


def test_random_views_keep_ignored_pixels():
    masks = torch.full((2, 20, 20), 255, dtype=torch.uint8)
    masks[1] = 7
    keys = view_keys(0, np.arange(2), np.zeros(2, int))
    _, labels = random_views(torch.zeros(2, 3, 20, 20, dtype=torch.uint8), ViewPolicy(), keys, masks=masks)
    assert (labels[0] == 255).all()
    assert (labels[1] == 7).all()


@pytest.fixture
def values() -> np.ndarray:
    return (np.arange(12 * 9).reshape(12, 9) % 4).astype(np.uint8)


def palette(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values, "P")
    image.putpalette(list(COLOURS.ravel()))
    return image


@pytest.mark.parametrize(
    "make",
    [
        lambda v: encoded(Image.fromarray(v)),
        lambda v: encoded(Image.fromarray(v), bits=4),
        lambda v: encoded(Image.fromarray(v), bits=2),
        lambda v: encoded(palette(v)),
        lambda v: encoded(palette(v), bits=2),
        lambda v: encoded(Image.fromarray(v.astype(np.uint16))),
        lambda v: encoded(Image.fromarray(v), "TIFF"),
        lambda v: encoded(Image.fromarray(v), "BMP"),
    ],
    ids=["grey", "grey4", "grey2", "palette", "palette2", "sixteen", "tiff", "bmp"],
)
def test_every_form_of_label_map_gives_its_values(values, make):
    found = decode_mask(make(values), 4)
    assert found.dtype == np.uint8
    assert np.array_equal(found, values)


def test_one_bit_masks_are_two_classes():
    ink = np.arange(30).reshape(5, 6) % 3 == 0
    assert np.array_equal(decode_mask(encoded(Image.fromarray(ink)), 2), ink.astype(np.uint8))


def test_offset_and_ignored_values():
    raw = np.array([[0, 1, 2, 150, 151, 254, 255]], np.uint8)
    assert decode_mask(encoded(Image.fromarray(raw)), 150, offset=1).tolist() == [[255, 0, 1, 149, 255, 255, 255]]
    wide = np.array([[0, 255, 256, 260, 65535]], np.uint16)
    assert decode_mask(encoded(Image.fromarray(wide)), 10, offset=250).tolist() == [[255, 255, 6, 255, 255]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a png", "none of the formats PNG"),
        (encoded(Image.new("RGB", (4, 4))), "colours"),
        (encoded(Image.new("LA", (4, 4))), "colours"),
        (encoded(Image.new("L", (4, 4)), "JPEG"), "none of the formats PNG"),
        (encoded(Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64), np.uint8)))[:200], "broken"),
    ],
    ids=["empty", "text", "rgb", "alpha", "jpeg", "truncated"],
)
def test_what_is_no_label_map_is_a_bad_image(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode_mask(data, 4)


def test_a_mask_too_large_is_a_bad_image():
    with pytest.raises(BadImage, match="too large"):
        decode_mask(encoded(Image.new("L", (40, 40))), 4, max_pixels=100)


def test_a_mask_of_another_size_than_its_image_is_a_bad_image(scene):
    check_mask(*scene)
    with pytest.raises(BadImage, match="130 x 89"):
        check_mask(scene[0], scene[1][1:])
