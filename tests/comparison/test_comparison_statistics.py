"""Intervals against the normal approximation, the Pareto front against its definition."""

import numpy as np
import pytest

from ktray.comparison.statistics import Row, cheaper, difference, interval, pareto


def correct(p, seeds, images, seed=0):
    return np.random.default_rng(seed).random((seeds, images)) < p


def test_interval_of_one_seed_is_the_binomial_one():
    data = correct(0.8, 1, 4000)
    mean = data.mean()
    half = 1.96 * (mean * (1 - mean) / 4000) ** 0.5
    low, high = interval(data, draws=4000)
    assert low == pytest.approx(mean - half, abs=half / 8)
    assert high == pytest.approx(mean + half, abs=half / 8)


def test_spread_between_seeds_widens_the_interval():
    same = np.repeat(correct(0.5, 1, 500), 3, axis=0)
    apart = np.concatenate([correct(p, 1, 500, i) for i, p in enumerate((0.3, 0.5, 0.7))])
    widths = [high - low for low, high in (interval(same), interval(apart))]
    assert widths[1] > 2 * widths[0]


def test_difference_pairs_the_images():
    hard = np.arange(1000) < 500
    a = np.stack([hard | (np.arange(1000) % 50 == 0)] * 2)
    b = np.stack([hard] * 2)
    low, high = difference(a, b)
    assert 0 < low < a.mean() - b.mean() < high
    # Unpaired, the images' own spread (0.5 / sqrt(1000) each) would hide a difference of one point.
    assert high - low < 0.02


def test_pareto_is_its_definition():
    rng = np.random.default_rng(1)
    for _ in range(50):
        points = [tuple(p) for p in rng.integers(1, 6, (8, 2)).astype(float)]
        front = pareto(points)
        best = {
            p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1]) for q in points)
        }
        assert {points[i] for i in front} == best
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def row(name, accuracy, flops):
    return Row(name, accuracy, 0.0, 0.0, 1.0, accuracy, flops, 1.0, None, 1, 1)


def test_cheaper_names_the_least_cost_that_reaches_the_accuracy():
    rows = [row("a", 0.8, 100.0), row("b", 0.8, 50.0), row("c", 0.9, 20.0), row("d", 0.7, 1.0)]
    assert cheaper(rows, 0) == ("c", 5.0)
    assert cheaper(rows, 2) is None
    assert cheaper(rows, 3) is None
