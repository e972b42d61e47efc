"""The ranking of images to label equals one that compares every image with every other in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from ktray.retrieval import suggest
from ktray.retrieval.suggest import disagreement, farthest_first, nearest_distance


def probabilities(n: int, seed: int, classes: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), n).astype(np.float32)


def brute_force(
    pool: np.ndarray, labelled: np.ndarray, count: int, differs: list[float], never: set[int]
) -> tuple[list[int], list[float]]:
    """The definition: each next image is the one with the largest weighted distance to everything before it."""
    before = [row.tolist() for row in labelled]
    order: list[int] = []
    distances: list[float] = []
    while len(order) < count and len(order) + len(never) < len(pool):
        scored = []
        for i, row in enumerate(pool.tolist()):
            if i not in order and i not in never:
                distance = min(math.dist(row, other) for other in before)
                scored.append((distance * (1 + differs[i]), -i, distance))
        _, negative, distance = max(scored)
        order.append(-negative)
        distances.append(distance)
        before.append(pool[-negative].tolist())
    return order, distances


@pytest.mark.parametrize("at_once", [16_000_000, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_order_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch, weighted: bool, at_once: int) -> None:
    monkeypatch.setattr(suggest, "_VALUES_AT_ONCE", at_once)
    orders = []
    for seed in range(5):
        pool, labelled = probabilities(40, seed), probabilities(6, 100 + seed)
        differs = np.random.default_rng(seed).random(40) if weighted else None
        found = farthest_first(pool, labelled, 12, differs)
        plain = [0.0] * 40 if differs is None else differs.tolist()
        order, distances = brute_force(pool, labelled, 12, plain, set())
        assert found.rows.tolist() == order
        assert found.distance == pytest.approx(distances, abs=1e-6)
        assert found.repeated == 0
        orders.append(order)
    assert len({tuple(order) for order in orders}) == 5


def test_disagreement_changes_the_order() -> None:
    pool, labelled = probabilities(40, 0), probabilities(6, 100)
    differs = np.random.default_rng(0).random(40)
    assert farthest_first(pool, labelled, 12).rows.tolist() != farthest_first(pool, labelled, 12, differs).rows.tolist()


def test_of_two_equal_images_the_one_with_more_disagreement_is_first() -> None:
    pool = np.array([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    found = farthest_first(pool, np.array([[1.0, 0.0]]), 3, np.array([0.1, 0.2, 1.0]))
    assert found.rows.tolist() == [1, 0, 2]
    assert found.distance == pytest.approx([math.sqrt(0.5), 0.0, 0.0])


def test_what_shows_the_same_is_passed_over_and_covers_nothing() -> None:
    pool, labelled = probabilities(40, 3), probabilities(6, 4)
    free = farthest_first(pool, labelled, 12).rows.tolist()
    never = {free[1], free[4]}
    found = farthest_first(pool, labelled, 12, repeats=lambda row: row in never)
    assert found.rows.tolist() == brute_force(pool, labelled, 12, [0.0] * 40, never)[0]
    assert found.repeated == 2


def test_a_small_pool_is_suggested_as_a_whole() -> None:
    pool = probabilities(4, 5)
    found = farthest_first(pool, probabilities(2, 6), 9)
    assert sorted(found.rows.tolist()) == [0, 1, 2, 3]
    assert len(farthest_first(pool, pool, 9, repeats=lambda row: True).rows) == 0


def test_distances_are_those_of_the_nearest() -> None:
    points, others = probabilities(30, 7), probabilities(8, 8)
    expected = [min(math.dist(p, o) for o in others.tolist()) for p in points.tolist()]
    assert nearest_distance(points, others) == pytest.approx(expected, abs=1e-6)
    assert nearest_distance(points, points) == pytest.approx(np.zeros(30), abs=1e-6)


def test_disagreement_is_the_divergence_of_scipy() -> None:
    teacher, student = probabilities(50, 9), probabilities(50, 10)
    teacher[0], student[0] = [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]
    teacher[1] = student[1]
    found = disagreement(teacher, student)
    # scipy gives the square root of the divergence.
    expected = [
        jensenshannon(p, q, base=2) ** 2 for p, q in zip(teacher.astype(float), student.astype(float), strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[:2].tolist() == [1.0, 0.0]
    assert disagreement(student, teacher) == pytest.approx(found)
