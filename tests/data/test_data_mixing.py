"""Mixup and CutMix against closed forms and a computation pixel by pixel."""

import numpy as np
import pytest
import torch

from ktray.data.mixing import cutmix, mix, mixup


def test_mixup_equals_its_closed_form():
    n = 6
    images = torch.randn(n, 3, 4, 4, dtype=torch.float64)
    targets = torch.eye(n, dtype=torch.float64)
    mixed, soft = mixup(images, targets, 0.8, torch.Generator().manual_seed(3))
    # One-hot targets of distinct classes show the weight and the pairing.
    torch.testing.assert_close(soft.sum(1), torch.ones(n, dtype=torch.float64))
    weight = soft.diagonal()
    own = weight[weight < 1 - 1e-9]
    assert len(own) >= 2
    assert torch.allclose(own, own[0])
    lam = float(own[0])
    assert 0 < lam < 1
    for i in range(n):
        other = [j for j in range(n) if j != i and soft[i, j] > 1e-9]
        j = other[0] if other else i
        torch.testing.assert_close(mixed[i], lam * images[i] + (1 - lam) * images[j])
        torch.testing.assert_close(soft[i], lam * targets[i] + (1 - lam) * targets[j])
    # Every image serves once as a partner.
    torch.testing.assert_close(soft.sum(0), torch.ones(n, dtype=torch.float64))


def test_mixup_is_decided_by_the_generator_and_alpha():
    images, targets = torch.randn(8, 1, 2, 2), torch.eye(8)
    first = mixup(images, targets, 0.5, torch.Generator().manual_seed(1))
    again = mixup(images, targets, 0.5, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    generator = torch.Generator().manual_seed(0)
    pair = torch.tensor([[0.0], [1.0]])
    for alpha in (0.2, 1.0, 5.0):
        draws = []
        while len(draws) < 600:
            mixed = mixup(pair[..., None, None], pair, alpha, generator)[1]
            draws.append(float(mixed[0, 0]))
        values = torch.tensor([d for d in draws if 0 < d < 1], dtype=torch.float64)
        # mixed[0] is 0 without a swap and 1 - lambda with one; Var Beta(a, a) = 1 / (4 (2a + 1)).
        assert values.mean() == pytest.approx(0.5, abs=0.08)
        assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.25)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_a_box_and_mixes_targets_by_its_area(seed):
    n, height, width = 6, 12, 20
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, height, width)
    mixed, soft = cutmix(images, torch.eye(n), 1.0, seeded(seed))
    boxes = set()
    for i in range(n):
        foreign = (mixed[i] != i).any(0)
        share = float(foreign.float().mean())
        others = set(mixed[i][:, foreign].unique().tolist())
        assert len(others) <= 1
        if not others:
            continue
        rows, columns = foreign.any(1).nonzero().ravel(), foreign.any(0).nonzero().ravel()
        assert foreign.sum() == len(rows) * len(columns)  # a full box
        boxes.add((int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])))
        expected = torch.zeros(n)
        expected[i], expected[int(others.pop())] = 1 - share, share
        torch.testing.assert_close(soft[i], expected)
    assert len(boxes) <= 1  # the batch has one box


def test_boxes_of_cutmix_have_the_share_of_the_beta_distribution_and_clipped_borders():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 40, 40)
    generator, shares = seeded(), []
    while len(shares) < 400:
        mixed, soft = cutmix(images, torch.eye(2), 1.0, generator)
        share = float(mixed[0].mean())
        assert float(soft[0, 1]) == pytest.approx(share, abs=1e-6)
        if share > 0:
            shares.append(share)
    # Without clipping, the share would be uniform with mean 1/2. With s = sqrt(share) and a uniform centre, each side
    # keeps s - s^2 / 4 on average, so that the mean is E[(s - s^2 / 4)^2] = 1/2 - 1/5 + 1/48.
    assert np.mean(shares) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.04)


def test_cutmix_of_maps_takes_the_cell_of_the_image_that_its_centre_shows():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    maps = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    for seed in range(6):
        mixed, soft = cutmix(images, maps, 1.0, seeded(seed))
        torch.testing.assert_close(soft[:, 0], mixed[:, 0, 2::4, 2::4])


def test_with_both_each_batch_draws_one_of_them():
    images = torch.rand(4, 1, 8, 8)
    kinds = []
    for seed in range(60):
        mixed, _ = mix(images, torch.eye(4), 5.0, 1.0, seeded(seed))
        pasted = all(bool((image == images).all(1).any(0).all()) for image in mixed)  # every pixel is one of the four's
        kinds.append(pasted)
    assert 15 < sum(kinds) < 45
    same, targets = mix(images, torch.eye(4), 0.0, 0.0, seeded())
    assert same is images
    torch.testing.assert_close(targets, torch.eye(4))
