"""IVF-PQ: what it reports is what it finds, it grows and goes on, and nothing half-written loads."""

import numpy as np
import pytest
from heard import heard

from ktray.errors import KtrayError
from ktray.retrieval import faiss_index
from ktray.retrieval.search import search as exact_search

D, CELLS = 32, 16


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, D))
    rows = centres[rng.integers(0, 40, 6000)] + 0.4 * rng.normal(size=(6000, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def made(home, vectors, sizes, factory=f"IVF{CELLS},PQ8x4", said=None):
    edges = np.concatenate([[0], np.cumsum(sizes)])
    read = []

    def block(number):
        read.append(number)
        return vectors[edges[number] : edges[number + 1]]

    blocks = [(f"b{i}-{size}", size) for i, size in enumerate(sizes)]
    index, trained_on = heard(
        (said if said is not None else []),
        faiss_index.build,
        home,
        blocks,
        block,
        lambda n: vectors[: min(n, 5000)],
        factory,
    )
    return index, trained_on, read


def exactly(vectors):
    return lambda rows: vectors[rows].astype(np.float32)


def truth(vectors, queries):
    return lambda k: exact_search(queries, [(0, vectors)], k)


def test_the_recall_that_it_reports_is_what_it_finds(tmp_path, vectors):
    index, trained_on, _ = made(tmp_path, vectors, [2500, 2500, 1000])
    assert index.ntotal == 6000
    assert trained_on == 5000
    queries = vectors[::30].astype(np.float32)
    probes, recall = faiss_index.measured(index, queries, truth(vectors, queries), exactly(vectors), 0.75)
    assert recall["100"] >= 0.75
    assert probes < CELLS
    similarity, found = faiss_index.search(index, queries, 100, probes, exactly(vectors))
    brute = queries.astype(np.float64) @ vectors.astype(np.float64).T
    true = np.argsort(-brute, axis=1)[:, :100]
    hit = np.mean([len(set(f) & set(t)) / 100 for f, t in zip(found.tolist(), true.tolist(), strict=True)])
    assert hit == pytest.approx(recall["100"], abs=1e-9)
    # What is found carries its exact similarity, in order.
    assert similarity == pytest.approx(np.take_along_axis(brute, found, 1), abs=1e-6)
    assert (np.diff(similarity, axis=1) <= 0).all()


def test_more_cells_find_more_and_all_cells_miss_only_what_the_codes_hide(tmp_path, vectors):
    index, _, _ = made(tmp_path, vectors, [6000])
    queries = vectors[::60].astype(np.float32)
    few = faiss_index.measured(index, queries, truth(vectors, queries), exactly(vectors), 0.01)
    all_ = faiss_index.measured(index, queries, truth(vectors, queries), exactly(vectors), 1.1)
    assert few[0] == 1
    assert all_[0] == CELLS
    assert all_[1]["100"] >= few[1]["100"]


def test_a_gallery_that_grows_codes_its_new_blocks_with_the_same_cells(tmp_path, vectors):
    said = []
    _, _, first = made(tmp_path, vectors, [2000, 2000], said=said)
    index, _, second = made(tmp_path, vectors, [2000, 2000, 2000], said=said)
    assert first == [0, 1]
    assert second == [2]
    assert index.ntotal == 6000
    assert len(said) == 1
    found = faiss_index.search(index, vectors[5000:5001].astype(np.float32), 1, CELLS, exactly(vectors))[1]
    assert found.tolist() == [[5000]]


def test_one_that_outgrew_its_cells_is_trained_anew(tmp_path, vectors):
    said = []
    made(tmp_path, vectors, [1000], said=said)
    _, _, read = made(tmp_path, vectors, [1000, 3500], said=said)
    assert len(said) == 2
    assert read == [0, 1]


def test_killed_between_two_blocks_it_goes_on(tmp_path, vectors):
    def killed(number):
        if number == 1:
            raise KeyboardInterrupt
        return vectors[:3000]

    blocks = [("b0-3000", 3000), ("b1-3000", 3000)]
    with pytest.raises(KeyboardInterrupt):
        heard([], faiss_index.build, tmp_path, blocks, killed, lambda n: vectors[:5000], f"IVF{CELLS},PQ8x4")
    assert faiss_index.saved(tmp_path) is None
    with pytest.raises(KtrayError, match="cannot be read"):
        faiss_index.load(tmp_path)
    index, _, read = made(tmp_path, vectors, [3000, 3000], factory=f"IVF{CELLS},PQ8x4")
    assert read == [1]
    assert index.ntotal == 6000


@pytest.mark.parametrize(
    ("rows", "dimensions", "gb", "factory"),
    [
        (1_000_000, 512, 1.0, "OPQ64,IVF4096_HNSW32,PQ64"),
        (1_000_000, 512, 0.03, "OPQ16,IVF4096_HNSW32,PQ16"),
        (1_280_000_000, 768, 80.0, "OPQ48,IVF131072_HNSW32,PQ48"),
        (5_000, 128, 1.0, "OPQ64,IVF128,PQ64"),
    ],
)
def test_the_factory_follows_rows_and_memory(rows, dimensions, gb, factory):
    assert faiss_index.choose_factory(rows, dimensions, gb * 1e9) == factory


def test_too_little_memory_is_said():
    with pytest.raises(KtrayError, match=r"do not fit into 0\.01 GB.*search_gb"):
        faiss_index.choose_factory(1_000_000, 512, 1e7)


def test_what_is_saved_is_read_back(tmp_path):
    made_ = faiss_index.Compressed("IVF16,PQ8", 10, 10, 4, {"10": 0.9}, "k")
    faiss_index.save(tmp_path, made_)
    assert faiss_index.saved(tmp_path) == made_
