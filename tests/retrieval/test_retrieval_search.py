"""Search against brute force: any block size, ties, short galleries."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ktray.errors import KtrayError
from ktray.retrieval.search import search


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    order = np.array([sorted(range(len(gallery)), key=lambda i: (-row[i], i))[:k] for row in scores])
    return np.take_along_axis(scores, order, 1), order


def unit(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    x = rng.normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def blocks(gallery: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    return [(i, gallery[i : i + size]) for i in range(0, len(gallery), size)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_search_equals_brute_force_for_every_block_size(dtype: type, size: int) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = unit(rng, 23, 48), unit(rng, 311, 48).astype(dtype)
    similarity, index = search(queries, blocks(gallery, size), 10)
    expected_similarity, expected_index = brute_force(queries, gallery, 10)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(similarity, expected_similarity)
    assert similarity.dtype == np.float32
    assert index.dtype == np.int64


@pytest.mark.parametrize("size", [3, 50, 400])
def test_ties_go_to_the_lower_index_even_when_there_are_more_than_fit(size: int) -> None:
    # Every image is in the gallery 40 times, as on the web; FAISS alone would return any of the copies.
    rng = np.random.default_rng(1)
    originals = unit(rng, 10, 16)
    gallery = originals[rng.permutation(np.arange(400) % 10)]
    queries = np.concatenate([originals[:4], unit(rng, 4, 16)])
    similarity, index = search(queries, blocks(gallery, size), 45)
    expected_similarity, expected_index = brute_force(queries, gallery, 45)
    np.testing.assert_array_equal(index, expected_index)
    np.testing.assert_array_equal(similarity, expected_similarity)


def test_order_of_blocks_and_length_of_vectors_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    queries, gallery = 100 * rng.normal(size=(5, 8)), rng.normal(size=(200, 8)).astype(np.float32)
    gallery[100:150] = gallery[:50]
    queries = queries.astype(np.float32)
    _, index = search(queries, reversed(blocks(gallery, 33)), 12)
    np.testing.assert_array_equal(index, brute_force(queries, gallery, 12)[1])


def test_a_gallery_smaller_than_k_is_padded() -> None:
    rng = np.random.default_rng(3)
    queries, gallery = unit(rng, 4, 6), unit(rng, 5, 6)
    similarity, index = search(queries, [*blocks(gallery, 2), (5, gallery[:0])], 8)
    assert [sorted(row) for row in index[:, :5]] == [[0, 1, 2, 3, 4]] * 4
    assert (index[:, 5:] == -1).all()
    assert np.isneginf(similarity[:, 5:]).all()
    similarity, index = search(queries, [], 2)
    assert (index == -1).all()
    assert search(queries[:0], blocks(gallery, 2), 3)[1].shape == (0, 3)


def test_what_cannot_be_searched_is_refused() -> None:
    x = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(ValueError, match="at 7 have shape"):
        search(x, [(7, np.ones((2, 4), dtype=np.float32))], 1)
    with pytest.raises(ValueError, match="at 0 contain values that are not finite"):
        search(x, [(0, np.full((2, 3), np.nan, dtype=np.float16))], 1)
    with pytest.raises(ValueError, match="k is 0"):
        search(x, [(0, x)], 0)


def test_missing_faiss_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    x = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(KtrayError, match="Install faiss-cpu"):
        search(x, [(0, x)], 1)
