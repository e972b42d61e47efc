"""Metrics against scikit-learn on repeated images, intervals against the normal approximation, the Pareto front
against its definition."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, recall_score

from ktray.jobs.compare.statistics import interval, pareto, plain, reach, resample
from ktray.tasks.base import task_kind
from ktray.tasks.weighted import Accuracy, MeanClassAccuracy, MeanIoU, WeightedCounts


def correct(p, seeds, images, seed=0):
    return np.random.default_rng(seed).random((seeds, images)) < p


def drawn_weights(images, draws=5):
    rng = np.random.default_rng(7)
    return np.stack([np.bincount(rng.integers(0, images, images), minlength=images) for _ in range(draws)])


def test_weights_stand_for_repeated_images_in_accuracy():
    data = correct(0.7, 3, 40)
    weights = drawn_weights(40)
    expected = [[np.repeat(row, w).mean() for row in data] for w in weights]
    assert Accuracy(data).score(weights.astype(float)) == pytest.approx(np.array(expected))


def test_mean_class_accuracy_is_sklearns_macro_recall_over_the_drawn_classes():
    rng = np.random.default_rng(1)
    label = np.array([0] * 30 + [2] * 8 + [3] * 2 + [5])  # classes 1 and 4 have no image; 5 is not always drawn
    predicted = np.where(rng.random((2, len(label))) < 0.6, label, rng.integers(0, 6, (2, len(label))))
    scores = MeanClassAccuracy(predicted == label, label)
    weights = drawn_weights(len(label), 8)
    assert (weights[:, -1] == 0).any()
    for w, found in zip(weights, scores.score(weights.astype(float)), strict=True):
        y = np.repeat(label, w)
        present = np.unique(y)
        expected = [recall_score(y, np.repeat(p, w), labels=present, average="macro") for p in predicted]
        assert found == pytest.approx(expected)
    assert plain(scores)[0] == pytest.approx(recall_score(label, predicted[0], labels=[0, 2, 3, 5], average="macro"))


def test_mean_iou_is_sklearns_jaccard_on_the_drawn_pixels():
    rng = np.random.default_rng(2)
    masks = rng.integers(0, 3, (12, 30))  # class 3 of four never occurs
    predictions = np.where(rng.random((2, 12, 30)) < 0.7, masks, rng.integers(0, 3, (2, 12, 30)))

    def count(true, said):
        return np.stack([[((m == c) == true) & ((p == c) == said) for c in range(4)] for m, p in pairs]).sum(2)

    tables = []
    for prediction in predictions:
        pairs = list(zip(masks, prediction, strict=True))
        tables.append([count(True, True), count(False, True), count(True, False)])
    tp, fp, fn = (np.stack([t[i] for t in tables]) for i in range(3))
    weights = drawn_weights(12)
    for w, found in zip(weights, MeanIoU(tp, fp, fn).score(weights.astype(float)), strict=True):
        y = np.repeat(masks, w, axis=0).ravel()
        expected = [
            jaccard_score(y, np.repeat(p, w, axis=0).ravel(), labels=[0, 1, 2], average="macro") for p in predictions
        ]
        assert found == pytest.approx(expected)


def test_interval_of_one_seed_is_the_binomial_one():
    data = correct(0.8, 1, 4000)
    mean = data.mean()
    half = 1.96 * (mean * (1 - mean) / 4000) ** 0.5
    low, high = interval(resample([Accuracy(data)], draws=4000)[:, 0])
    assert low == pytest.approx(mean - half, abs=half / 8)
    assert high == pytest.approx(mean + half, abs=half / 8)


def test_spread_between_seeds_widens_the_interval():
    same = np.repeat(correct(0.5, 1, 500), 3, axis=0)
    apart = np.concatenate([correct(p, 1, 500, i) for i, p in enumerate((0.3, 0.5, 0.7))])
    sample = resample([Accuracy(same), Accuracy(apart)], draws=1000)
    widths = [high - low for low, high in (interval(sample[:, i]) for i in range(2))]
    assert widths[1] > 2 * widths[0]


def test_ways_are_drawn_on_the_same_images():
    hard = np.arange(1000) < 500
    a = np.stack([hard | (np.arange(1000) % 50 == 0)] * 2)
    b = np.stack([hard] * 3)  # another number of seeds
    sample = resample([Accuracy(a), Accuracy(b)], draws=1000)
    low, high = interval(sample[:, 0] - sample[:, 1])
    assert 0 < low < a.mean() - b.mean() < high
    # Unpaired, the images' own spread (0.5 / sqrt(1000) each) would hide a difference of one point.
    assert high - low < 0.02


def test_ways_with_other_images_are_not_compared():
    with pytest.raises(ValueError, match="unpack"):
        resample([Accuracy(correct(0.5, 1, 10)), Accuracy(correct(0.5, 1, 11))], draws=2)


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


def test_reach_takes_the_cheapest_run_that_is_as_accurate_and_interpolates_nothing():
    accuracy, cost = [0.9, 0.82, 0.7, 0.8], [100.0, 40.0, 10.0, 120.0]
    sample = np.tile(np.array(accuracy), (400, 1))
    found = reach(accuracy, cost, sample, 3, [0, 1, 2])
    assert (found.index, found.times, found.low, found.high) == (1, 3.0, 3.0, 3.0)
    # In a tenth of the draws only the full run gets there, in another tenth none does.
    sample[:40, 1] = 0.79
    sample[40:80, :3] = 0.5
    found = reach(accuracy, cost, sample, 3, [0, 1, 2])
    assert (found.times, found.low, found.high) == (3.0, 0.0, 3.0)
    found = reach(accuracy, cost, sample[:40], 3, [0, 1, 2])
    assert (found.low, found.high) == (1.2, 1.2)
    assert reach(accuracy, cost, sample, 0, [1, 2]) is None


@pytest.mark.parametrize(
    ("name", "metric"),
    [("classification", "top1"), ("classification", "mean_class_accuracy"), ("segmentation", "miou")],
)
def test_the_counts_of_a_task_kinds_images_make_the_same_scores(name, metric):
    rng, kind = np.random.default_rng(3), task_kind(name)
    seeds = []
    for _ in range(2):
        rows = {"label": np.arange(30) % 4, "student": rng.normal(size=(30, 5)).astype(np.float32)}
        rows |= {f"student_{count}": rng.integers(0, 9, (30, 4)) for count in ("tp", "fp", "fn")}
        seeds.append(kind.compact(rows))
    weights = drawn_weights(30).astype(float)
    counts = np.stack([kind.image_counts(rows, "student") for rows in seeds]).astype(float)
    plainly = WeightedCounts(counts, kind.scores, metric).score(weights)
    assert kind.weighted_scores(metric, seeds).score(weights) == pytest.approx(plainly)
