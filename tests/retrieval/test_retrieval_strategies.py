"""Each strategy against a plain, slow statement of what it is to take."""

import numpy as np
import pytest

from ktray.retrieval.search import search
from ktray.retrieval.strategies.base import in_turn
from ktray.retrieval.strategies.best_first import best_first
from ktray.retrieval.strategies.class_balanced import class_balanced
from ktray.retrieval.strategies.diverse import diverse, farthest_points
from ktray.retrieval.strategies.informative import informative

Q, N, K, D = 5, 60, 24, 8


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(N, D)), rng.normal(size=(Q, D))
    gallery = (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    similarity, index = search(queries, iter([(0, gallery)]), K)
    return gallery, queries, similarity, index


def check(chosen, similarity, index, size):
    assert len(chosen) == size
    assert chosen.missing == 0
    assert len(set(chosen.gallery.tolist())) == size
    # Every image is the hit that its query and rank say, whatever the strategy did with the order.
    assert (index[chosen.query, chosen.rank] == chosen.gallery).all()
    assert chosen.similarity == pytest.approx(similarity[chosen.query, chosen.rank])


def test_shares_set_how_often_a_query_has_its_turn(given):
    _, _, similarity, index = given
    share = np.array([1.0, 2.0, 0.5, 1.0, 0.5])
    chosen = in_turn(similarity, index, 20, share=share)
    check(chosen, similarity, index, 20)
    assert np.bincount(chosen.query).tolist() == [4, 8, 2, 4, 2]
    # By hand: the j-th turn of a query is at the time j / share; the first query wins a tie.
    turns = sorted((j / s, q) for q, s in enumerate(share.tolist()) for j in range(1, 21))[:20]
    assert chosen.query.tolist() == [q for _, q in turns]
    small = in_turn(similarity, index, 7, share=share)
    assert small.gallery.tolist() == chosen.gallery[:7].tolist()
    even = in_turn(similarity, index, 20, share=np.full(5, 3.0))
    assert even.gallery.tolist() == in_turn(similarity, index, 20).gallery.tolist()
    assert chosen.shortfall == 0
    # A query without hits leaves its share to the others, which is reported.
    starved = np.where(np.arange(5)[:, None] == 1, -1, index)
    less = in_turn(similarity, starved, 20, share=share)
    assert len(less) == 20
    assert less.shortfall == 8


def test_best_first_is_the_top_of_all_hits(given):
    gallery, queries, similarity, index = given
    nearest = (gallery @ queries.T).max(1)
    seen = np.unique(index)
    for size in (1, 7, 20):
        chosen = best_first(similarity, index, size, exclude=[int(nearest.argmax())])
        check(chosen, similarity, index, size)
        allowed = [i for i in seen.tolist() if i != nearest.argmax()]
        expected = sorted(allowed, key=lambda i: -nearest[i])[:size]
        assert chosen.gallery.tolist() == expected
        assert (np.diff(chosen.similarity) <= 1e-7).all()


def test_best_first_may_starve_a_query(given):
    _, _, similarity, index = given
    shifted = similarity - np.arange(Q, dtype=np.float32)[:, None] * 10
    assert set(best_first(shifted, index, K).query.tolist()) == {0}


def test_classes_have_equal_shares_of_their_most_similar(given):
    gallery, queries, similarity, index = given
    predicted = np.arange(N) % 3
    chosen = class_balanced(similarity, index, predicted[index], 12)
    check(chosen, similarity, index, 12)
    assert np.bincount(predicted[chosen.gallery]).tolist() == [4, 4, 4]
    nearest = (gallery @ queries.T).max(1)
    for one in range(3):
        own = [i for i in np.unique(index).tolist() if predicted[i] == one]
        expected = sorted(own, key=lambda i: -nearest[i])[:4]
        assert chosen.gallery[predicted[chosen.gallery] == one].tolist() == expected


def test_a_rare_class_gives_all_it_has_and_others_fill_up(given):
    _, _, similarity, index = given
    predicted = np.zeros(N, np.int64)
    rare = np.unique(index)[:2]
    predicted[rare] = 1
    chosen = class_balanced(similarity, index, predicted[index], 12)
    assert np.bincount(predicted[chosen.gallery]).tolist() == [10, 2]
    assert chosen.missing == 0


def test_diverse_keeps_the_shares_and_takes_farthest_points(given):
    gallery, _, similarity, index = given
    rows = index  # the gallery is its own table of candidates
    chosen = diverse(similarity, index, gallery, rows, 20)
    check(chosen, similarity, index, 20)
    assert np.bincount(chosen.query, minlength=Q).tolist() == [4] * Q
    alone = diverse(similarity[:1], index[:1], gallery, rows[:1], 6)
    taken = [int(index[0, 0])]
    while len(taken) < 6:
        rest = [int(i) for i in index[0] if i not in taken]
        taken.append(min(rest, key=lambda i: max(float(gallery[i] @ gallery[t]) for t in taken)))
    assert alone.gallery.tolist() == taken
    assert alone.rank[0] == 0

    def spread(selection):
        own = gallery[selection.gallery[selection.query == 0]]
        return (own @ own.T)[np.triu_indices(len(own), 1)].max()

    assert spread(chosen) < spread(in_turn(similarity, index, 20))


def test_farthest_points_of_a_line():
    angle = np.radians([0, 10, 90, 50, 45])
    found = farthest_points(np.stack([np.cos(angle), np.sin(angle)], 1))
    assert found.tolist() == [0, 2, 4, 1, 3]


def test_informative_takes_the_least_decided_of_each_query(given):
    _, _, similarity, index = given
    margin = np.random.default_rng(1).random(N)
    chosen = informative(similarity, index, margin[index], 10)
    check(chosen, similarity, index, 10)
    assert np.bincount(chosen.query, minlength=Q).tolist() == [2] * Q
    alone = informative(similarity[:1], index[:1], margin[index[:1]], 5)
    assert alone.gallery.tolist() == sorted(index[0].tolist(), key=lambda i: margin[i])[:5]
    assert informative(similarity, index, np.ones((Q, K)), 10).gallery.tolist() == (
        in_turn(similarity, index, 10).gallery.tolist()
    )


@pytest.mark.parametrize("strategy", ["best_first", "class_balanced", "diverse", "informative"])
def test_hits_that_run_out_are_told(given, strategy):
    gallery, _, similarity, index = given
    short = index[:, :3].copy()
    alike = similarity[:, :3]
    chosen = {
        "best_first": lambda: best_first(alike, short, 40),
        "class_balanced": lambda: class_balanced(alike, short, np.zeros_like(short), 40),
        "diverse": lambda: diverse(alike, short, gallery, short, 40),
        "informative": lambda: informative(alike, short, np.zeros(short.shape), 40),
    }[strategy]()
    assert len(chosen) == len(np.unique(short))
    assert chosen.missing == 40 - len(chosen)
    assert chosen.retry_k > 3
    short[:, 2] = -1  # the whole gallery was seen
    ended = best_first(alike, short, 40) if strategy == "best_first" else None
    assert ended is None or ended.retry_k == 0
