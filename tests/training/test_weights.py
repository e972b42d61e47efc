"""Weighted rows: how often each is drawn, the gradient that comes of it, and the weights themselves."""

import numpy as np
import pytest
import torch

from ktray.targets.top_k import sparsify
from ktray.training.sampler import RowSampler
from ktray.training.weights import WEIGHT, confidence_weight, draw

WEIGHTS = np.array([0.0, 0.1, 0.5, 1.0, 1.0, 2.3, 0.7, 2.4], np.float32)
SHARES = WEIGHTS / WEIGHTS.mean()


def test_each_row_is_drawn_as_often_as_its_weight_says_rounded_down_or_up():
    total, epochs = np.zeros(8), 4_000
    for seed in range(epochs):
        rows, copy = draw(WEIGHTS, np.random.default_rng(seed))
        times = np.bincount(rows, minlength=8)
        assert len(rows) == 8
        assert (np.floor(SHARES - 1e-6) <= times).all()
        assert (times <= np.ceil(SHARES)).all()
        for row in range(8):
            assert sorted(copy[rows == row]) == list(range(times[row]))
        total += times
    assert total[0] == 0
    assert total / epochs == pytest.approx(SHARES, abs=0.03)


def test_equal_weights_draw_each_row_once():
    for weight in (np.full(50, 0.3, np.float32), np.zeros(50, np.float32)):
        rows, copy = draw(weight, np.random.default_rng(0))
        assert sorted(rows.tolist()) == list(range(50))
        assert rows.tolist() != list(range(50))
        assert not copy.any()


def test_the_expected_gradient_is_that_of_the_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    w = torch.zeros(3, requires_grad=True)
    weighted = (torch.from_numpy(SHARES) * (x @ w - y) ** 2).mean()
    (expected,) = torch.autograd.grad(weighted, w)
    times = np.mean([np.bincount(draw(WEIGHTS, np.random.default_rng(s))[0], minlength=8) for s in range(4_000)], 0)
    drawn = (torch.from_numpy(times.astype(np.float32)) * (x @ w - y) ** 2).sum() / 8
    (found,) = torch.autograd.grad(drawn, w)
    assert found == pytest.approx(expected, abs=0.03)


def entropy_weight(logits):
    return 1 - torch.distributions.Categorical(logits=logits).entropy() / np.log(logits.shape[-1])


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 2)])
def test_confidence_is_that_of_another_librarys_entropy(shape):
    logits = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).half()
    expected = entropy_weight(logits.float().movedim(1, -1)).reshape(5, -1).mean(1)
    assert confidence_weight({"logits": logits.numpy()}, 0) == pytest.approx(expected.tolist(), abs=1e-5)


def test_confidence_of_the_largest_logits_is_that_of_the_restored_ones():
    logits = 4 * torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    rows = {name: value.numpy() for name, value in sparsify(logits, 3).items()}
    dense = torch.full((5, 9), 0.0) + torch.from_numpy(rows["logits_rest"]).float()
    dense.scatter_(1, torch.from_numpy(rows["logits_index"]).long(), torch.from_numpy(rows["logits_top"]).float())
    assert confidence_weight(rows, 9) == pytest.approx(entropy_weight(dense).tolist(), abs=1e-3)


SHARDS = [("a", 40), ("b", 24), ("c", 36)]
START = {"a": 0, "b": 40, "c": 64}


def read(windows):
    for window in windows:
        yield {"id": np.concatenate([START[s.shard] + np.arange(s.rows)[s.start :: s.step] for s in window])}


def weigh(rows):
    return (rows["id"] % 4 / 1.5).astype(np.float32)  # a quarter of the rows is never drawn


def sampler(**more):
    return RowSampler(SHARDS, read, **{"batch": 10, "seed": 5, "weigh": weigh, **more})


@pytest.mark.parametrize("window_rows", [50, 10_000])
def test_the_sampler_draws_by_weight_and_numbers_each_use_of_a_row(window_rows):
    batches = list(sampler(window_rows=window_rows).batches(0, 400))
    ids, visits = (np.concatenate([b[name] for b in batches]) for name in ("id", "visit"))
    assert {len(b["id"]) for b in batches} == {10}
    assert all(WEIGHT not in b for b in batches)
    assert len(set(zip(ids.tolist(), visits.tolist(), strict=True))) == len(ids)
    times = np.bincount(ids % 4, minlength=4) / len(ids)
    assert times == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6], abs=0.01)


@pytest.mark.parametrize("window_rows", [50, 10_000])
def test_a_restart_goes_on_with_the_same_draws(window_rows):
    whole = list(sampler(window_rows=window_rows).batches(0, 40))
    for start in (1, 13, 27):
        rest = list(sampler(window_rows=window_rows).batches(start, 40))
        for a, b in zip(whole[start:], rest, strict=True):
            np.testing.assert_array_equal(a["id"], b["id"])
            np.testing.assert_array_equal(a["visit"], b["visit"])


def test_more_workers_draw_the_same_rows():
    both = [sampler(batch=5, ranks=ranks, rank_count=2) for ranks in ([0, 1], [0], [1])]
    together, first, second = (list(one.batches(0, 30)) for one in both)
    for a, b, c in zip(together, first, second, strict=True):
        assert a["id"].tolist() == [*b["id"].tolist(), *c["id"].tolist()]
