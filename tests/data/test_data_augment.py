import numpy as np
import pytest
import torch
from image_zoo import photo
from PIL import Image
from scipy import stats

from ktray.data import augment
from ktray.data.augment import random_views, view_keys
from ktray.data.views import ViewPolicy

PLAIN = ViewPolicy(scale=(1, 1), ratio=(1, 1), hflip=0)
KEYS = view_keys(0, np.arange(16), np.zeros(16))


@pytest.fixture(scope="module")
def images():
    return torch.stack([torch.tensor(photo(i, 32, 32)).permute(2, 0, 1) for i in range(16)])


def test_a_view_follows_from_its_key_alone(images):
    policy = ViewPolicy(brightness=0.2, contrast=0.2, saturation=0.2)
    keys = view_keys(1, np.arange(16), np.full(16, 5))
    first = random_views(images, policy, keys)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert first.dtype == torch.uint8
    assert torch.equal(first, random_views(images, policy, keys))
    assert torch.equal(state, torch.random.get_rng_state())
    # In another order, in other batches, it is the same view.
    order = np.random.default_rng(0).permutation(16)
    assert torch.equal(first[order], random_views(images[order], policy, keys[order]))
    assert torch.equal(first[3:5], random_views(images[3:5], policy, keys[3:5]))
    same = images[:1].expand(16, -1, -1, -1)
    for other in (keys, view_keys(1, np.arange(16), np.full(16, 6)), view_keys(2, np.arange(16), np.full(16, 5))):
        assert len(torch.unique(random_views(same, policy, other), dim=0)) == 16
    assert not torch.equal(first, random_views(images, policy, keys, salt=1))


def test_keys_differ_by_seed_row_and_visit():
    seed, row, visit = np.meshgrid(np.arange(4), np.arange(500), np.arange(20), indexing="ij")
    keys = [view_keys(s, row[s].ravel(), visit[s].ravel()) for s in range(4)]
    assert len(torch.unique(torch.cat(keys))) == seed.size


def test_draws_are_uniform_and_unrelated():
    keys = view_keys(0, np.arange(20_000), np.zeros(20_000))
    draws = augment.uniforms(keys, 3, 8).numpy()
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=1)]))
    assert np.abs(correlation - np.eye(16)).max() < 0.03


def test_full_crop_is_the_image_and_certain_flip_its_mirror(images):
    assert torch.equal(random_views(images, PLAIN, KEYS), images)
    mirror = ViewPolicy(scale=(1, 1), ratio=(1, 1), hflip=1)
    assert torch.equal(random_views(images, mirror, KEYS), images.flip(3))


def test_enlarging_is_pillows_bilinear(images):
    got = random_views(images, PLAIN, KEYS, size=50)
    for mine, image in zip(got, images, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((50, 50), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(mine.permute(1, 2, 0).numpy(), np.asarray(expected), atol=1)


def test_crops_are_boxes_of_the_policys_size_anywhere():
    # Red holds the column and green the row, so a view's mean and slope tell its box.
    ramp = torch.arange(64.0)
    image = torch.stack([ramp.expand(64, 64) * 3, ramp.expand(64, 64).T * 3, torch.zeros(64, 64)]).to(torch.uint8)
    policy = ViewPolicy(scale=(0.25, 0.5), ratio=(1, 1), hflip=0.5)
    views = random_views(
        image.expand(2000, 3, 64, 64), policy, view_keys(0, np.arange(2000), np.zeros(2000)), size=32
    ).double()
    slope_x = (views[:, 0, 16, 28] - views[:, 0, 16, 4]) / 24 * 32 / 3 / 64
    slope_y = (views[:, 1, 28, 16] - views[:, 1, 4, 16]) / 24 * 32 / 3 / 64
    assert (slope_x < 0).double().mean() == pytest.approx(0.5, abs=0.05)
    assert (slope_y > 0).all()
    area = slope_x.abs() * slope_y
    assert 0.23 < area.min() < 0.28
    assert 0.47 < area.max() < 0.53
    assert area.mean() == pytest.approx(0.375, abs=0.01)
    centre = views[:, 0].mean((1, 2)) / 3
    assert centre.mean() == pytest.approx(31.5, abs=0.7)
    assert centre.std() > 3


def test_oblong_images_and_jitter(images):
    wide = torch.cat([images, images], dim=3)
    policy = ViewPolicy(brightness=0.5, scale=(1, 1), ratio=(2, 2), hflip=0)
    got = random_views(wide, policy, KEYS)
    assert got.shape == (16, 3, 32, 32)
    # In grey, brightness is all there is: every pixel of an image has one factor.
    flat = torch.full((400, 3, 8, 8), 100, dtype=torch.uint8)
    seen = random_views(flat, policy, view_keys(0, np.arange(400), np.zeros(400)))[:, :, :, :].double() / 100
    assert (seen.amax((1, 2, 3)) == seen.amin((1, 2, 3))).all()
    assert 0.49 < seen.min() < 0.55
    assert 1.45 < seen.max() < 1.51
