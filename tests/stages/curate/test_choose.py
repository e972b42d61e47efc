"""The choice above a floor, and the figures about it, against plain sums over a small gallery."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from heard import heard

from ktray.data.fingerprints import Fingerprints
from ktray.distributed.allocation import allocate
from ktray.errors import KtrayError
from ktray.recipe.schema import TransferConfig
from ktray.retrieval import set_duplicates
from ktray.retrieval.index_dir import IndexDir
from ktray.retrieval.search import search
from ktray.retrieval.set_duplicates import SetDuplicates
from ktray.stages.curate import choose as module
from ktray.stages.curate.choose import floors, retrieved
from ktray.stages.curate.judge import Judge
from ktray.stages.curate.queries import Queries
from ktray.stages.index.gallery import Gallery

N, D, CLASSES, PER = 240, 8, 3, 4
NONE = np.zeros(0, np.int64)
PLAN = allocate(2, 0, 1, 1, False)
REPORTER = SimpleNamespace(meter=SimpleNamespace(add=lambda flops: None), runtime=SimpleNamespace(plan=PLAN))


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A gallery of which the first 60 images are near three centres, 20 each, and the others anywhere; 12 queries."""
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(size=(CLASSES, D)))
    near = centres.repeat(20, 0) + 0.25 * rng.normal(size=(60, D))
    vectors = unit(np.concatenate([near, rng.normal(size=(N - 60, D))])).astype(np.float16)
    folder = IndexDir(str(tmp_path_factory.mktemp("index")))
    prints = {name: np.arange(N, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) for name in ("hash", "digest")}
    folder.write_part("part-0", {"uri": np.array([f"i{i}" for i in range(N)], dtype=str), **prints}, vectors)
    queries = unit(centres.repeat(PER, 0) + 0.25 * rng.normal(size=(CLASSES * PER, D)))
    labels = np.arange(CLASSES).repeat(PER)
    floor = np.full(len(queries), 0.6, np.float32)
    asked = Queries(queries, [f"q{i}" for i in range(len(queries))], labels, np.arange(len(queries)), floor)

    def predict(embedding):
        z = np.exp(8 * embedding @ centres.T)
        return z / z.sum(1, keepdims=True)

    return Gallery(folder, [("part-0", N)]), vectors.astype(np.float32), asked, predict


def choose(world, lines=None, **keys):
    gallery, vectors, asked, predict = world
    part = TransferConfig(source="retrieved", **{"size": 60, "repeat_similarity": None, **keys})

    def nearest(queries, k):
        return search(queries, [(0, vectors)], k)

    return heard(
        [] if lines is None else lines, retrieved, part, gallery, asked, nearest, NONE, predict, True, REPORTER
    )


@pytest.mark.parametrize("strategy", ["query_balanced", "best_first", "class_balanced", "diverse", "informative"])
def test_no_image_is_below_the_floor_and_all_above_it_are_found(world, strategy):
    _, vectors, asked, _ = world
    similarity = vectors @ asked.embedding.T
    reachable = np.flatnonzero((similarity >= 0.6).any(1))
    assert 20 < len(reachable) < 200
    made = choose(world, strategy=strategy, min_similarity="auto", size=200)
    assert sorted(made.selection.gallery.tolist()) == reachable.tolist()
    assert made.selection.missing == 200 - len(reachable)
    assert made.selection.similarity.min() >= 0.6
    picked = similarity[made.selection.gallery, made.selection.query]
    assert made.selection.similarity == pytest.approx(picked, abs=1e-5)


def test_the_figures_say_what_the_floor_leaves_out(world):
    lines: list[str] = []
    plain, floored = choose(world, size=150), choose(world, lines, size=150, min_similarity="auto")
    assert plain.on_task["applied"] is False
    assert floored.on_task["applied"] is True
    below = int((plain.selection.similarity < 0.6).sum())
    assert below > 0
    assert plain.on_task["below"] == floored.on_task["below"] == below
    assert plain.on_task["floor"] == floored.on_task["floor"] == [0.6]
    # Both curves are those of the set without a floor.
    curve = plain.on_task["curve"]
    assert curve == floored.on_task["curve"]
    descending = np.sort(plain.selection.similarity)[::-1]
    assert curve["rank"][-1] == 150
    assert curve["similarity"] == pytest.approx(descending[np.array(curve["rank"]) - 1].tolist())
    assert any(f"{below:,} of the 150 nearest images are below it and left out" in line for line in lines)


