"""Query-balanced selection against a slow reference that follows the definition."""

from __future__ import annotations

import numpy as np
import pytest

from ktray.retrieval.search import search
from ktray.retrieval.select import random_selection
from ktray.retrieval.strategies.base import in_turn


def reference(index: np.ndarray, size: int, exclude: set[int]) -> list[tuple[int, int, int]]:
    """Round by round, each query scans its hits from the nearest for one that nobody has."""
    taken: list[tuple[int, int, int]] = []
    while len(taken) < size:
        before = len(taken)
        for q in range(len(index)):
            used = {g for g, _, _ in taken} | exclude
            free = [(int(g), q, r) for r, g in enumerate(index[q]) if g >= 0 and int(g) not in used]
            if free and len(taken) < size:
                taken.append(free[0])
        if len(taken) == before:
            break
    return taken


def hits(rng: np.random.Generator, queries: int, gallery: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    score = rng.normal(size=(queries, gallery)) + rng.normal(size=gallery)
    index = np.argsort(-score, axis=1)[:, :k].astype(np.int64)
    return np.take_along_axis(score, index, 1).astype(np.float32), index


@pytest.mark.parametrize("seed", range(25))
def test_agrees_with_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, gallery = int(rng.integers(1, 9)), int(rng.integers(1, 60))
    k, size = int(rng.integers(1, gallery + 1)), int(rng.integers(0, 70))
    similarity, index = hits(rng, queries, gallery, k)
    exclude = {int(i) for i in rng.integers(0, gallery, size=int(rng.integers(0, 6)))}
    got = in_turn(similarity, index, size, exclude=exclude)
    expected = reference(index, size, exclude)
    columns = zip(got.gallery.tolist(), got.query.tolist(), got.rank.tolist(), strict=True)
    assert list(columns) == expected
    assert got.similarity.tolist() == [similarity[q, r] for _, q, r in expected]
    assert len(set(got.gallery.tolist())) == len(got) == size - got.missing
    assert not set(got.gallery.tolist()) & exclude
    array = in_turn(similarity, index, size, exclude=np.array(sorted(exclude), dtype=np.int64))
    np.testing.assert_array_equal(array.gallery, got.gallery)


def test_arithmetic_of_the_released_lists() -> None:
    # 1,200 queries that count themselves among their 128: the official list has 152,400 retrieved images.
    queries, quota = 1200, 128 - 1
    similarity = np.linspace(1, 0, 400, dtype=np.float32)[None].repeat(queries, 0)
    index = (np.arange(queries)[:, None] * 160 + np.arange(400)) % (queries * 160)  # neighbours share hits
    got = in_turn(similarity, index, queries * quota)
    assert len(got) == 152_400
    assert (np.bincount(got.query) == 127).all()
    assert (got.missing, got.shortfall, got.retry_k) == (0, 0, 0)


def test_first_queries_have_one_more_and_a_smaller_size_is_a_prefix() -> None:
    similarity, index = hits(np.random.default_rng(0), 5, 100, 60)
    got = in_turn(similarity, index, 23)
    assert np.bincount(got.query).tolist() == [5, 5, 5, 4, 4]
    smaller = in_turn(similarity, index, 11)
    np.testing.assert_array_equal(smaller.gallery, got.gallery[:11])


def test_hits_that_were_not_needed_change_nothing() -> None:
    similarity, index = hits(np.random.default_rng(1), 6, 200, 200)
    few, all_ = in_turn(similarity[:, :60], index[:, :60], 48), in_turn(similarity, index, 48)
    assert few.shortfall == 0
    np.testing.assert_array_equal(few.gallery, all_.gallery)


def test_a_query_without_hits_left_passes_its_share_on_and_says_so() -> None:
    # Both queries want the same three images first; the second has nothing else.
    index = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1]])
    similarity = np.where(index >= 0, 1 - index / 10, -np.inf).astype(np.float32)
    got = in_turn(similarity, index, 6)
    assert got.gallery.tolist() == [0, 1, 2, 3, 4, 5]
    assert got.query.tolist() == [0, 1, 0, 0, 0, 0]
    assert got.rank.tolist() == [0, 1, 2, 3, 4, 5]
    # The second query has seen the whole gallery (its row is padded), so no larger k is asked for.
    assert (got.missing, got.shortfall, got.retry_k) == (0, 2, 0)


def test_searching_again_with_retry_k_ends_without_shortfall() -> None:
    rng = np.random.default_rng(2)
    gallery = rng.normal(size=(500, 8)).astype(np.float32)
    queries = (rng.normal(size=8) + 0.2 * rng.normal(size=(10, 8))).astype(np.float32)  # all alike: fierce rivals
    exclude = search(queries, [(0, gallery)], 4)[1][0]
    k, tried = 20, []
    while True:
        got = in_turn(*search(queries, [(0, gallery)], k), 200, exclude=exclude)
        tried.append(k)
        if not got.retry_k:
            break
        assert got.shortfall > 0
        assert got.retry_k > k
        k = got.retry_k
    assert len(tried) > 1
    assert (len(got), got.missing, got.shortfall) == (200, 0, 0)
    assert (np.bincount(got.query) == 20).all()


def test_a_gallery_that_is_too_small_is_taken_whole() -> None:
    similarity, index = hits(np.random.default_rng(3), 3, 20, 20)
    got = in_turn(similarity, index, 30, exclude={4})
    assert sorted(got.gallery.tolist()) == [i for i in range(20) if i != 4]
    assert got.missing == 11


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="both must be"):
        in_turn(np.zeros((2, 3), np.float32), np.zeros((2, 4), np.int64), 1)
    with pytest.raises(ValueError, match="size is -1"):
        in_turn(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64), -1)


def test_random_selection() -> None:
    got = random_selection(50, 20, seed=3, exclude=[1, 2, 3])
    assert len(set(got.gallery.tolist())) == 20
    assert not {1, 2, 3} & set(got.gallery.tolist())
    assert got.gallery.max() < 50
    np.testing.assert_array_equal(random_selection(50, 7, seed=3, exclude=[1, 2, 3]).gallery, got.gallery[:7])
    assert random_selection(50, 20, seed=4).gallery.tolist() != got.gallery.tolist()
    assert (got.query == -1).all()
    assert np.isnan(got.similarity).all()
    assert random_selection(10, 20, seed=0, exclude={5}).missing == 11
    counts = np.bincount(np.concatenate([random_selection(10, 5, seed=s).gallery for s in range(400)]))
    assert np.abs(counts - 200).max() < 50  # five standard deviations of a binomial(400, 1/2)
