"""What queries find in a gallery of several shards, and what the teacher says of it without looking again."""

import numpy as np
import pytest
import torch

from ktray.errors import KtrayError
from ktray.models.teacher.adapted import AdaptedTeacher, save_candidate
from ktray.models.teacher.heads import LinearHead
from ktray.models.teacher.load import load_teacher
from ktray.recipe.choice import strategies
from ktray.recipe.registries import STRATEGIES
from ktray.retrieval.index_dir import IndexDir
from ktray.retrieval.strategies.best_first import best_first
from ktray.retrieval.strategies.class_balanced import class_balanced
from ktray.retrieval.strategies.diverse import diverse
from ktray.retrieval.strategies.informative import informative
from ktray.stages.adapt.stage import frozen_predictions
from ktray.stages.base import StageResult
from ktray.stages.index import gallery as gallery_module
from ktray.stages.index.gallery import CANDIDATES, Gallery, agreement, exact, retrieve
from ktray.storage.store import Stage

N, Q, D, SIZE = 90, 4, 16, 12
NAMES = ["query_balanced", "class_balanced", "best_first", "diverse", "informative"]
NONE = np.zeros(0, np.int64)


def unit(rng, n):
    rows = rng.normal(size=(n, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = IndexDir(str(tmp_path_factory.mktemp("index")))
    vectors, queries = unit(rng, N), unit(rng, Q).astype(np.float32)
    named = []
    for number, (first, last) in enumerate(((0, 40), (40, 40), (40, 90))):  # one part is empty
        columns = {"uri": np.array([f"i{i}" for i in range(first, last)], dtype=str)}
        folder.write_part(f"part-{number}", columns, vectors[first:last])
        named.append((f"part-{number}", last - first))
    return Gallery(folder, named), vectors.astype(np.float32), queries


@pytest.fixture(scope="module")
def plan(cluster):
    return cluster


def hits_of(queries, gallery, plan):
    return lambda k: exact(queries, gallery, k, plan)


def predict(embedding):
    """Three classes from the first values; a stand-in with the shapes of the real one."""
    z = np.exp(4 * embedding[:, :3])
    return z / z.sum(1, keepdims=True)


def hits(vectors, queries):
    k = CANDIDATES * (SIZE // Q) + 8
    similarity = queries @ vectors.T
    index = np.argsort(-similarity, axis=1)[:, :k]
    return np.take_along_axis(similarity, index, 1), index


@pytest.mark.parametrize("strategy", ["best_first", "class_balanced", "diverse", "informative"])
def test_a_strategy_over_shards_is_the_strategy_on_all_rows(world, plan, strategy):
    gallery, vectors, queries = world
    similarity, index = hits(vectors, queries)
    probability = predict(vectors)
    ordered = np.sort(probability, axis=1)
    expected = {
        "best_first": lambda: best_first(similarity, index, SIZE),
        "class_balanced": lambda: class_balanced(similarity, index, probability.argmax(1)[index], SIZE),
        "diverse": lambda: diverse(similarity, index, vectors, index, SIZE),
        "informative": lambda: informative(similarity, index, (ordered[:, -1] - ordered[:, -2])[index], SIZE),
    }[strategy]()
    chosen = retrieve(STRATEGIES.get(strategy)(), hits_of(queries, gallery, plan), Q, gallery, SIZE, NONE, predict)
    assert chosen.gallery.tolist() == expected.gallery.tolist()
    assert chosen.query.tolist() == expected.query.tolist()
    assert gallery.take("uri", chosen.gallery) == [f"i{i}" for i in expected.gallery]


@pytest.mark.parametrize("strategy", ["query_balanced", "best_first", "class_balanced", "diverse", "informative"])
def test_asked_for_more_than_there_is_it_takes_all_but_the_excluded(world, plan, strategy):
    gallery, _, queries = world
    banned = np.array([3, 50])
    chosen = retrieve(STRATEGIES.get(strategy)(), hits_of(queries, gallery, plan), Q, gallery, N, banned, predict)
    assert sorted(chosen.gallery.tolist()) == [i for i in range(N) if i not in (3, 50)]
    assert chosen.missing == 2


@pytest.mark.parametrize("strategy", ["best_first", "class_balanced"])
def test_it_searches_on_while_images_are_missing(world, plan, strategy):
    gallery, _, queries = world
    same = np.repeat(queries[:1], Q, axis=0)  # all queries find the same images
    chosen = retrieve(STRATEGIES.get(strategy)(), hits_of(same, gallery, plan), Q, gallery, 80, NONE, predict)
    assert chosen.missing == 0
    assert len(set(chosen.gallery.tolist())) == 80


@pytest.mark.parametrize("rows", [30, 45, 1000])
def test_blocks_in_tasks_find_what_brute_force_finds(world, plan, monkeypatch, rows):
    gallery, vectors, queries = world
    monkeypatch.setattr(gallery_module, "BLOCK_ROWS", rows)
    similarity, index = exact(queries, gallery, 7, plan)
    brute = queries.astype(np.float64) @ vectors.astype(np.float64).T
    assert index.tolist() == np.argsort(-brute, axis=1, kind="stable")[:, :7].tolist()
    assert similarity == pytest.approx(-np.sort(-brute, axis=1)[:, :7], abs=1e-6)


def test_what_repeats_gives_its_place_to_another(world, plan):
    gallery, _, queries = world
    ask = hits_of(queries, gallery, plan)
    before = retrieve(STRATEGIES.get("query_balanced")(), ask, Q, gallery, SIZE, NONE).gallery.tolist()
    banned = set(before[1:3])
    chosen = retrieve(
        STRATEGIES.get("query_balanced")(),
        ask,
        Q,
        gallery,
        SIZE,
        NONE,
        repeats=lambda rows: rows[np.isin(rows, list(banned))],
    )
    assert len(chosen) == SIZE
    assert not banned & set(chosen.gallery.tolist())


@pytest.mark.parametrize("strategy", NAMES)
def test_agreement_says_what_each_strategy_would_take(world, plan, strategy):
    gallery, vectors, queries = world
    banned = np.array([int(np.argmax(vectors @ queries[0]))])
    chosen = retrieve(STRATEGIES.get(strategy)(), hits_of(queries, gallery, plan), Q, gallery, SIZE, banned, predict)
    found = hits(vectors, queries)
    agreed = agreement(chosen, found, gallery, banned, predict)
    assert list(agreed) == NAMES == [config.strategy_name() for config in strategies()]
    assert agreed[strategy].all()
    for other, also in agreed.items():
        theirs = retrieve(STRATEGIES.get(other)(), lambda k: found, Q, gallery, SIZE, banned, predict).gallery.tolist()
        assert also.tolist() == [image in theirs for image in chosen.gallery.tolist()]
    assert list(agreement(chosen, found, gallery, banned, None)) == ["query_balanced", "best_first", "diverse"]


def test_agreement_is_not_asked_of_very_many_candidates(world, plan, monkeypatch):
    gallery, vectors, queries = world
    monkeypatch.setattr(gallery_module, "COMPARED", 10)
    chosen = retrieve(STRATEGIES.get("best_first")(), hits_of(queries, gallery, plan), Q, gallery, SIZE, NONE)
    assert agreement(chosen, hits(vectors, queries), gallery, NONE, predict) == {}


def test_frozen_predictions_are_the_adapted_teachers(tmp_path):
    teacher = load_teacher("miniverse")
    torch.manual_seed(0)
    head = LinearHead(torch.randn(3, teacher.embed_dim), torch.randn(3))
    adapted = AdaptedTeacher(teacher, head, ["a", "b", "c"], temperature=0.7)
    stage = Stage(str(tmp_path))
    save_candidate(stage, "probe", adapted)
    embedding = torch.nn.functional.normalize(torch.randn(5, teacher.embed_dim), dim=1)
    found = frozen_predictions(StageResult(stage, {"frozen": "candidate-probe"}, True))(embedding.numpy())
    assert found == pytest.approx(adapted.logits_of(embedding).softmax(1).detach().numpy(), abs=1e-6)


def test_a_task_without_classes_of_images_has_no_class_to_ask_for(tmp_path):
    with pytest.raises(KtrayError, match="needs a class for each image, and this task kind has no classes of images"):
        frozen_predictions(StageResult(Stage(str(tmp_path)), {"frozen": None}, True))
