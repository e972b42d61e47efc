"""Compressed search for galleries that are too large for exact search: an IVF-PQ index of FAISS, mapped into memory.

Vectors are grouped into cells and coded in a few bytes each; a query searches only the nearest cells. Its hits are
scored again with the exact embeddings. The recall is measured on a sample, with exact search as the reference, and
recorded in ``search.json`` in the folder of the index.

The index is trained on a bounded sample and filled block by block. Each block has its own file, so that a job that was
killed can resume, and only the new blocks of a growing gallery are coded. Finally all blocks are merged into one file
of inverted lists.
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
from ktray.models.device import device
from ktray.retrieval.search import Hits, top

logger = logging.getLogger("ktray")

# Lengths of a code in bytes, in the order in which they are tried.
CODES = (64, 48, 32, 24, 16, 8)
ID_BYTES = 8
# Training vectors per cell for k-means. FAISS warns below 39 and uses at most 256.
TRAIN_A_CELL = 64
TRAIN_BYTES = 1_000_000_000
# The index is trained again when the gallery has grown by more than this factor.
RETRAIN = 4
# Number of candidates that are scored again, per requested hit.
AGAIN = 4
SAMPLE = 200
RECALL_AT = (10, 100)


@dataclass(frozen=True)
class Compressed:
    """Description of a finished index.

    Attributes:
        factory: FAISS's factory string.
        rows, trained_on: number of vectors in the index, and in the training sample.
        probes: number of cells that are searched for a query.
        recall: for each k the share of the true k nearest vectors that are found, after scoring with the exact
            embeddings, measured with `SAMPLE` gallery vectors as queries.
        key: hash of the blocks.
    """

    factory: str
    rows: int
    trained_on: int
    probes: int
    recall: dict[str, float]
    key: str


def choose_factory(rows: int, dimensions: int, memory_bytes: float) -> str:
    """FAISS's factory string for ``rows`` vectors, so that codes and ids fit into ``memory_bytes``.

    Number of cells: the power of two closest to 4 sqrt(rows), at most 2^20, and low enough for 39 training vectors per
    cell. From 4,096 cells on, an HNSW graph finds the nearest cells. Code: the longest of `CODES` that fits, after an
    OPQ rotation.

    Raises:
        KtrayError: even the shortest code does not fit.
    """
    cells = min(2 ** round(math.log2(4 * math.sqrt(rows))), 2**20, 2 ** max(0, int(math.log2(max(1, rows / 39)))))
    for code in CODES:
        if dimensions % code == 0 and rows * (code + ID_BYTES) <= memory_bytes:
            coarse = f"IVF{cells}_HNSW32" if cells >= 4096 else f"IVF{cells}"
            return f"OPQ{code},{coarse},PQ{code}"
    raise KtrayError(
        f"{rows:,} vectors of {dimensions} dimensions do not fit into {memory_bytes / 1e9:.2f} GB "
        f"with at least {CODES[-1] + ID_BYTES} bytes per vector",
        "Raise gallery.search_gb.",
    )


def build(
    home: Path,
    blocks: Sequence[tuple[str, int]],
    read: Callable[[int], np.ndarray],
    sample: Callable[[int], np.ndarray],
    factory: str,
) -> tuple[Any, int]:
    """Train and fill the index. The files of earlier calls are reused.

    Args:
        home: local folder of the index.
        blocks: (key, rows) of each block, in the order of the gallery.
        read: takes the number of a block and returns its (n, D) vectors.
        sample: takes n and returns at most n vectors, spread over the gallery.
        factory: FAISS's factory string.

    Returns:
        The index, with its lists mapped into memory, and the number of training vectors.
    """
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    home.mkdir(parents=True, exist_ok=True)
    rows = sum(count for _, count in blocks)
    trained_file, training_file = home / "trained.index", home / "trained.json"
    training = json.loads(training_file.read_text()) if training_file.exists() else {}
    if training.get("factory") != factory or rows > RETRAIN * training.get("rows", 0):
        index = _train(factory, sample)
        for file in home.glob("block-*.index"):
            file.unlink()
        _write_index(index[0], trained_file)
        training = {"factory": factory, "rows": rows, "trained_on": index[1]}
        _replace(training_file, json.dumps(training).encode())
        logger.info(f"search    trained {factory} on {training['trained_on']:,} vectors")
    files = []
    for number, (key, count) in enumerate(blocks):
        files.append(home / f"block-{key}.index")
        if not files[-1].exists():
            part = faiss.read_index(str(trained_file))
            part.add_with_ids(_float32(read(number)), np.arange(count, dtype=np.int64))
            _write_index(part, files[-1])
    merged = faiss.read_index(str(trained_file))
    lists_file = home / "merged.ivfdata"
    lists_file.unlink(missing_ok=True)
    merge_ondisk(merged, [str(file) for file in files], str(lists_file), shift_ids=True)
    _write_index(merged, home / "merged.index")
    return load(home), int(training["trained_on"])


def load(home: Path) -> Any:
    """Read the finished index, with its lists mapped into memory.

    Raises:
        KtrayError: the files cannot be read.
    """
    import faiss

    try:
        return faiss.read_index(str(home / "merged.index"), faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise KtrayError(
            f"The compressed index in '{home}' cannot be read: {str(error).splitlines()[-1]}",
            f"Delete '{home}' and run the command again. The index is then built again from the embeddings.",
        ) from error


def search(index: Any, queries: np.ndarray, k: int, probes: int, exact: Callable[[np.ndarray], np.ndarray]) -> Hits:
    """The k nearest vectors that the index finds, with their exact similarity.

    Args:
        queries: (Q, D) float32 of unit length.
        k: number of hits per query.
        probes: number of cells to search.
        exact: takes gallery rows and returns their (n, D) embeddings.

    Returns:
        Similarity and gallery index in the format of `ktray.retrieval.search.search`.
    """
    import faiss

    faiss.ParameterSpace().set_index_parameter(index, "nprobe", probes)
    _, rows = index.search(_float32(queries), min(int(index.ntotal), AGAIN * k))
    distinct_rows, positions = np.unique(rows, return_inverse=True)
    first_valid = int((distinct_rows < 0).any())  # -1 is the first value and means no hit
    vectors = np.zeros((len(distinct_rows), queries.shape[1]), np.float32)
    vectors[first_valid:] = exact(distinct_rows[first_valid:])
    similarity = np.empty(rows.shape, np.float32)
    for q, places in enumerate(positions.reshape(rows.shape)):
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
    """The smallest number of probes (a power of two) that reaches the recall, and the recall at each of `RECALL_AT`.

    Args:
        truth: takes k and returns the true hits of the queries.
        target: required recall at the largest k. If no number of probes reaches it, all cells are searched.
    """
    import faiss

    cells = int(faiss.extract_index_ivf(index).nlist)
    ks = [k for k in RECALL_AT if k <= index.ntotal] or [int(index.ntotal)]
    true = truth(ks[-1])[1]
    probes = 1
    while True:
        rows = search(index, queries, ks[-1], probes, exact)[1]
        recall = {str(k): _recall(rows[:, :k], true[:, :k]) for k in ks}
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
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    if hasattr(ivf, "do_polysemous_training"):
        # This training takes minutes. It renumbers the codes for comparisons by Hamming distance; these are not used.
        ivf.do_polysemous_training = False
    if device().type == "cuda" and faiss.get_num_gpus() > 0:  # k-means takes most of the training time
        on_gpu = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(ivf.d))  # FAISS does not keep it alive
        faiss.extract_index_ivf(index).clustering_index = on_gpu
    index.train(vectors)
    return index, len(vectors)


def sample_size(wanted: int, dimensions: int) -> int:
    """The size of a sample of ``wanted`` vectors, limited to what fits into `TRAIN_BYTES`."""
    return min(wanted, TRAIN_BYTES // (4 * dimensions))


def save(home: Path, made: Compressed) -> None:
    """Write ``search.json``. It is written last, because an index without it is incomplete."""
    _replace(home / "search.json", json.dumps(asdict(made), indent=1).encode())


def saved(home: Path) -> Compressed | None:
    """Read ``search.json``; None if the index is incomplete."""
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
