"""The similarity floor against plain loops, and against what it promises about new images."""

import numpy as np
import pytest

from ktray.retrieval.floor import above, calibrated, leave_one_out, leave_one_out_of_mean
from ktray.retrieval.search import search
from ktray.retrieval.strategies.base import in_turn

N, D, CLASSES = 24, 6, 4


def unit(rng, n):
    rows = rng.normal(size=(n, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def labelled():
    """Images in classes of 1, 5, 8 and 10 images, and queries: the images, then two crops of each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), [1, 5, 8, 10])
    images = unit(rng, N)
    crops = images.repeat(2, 0) + 0.3 * rng.normal(size=(2 * N, D))
    crops = (crops / np.linalg.norm(crops, axis=1, keepdims=True)).astype(np.float32)
    origin = np.concatenate([np.arange(N), np.arange(N).repeat(2)])
    return images, labels, np.concatenate([images, crops]), labels[origin], origin


def test_each_image_is_compared_with_the_queries_of_the_others_of_its_class(labelled):
    images, labels, queries, query_labels, origin = labelled
    expected = []
    for i in range(N):
        others = [q for q in range(len(queries)) if query_labels[q] == labels[i] and origin[q] != i]
        if others:
            expected.append(max(float(images[i] @ queries[q]) for q in others))
    assert len(expected) == N - 1  # the class with one image has no other
    assert leave_one_out(*labelled) == pytest.approx(expected, abs=1e-6)


def test_a_query_that_no_image_made_counts_for_all_images_of_its_class(labelled):
    images, labels, *_ = labelled
    texts = unit(np.random.default_rng(1), CLASSES)
    found = leave_one_out(images, labels, texts, np.arange(CLASSES), np.full(CLASSES, -1))
    assert found == pytest.approx([float(images[i] @ texts[labels[i]]) for i in range(N)], abs=1e-6)
    assert leave_one_out(images, labels, texts[:0], np.arange(0), np.zeros(0, int)).shape == (0,)


def test_the_mean_of_a_class_is_made_without_the_image(labelled):
    images, labels, queries, query_labels, origin = labelled
    expected = []
    for i in range(N):
        mean = queries[(query_labels == labels[i]) & (origin != i)].mean(0) if labels[i] else None
        if mean is not None:
            expected.append(float(images[i] @ mean / np.linalg.norm(mean)))
    assert leave_one_out_of_mean(*labelled) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "lost", "below"), [(19, 0.1, 2), (99, 0.1, 10), (99, 0.05, 5), (25, 0.1, 2), (4, 0.1, 1)]
)
def test_of_n_plus_one_images_just_the_promised_number_is_lost(n, lost, below):
    """Any of n + 1 exchangeable values may be the new one: count those that the floor of the others would lose."""
    values = np.random.default_rng(n).normal(size=n + 1).astype(np.float32)
    missed = sum(values[i] < calibrated(np.delete(values, i), lost) for i in range(n + 1))
    assert missed == below
    assert missed <= max(1, lost * (n + 1))


def test_without_values_there_is_no_floor():
    assert calibrated(np.zeros(0, np.float32)) is None
    assert calibrated(np.array([0.3], np.float32)) == pytest.approx(0.3)


def test_hits_below_the_floor_of_their_query_are_gone():
    rng = np.random.default_rng(2)
    hits = search(unit(rng, 3), [(0, unit(rng, 40))], 12)
    floor = np.array([-1.0, 0.4, 2.0], np.float32)
    similarity, index = above(hits, floor)
    for q in range(3):
        near = hits[0][q] >= floor[q]
        assert index[q].tolist() == [*hits[1][q][near].tolist(), *[-1] * int((~near).sum())]
        assert np.isneginf(similarity[q][~near]).all()
        assert (similarity[q][near] == hits[0][q][near]).all()
    assert (index[0] >= 0).all()
    assert (index[2] < 0).all()


def test_a_query_without_near_images_gives_its_share_to_the_others():
    """Three queries, six images each: the first has one image above the floor, the second two, the third all."""
    index = np.arange(18).reshape(3, 6)
    similarity = np.array([[0.9, *[0.2] * 5], [0.9, 0.8, *[0.2] * 4], [0.9, 0.8, 0.8, 0.7, 0.7, 0.6]], np.float32)
    far = in_turn(similarity, index, 9)
    assert np.bincount(far.query).tolist() == [3, 3, 3]
    near = in_turn(*above((similarity, index), np.full(3, 0.5, np.float32)), 9)
    assert np.bincount(near.query).tolist() == [1, 2, 6]
    assert near.missing == 0
    assert near.similarity.min() >= 0.5


def test_more_hits_are_asked_for_where_only_others_have_any():
    """Query 0 has one near image, so that query 1 must look beyond its own share."""
    rng = np.random.default_rng(3)
    gallery = unit(rng, 300)
    queries = np.stack([-gallery[:200].mean(0), gallery[0]]).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    floor = np.array([np.sort(gallery @ queries[0])[-1] - 1e-4, 0.2], np.float32)
    reachable = np.flatnonzero(((gallery @ queries.T) >= floor).any(1))
    k, tried = 4, 0
    while True:
        got = in_turn(*above(search(queries, [(0, gallery)], k), floor), len(reachable))
        tried += 1
        if not got.retry_k:
            break
        assert got.retry_k > k
        k = got.retry_k
    assert tried > 2
    assert sorted(got.gallery.tolist()) == reachable.tolist()