def test_the_share_that_agrees_is_that_of_the_predictions(world):
    _, vectors, asked, predict = world
    made = choose(world)
    order = np.argsort(-made.selection.similarity, kind="stable")
    predicted = predict(vectors[made.selection.gallery[order]]).argmax(1)
    expected = predicted == asked.labels[made.selection.query[order]]
    assert made.on_task["curve"]["agree"] == expected.astype(float).tolist()


def test_a_random_draw_of_the_same_size_is_the_last_of_the_sets(world):
    gallery, vectors, asked, predict = world
    made = choose(world, strategy="best_first")
    sets = {row["name"]: row for row in made.on_task["sets"]}
    names = ["best_first", "query_balanced", "class_balanced", "diverse", "informative", "random"]
    assert list(sets) == names
    assert {row["images"] for row in sets.values()} == {60}
    assert sets["best_first"]["shared"] == 1
    assert sets["random"]["near"] < 0.6 * sets["best_first"]["near"]
    # The figures of any set are those of the nearest queries of its images.
    rows = np.arange(50, 90)
    nearest = (vectors[rows] @ asked.embedding.T).max(1)
    found = Judge(gallery, asked, predict).by_nearest(rows).figures("x", None)
    assert found["similarity"] == pytest.approx(np.median(nearest), abs=1e-5)
    assert found["near"] == pytest.approx((nearest >= 0.6).mean())
    query = (vectors[rows] @ asked.embedding.T).argmax(1)
    assert found["agree"] == pytest.approx((predict(vectors[rows]).argmax(1) == asked.labels[query]).mean())


def test_a_number_is_the_floor_of_all_queries(world):
    made = choose(world, min_similarity=0.8, size=200)
    assert made.on_task["floor"] == [pytest.approx(0.8)]
    assert made.selection.similarity.min() >= 0.8


def test_a_floor_that_nothing_reaches_says_what_to_change(world):
    with pytest.raises(
        KtrayError, match=r"transfer\.min_similarity=1\.000.*highest similarity to a query is 0\.\d+"
    ) as e:
        choose(world, min_similarity=1.0)
    assert "Lower transfer.min_similarity" in e.value.remedy


def test_labels_that_give_no_floor_are_told(world):
    asked = world[2]
    bare = Queries.of(asked.embedding, asked.uris, asked.labels)
    assert floors(TransferConfig(), bare) is None
    with pytest.raises(KtrayError, match="no class has two of them"):
        floors(TransferConfig(min_similarity="auto"), bare)
    made = choose((world[0], world[1], bare, world[3]))
    assert (made.on_task["floor"], made.on_task["below"], made.on_task["applied"]) == ([], 0, False)
    assert made.on_task["sets"][0]["near"] is None


def test_queries_of_two_kinds_have_two_floors(world):
    gallery, vectors, asked, predict = world
    texts = Queries(
        asked.embedding[::PER], ["t0", "t1", "t2"], np.arange(3), np.full(3, -1), np.full(3, 0.9, np.float32)
    )
    both = Queries.joined([asked, texts])
    made = choose((gallery, vectors, both, predict), min_similarity="auto", size=200)
    assert made.on_task["floor"] == pytest.approx([0.6, 0.9])
    limit = np.where(made.selection.query < len(asked), 0.6, 0.9)
    assert (made.selection.similarity >= limit - 1e-6).all()


def test_repeats_are_found_in_tasks_as_in_this_process(cluster, monkeypatch):
    """Sixty images with copies and near copies, in spans of a few rows each, of which tasks find the pairs."""
    rng = np.random.default_rng(4)
    vectors = unit(rng.normal(size=(60, D)))
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    for copy, of in ((9, 2), (30, 2), (31, 30), (44, 43), (59, 0)):
        vectors[copy], hashes[copy] = unit(vectors[of : of + 1] + 0.02), hashes[of] ^ np.uint64(copy % 4)
    digests = np.arange(60, dtype=np.uint64)
    digests[50] = digests[10]
    hashes[50] = hashes[10]

    def found(**more):
        made = SetDuplicates(
            lambda rows: (vectors[rows], Fingerprints(hashes[rows], digests[rows])), similarity=0.9, **more
        )
        return [made(np.arange(20)).tolist(), made(np.arange(60)).tolist(), made.repeats]

    here = found()
    assert here[0] == [9]
    assert set(here[1]) == {9, 30, 31, 44, 50, 59}
    monkeypatch.setattr(set_duplicates, "_VALUES_OF_A_SPAN", 200)
    assert len(set_duplicates._spans(0, 60)) > 5
    assert found() == here
    assert found(find_pairs=partial(module._pairs_in_tasks, plan=cluster)) == here
