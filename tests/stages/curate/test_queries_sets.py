"""Queries of images with sets of classes: equal shares of the classes, and means of classes."""

from __future__ import annotations

import numpy as np
import pytest

from ktray.retrieval.floor import leave_one_out_of_mean
from ktray.stages.curate.queries import Queries, balanced_shares, one_class_each

SETS = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0]], np.uint8)


def test_each_class_has_the_same_share() -> None:
    share = balanced_shares(SETS)
    # By hand: 4 images have the first class, one the second, one the third, one has none.
    assert share == pytest.approx(np.array([1 / 4, 1 / 4 + 1, 1 / 4 + 1, 1 / 4, 1]) * 5 / 4)
    assert share.mean() == pytest.approx(1)
    assert balanced_shares(np.ones((3, 1), np.uint8)).tolist() == [1, 1, 1]


def test_an_image_counts_in_the_mean_of_each_of_its_classes_and_is_left_out_of_its_own() -> None:
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(5, 4)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    images = Queries.of(embedding, list("abcde"), np.zeros(5, np.int64), np.arange(5), SETS, np.ones(5))
    # A crop of the second image, and a class name without an image.
    crop = Queries.of(embedding[:1], ["b2"], np.zeros(1, np.int64), np.array([1]), SETS[1:2], np.ones(1))
    text = Queries.of(
        embedding[4:], ["text:z"], np.zeros(1, np.int64), None, np.array([[0, 0, 1]], np.uint8), np.ones(1)
    )
    every = one_class_each(Queries.joined([images, crop, text]), SETS)
    pairs = one_class_each(images, SETS)
    assert every.uris == ["a", "b", "b", "c", "c", "d", "b2", "b2", "text:z"]
    assert every.labels.tolist() == [0, 0, 1, 0, 2, 0, 0, 1, 2]
    assert every.origin.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, -1]
    found = leave_one_out_of_mean(pairs.embedding, pairs.labels, every.embedding, every.labels, every.origin)

    def similarity(image: int, rest: list[np.ndarray]) -> float:
        mean = np.sum(rest, axis=0)
        return float(embedding[image] @ mean / np.linalg.norm(mean))

    a, b, c, d, e = embedding
    expected = [
        similarity(0, [b, c, d, a]),  # the crop of b shows a
        similarity(1, [a, c, d]),
        similarity(2, [a, b, d, a]),
        similarity(3, [a, b, c, a]),
        similarity(2, [e]),  # the second class has b and its crop only
    ]
    assert found == pytest.approx(expected, abs=1e-5)


def test_queries_with_and_without_sets_are_joined() -> None:
    one = Queries.of(np.ones((1, 2), np.float32), ["a"], np.zeros(1, np.int64), None, SETS[:1], np.array([2.0]))
    both = Queries.joined([one, one])
    assert both.classes is not None
    assert both.share is not None
    assert both.share.tolist() == [2.0, 2.0]
    assert both.membership.shape == (2, 3)
    plain = Queries.of(np.ones((1, 2), np.float32), ["a"], np.array([4]))
    assert Queries.joined([plain, plain]).share is None
    assert plain.membership.tolist() == [4]
