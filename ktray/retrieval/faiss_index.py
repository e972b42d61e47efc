"""Compressed search, for galleries too large to be searched row by row: IVF-PQ in FAISS, mapped into memory.

Vectors are grouped in cells and coded in a few bytes each; a query looks into the nearest cells only. What it finds is
scored again with the exact embeddings. How much of the true nearest is found is measured on a sample against exact
search, and stands in ``search.json`` beside the index.

Trained on a bounded sample, filled block by block (a file each, so that a killed job goes on and a gallery that grows
codes its new blocks alone), merged into one file of inverted lists.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktray.errors import KtrayError
from ktray.retrieval.search import Hits, top

logger = logging.getLogger("ktray")

# Bytes of a code that are tried, most first.
CODES = (64, 48, 32, 24, 16, 8)
ID_BYTES = 8
# Vectors a cell that k-means is trained on: FAISS warns below 39 and takes no more than 256.
TRAIN_A_CELL = 64
TRAIN_BYTES = 1_000_000_000
# Times that a gallery may outgrow what its cells were chosen for.
RETRAIN = 4
# Candidates that are scored again, for each hit that is wanted.
AGAIN = 4
SAMPLE = 200
RECALL_AT = (10, 100)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Compressed:
    """A finished index.

    Attributes:
        factory: FAISS's string.
        rows, trained_on: vectors in it, and in the sample.
        probes: cells that a query looks into.
        recall: share of the true k nearest that are found after the exact scores, by k, on `SAMPLE` gallery vectors.
        key: of the blocks.
    """

    factory: str
    rows: int
    trained_on: int
    probes: int
    recall: dict[str, float]
    key: str


def choose_factory(rows: int, dimensions: int, memory_bytes: float) -> str:
    """FAISS's factory string for ``rows`` vectors whose codes and ids fit into ``memory_bytes``.

    Cells: the power of two next to 4 sqrt(rows), at most 2^20 and so few that each has 39 vectors to train on; from
    4,096 on they are found by an HNSW graph. Code: the most bytes of `CODES` that fit, after an OPQ rotation.

    Raises:
        KtrayError: even the shortest code does not fit.
    """
    cells = min(2 ** round(math.log2(4 * math.sqrt(rows))), 2**20, 2 ** max(0, int(math.log2(max(1, rows / 39)))))
    for code in CODES:
        if dimensions % code == 0 and rows * (code + ID_BYTES) <= memory_bytes:
            coarse = f"IVF{cells}_HNSW32" if cells >= 4096 else f"IVF{cells}"
            return f"OPQ{code},{coarse},PQ{code}"
    raise KtrayError(
        f"{rows:,} vectors of {dimensions} dimensions do not fit into {memory_bytes / 1e9:.2f} GB, "
        f"at {CODES[-1] + ID_BYTES} bytes each",
        "Raise gallery.search_gb.",
    )


def build(
    home: Path,
    blocks: Sequence[tuple[str, int]],
    read: Callable[[int], np.ndarray],
    sample: Callable[[int], np.ndarray],
    factory: str,
) -> tuple[Any, int]:
    """Train and fill; what an earlier call has done is not done again.

    Args:
        home: local folder.
        blocks: (key, rows) of each, in the order of the gallery.
        read: number of a block to its (n, D) vectors.
        sample: n to at most n gallery vectors, spread over the gallery.

    Returns:
        The index, its lists mapped into memory, and the vectors it was trained on.
    """
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    home.mkdir(parents=True, exist_ok=True)
    rows = sum(count for _, count in blocks)
    trained, facts = home / "trained.index", home / "trained.json"
    known = json.loads(facts.read_text()) if facts.exists() else {}
    if known.get("factory") != factory or rows > RETRAIN * known.get("rows", 0):
        index = _train(factory, sample)
        for file in home.glob("block-*.index"):
            file.unlink()
        _write_index(index[0], trained)
        known = {"factory": factory, "rows": rows, "trained_on": index[1]}
        _replace(facts, json.dumps(known).encode())
        logger.info(f"search    trained {factory} on {known['trained_on']:,} vectors")
    files = []
    for number, (key, count) in enumerate(blocks):
        files.append(home / f"block-{key}.index")
        if not files[-1].exists():
            part = faiss.read_index(str(trained))
            part.add_with_ids(_float32(read(number)), np.arange(count, dtype=np.int64))
            _write_index(part, files[-1])
    merged = faiss.read_index(str(trained))
    data = home / "merged.ivfdata"
    data.unlink(missing_ok=True)
    merge_ondisk(merged, [str(file) for file in files], str(data), shift_ids=True)
    _write_index(merged, home / "merged.index")
    return load(home), int(known["trained_on"])


def load(home: Path) -> Any:
    """The index, its lists mapped into memory."""
    import faiss

    try:
        return faiss.read_index(str(home / "merged.index"), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise KtrayError(
            f"The compressed index in '{home}' cannot be read: {str(error).splitlines()[-1]}",
            f"Delete '{home}' and run again: it is made anew from the embeddings.",
        ) from error


def search(index: Any, queries: np.ndarray, k: int, probes: int, exact: Callable[[np.ndarray], np.ndarray]) -> Hits:
    """The k nearest that the index finds, by their exact similarity.

    Args:
        queries: (Q, D) float32 of unit length.
        probes: cells to look into.
        exact: gallery rows to their (n, D) embeddings.

    Returns:
        As `ktray.retrieval.search.search`.
    """
    import faiss

    faiss.ParameterSpace().set_index_parameter(index, "nprobe", probes)
    _, rows = index.search(_float32(queries), min(int(index.ntotal), AGAIN * k))
    wanted, where = np.unique(rows, return_inverse=True)
    first = int((wanted < 0).any())  # -1 comes first, and stands for no hit
    vectors = np.zeros((len(wanted), queries.shape[1]), np.float32)
    vectors[first:] = exact(wanted[first:])
    similarity = np.empty(rows.shape, np.float32)
    for q, places in enumerate(where.reshape(rows.shape)):
        similarity[q] = vectors[places].astype(np.float64) @ queries[q].astype(np.float64)
    similarity[rows < 0] = -np.inf
    return top(similarity, rows, k)


def measured(
    index: Any,
    queries: np.ndarray,
    truth: Callable[[int], Hits],
    exact: Callable[[np.ndarray], np.ndarray],
    target: float,
) -> tuple[int, dict[str, float]]:
    """The fewest probes (a power of two) that reach the recall, and the recall at each of `RECALL_AT`.

    Args:
        truth: k to the true hits of the queries.
        target: wanted at the largest k; where all cells do not reach it, they are what is taken.
    """
    import faiss

    cells = int(faiss.extract_index_ivf(index).nlist)
    ks = [k for k in RECALL_AT if k <= index.ntotal] or [int(index.ntotal)]
    true = truth(ks[-1])[1]
    probes = 1
    while True:
        found = search(index, queries, ks[-1], probes, exact)[1]
        recall = {str(k): _recall(found[:, :k], true[:, :k]) for k in ks}
        if recall[str(ks[-1])] >= target or probes >= cells:
            return probes, recall
        probes = min(cells, 2 * probes)


def _recall(found: np.ndarray, true: np.ndarray) -> float:
    hits = [len(set(f.tolist()) & set(t.tolist())) for f, t in zip(found, true, strict=True)]
    return float(np.sum(hits) / max(1, true.size))


def _train(factory: str, sample: Callable[[int], np.ndarray]) -> tuple[Any, int]:
    import faiss

    cells = int("".join(c for c in factory.split("IVF")[1].split(",")[0].split("_")[0] if c.isdigit()))
    vectors = _float32(sample(max(TRAIN_A_CELL * cells, 10_000)))
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    cells_of = faiss.downcast_index(faiss.extract_index_ivf(index))
    if hasattr(cells_of, "do_polysemous_training"):
        # It renumbers codes so that their Hamming distance means something, in minutes; nothing here asks for that.
        cells_of.do_polysemous_training = False
    if faiss.get_num_gpus() > 0:  # k-means is nearly all of the training
        flat = faiss.IndexFlatIP(faiss.extract_index_ivf(index).d)
        faiss.extract_index_ivf(index).clustering_index = faiss.index_cpu_to_all_gpus(flat)
    index.train(vectors)
    return index, len(vectors)


def sample_size(wanted: int, dimensions: int) -> int:
    """How many vectors of a sample fit into `TRAIN_BYTES`."""
    return min(wanted, TRAIN_BYTES // (4 * dimensions))


def save(home: Path, made: Compressed) -> None:
    """Write ``search.json``: last, so that an index without it does not count."""
    _replace(home / "search.json", json.dumps(asdict(made), indent=1).encode())


def saved(home: Path) -> Compressed | None:
    """What `save` wrote."""
    file = home / "search.json"
    return Compressed(**json.loads(file.read_text())) if file.exists() else None


def _float32(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _write_index(index: Any, target: Path) -> None:
    import faiss

    part = target.with_suffix(".tmp")
    faiss.write_index(index, str(part))
    os.replace(part, target)


def _replace(target: Path, data: bytes) -> None:
    part = target.with_suffix(".tmp")
    part.write_bytes(data)
    os.replace(part, target)
