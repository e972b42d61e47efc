"""Products in pieces, as on a GPU, against NumPy."""

import numpy as np
import pytest
import torch

from ktray.retrieval import products as module
from ktray.retrieval.products import above, exact, nearest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VALUES", 400)


def vectors(count: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, 16)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def test_the_nearest_rows_are_found_in_pieces() -> None:
    queries, block = vectors(37, 0), vectors(90, 1)
    values, rows = nearest(queries, block, 5, CPU)
    every = queries @ block.T
    order = np.argsort(-every, axis=1)[:, :5]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(values, np.take_along_axis(every, order, 1), rtol=1e-6)
    assert nearest(queries[:0], block, 5, CPU)[0].shape == (0, 5)


def test_exact_products_are_those_of_double_precision() -> None:
    queries, block = vectors(11, 2), vectors(50, 3)
    rows = np.random.default_rng(4).integers(0, 50, (11, 7))
    expected = np.einsum("qrd,qd->qr", block[rows].astype(np.float64), queries.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(exact(queries, block, rows, CPU), expected)


def test_all_pairs_above_a_threshold_are_found_in_order() -> None:
    first, second = vectors(60, 5), vectors(33, 6)
    i, j, values = above(first, second, 0.3, CPU)
    every = first @ second.T
    expected = np.nonzero(every >= 0.3)
    np.testing.assert_array_equal(i, expected[0])
    np.testing.assert_array_equal(j, expected[1])
    np.testing.assert_allclose(values, every[expected], rtol=1e-6)
    assert [len(part) for part in above(first[:0], second, 0.3, CPU)] == [0, 0, 0]
