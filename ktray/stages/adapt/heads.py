"""Embeddings of the labelled images by the frozen tower, and the heads that the task kind fits on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ktray.models.teacher.adapted import save_candidate
from ktray.models.teacher.spec import TeacherSpec, embed_numpy, tower_flops
from ktray.storage.columns import read_rows, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import HeadSettings, LabelledSplit, TaskKind


def fit_heads(
    stage: Stage, decoded: Stage, spec: TeacherSpec, kind: TaskKind, settings: HeadSettings, metric: str, threads: int
) -> dict[str, Any]:
    """Store the candidates with a frozen tower, and the embeddings, which are the queries of retrieval.

    Args:
        decoded: the LABELS stage, in the teacher's geometry.
        metric: the metric that chooses the best candidate.
        threads: number of threads of torch.

    Returns:
        ``scores``: the scores of the candidates on validation; ``start``: the best candidate, from which finetuning
        starts; ``images`` and ``flops``: the work.
    """
    torch.set_num_threads(threads)
    teacher = spec.load()
    splits: dict[str, LabelledSplit] = {}
    for split in ("train", "val"):
        columns = _columns(decoded, split, ["uri", "pixels", "label", kind.label_column("pixels")])
        embedding = embed_numpy(teacher, columns["pixels"], kind.embed_batch)
        unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        label = columns["label"] if kind.image_classes else np.zeros(len(unit), np.int64)
        rows = {"uri": columns["uri"].astype(str), "label": label, "embedding": unit.astype(np.float16)}
        if kind.label_sets:
            rows["classes"] = columns["label"]
        write_rows(stage, f"embedding-{split}.parquet", rows)
        targets = kind.targets(columns[kind.label_column("pixels")])
        splits[split] = LabelledSplit(partial(_pixels, decoded, split), torch.from_numpy(embedding), targets)
    fitted = kind.fit_heads(teacher, splits["train"], splits["val"], settings)
    for name, adapted in fitted.teachers.items():
        save_candidate(stage, name, adapted)
    scores = {n: {**judged, "temperature": fitted.teachers[n].temperature} for n, judged in fitted.scores.items()}
    images = sum(len(split.embedding) for split in splits.values())
    start = max(scores, key=lambda n: (scores[n][metric], -scores[n]["loss"]))
    return {
        "scores": scores,
        "start": start,
        "images": images,
        "flops": tower_flops(teacher) * images + fitted.flops,
    }


def _pixels(decoded: Stage, split: str) -> np.ndarray:
    return _columns(decoded, split, ["pixels"])["pixels"]


def _columns(decoded: Stage, split: str, names: list[str]) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(names))
    shards = [read_rows(decoded, name, names) for name in decoded.names(".parquet") if name.startswith(split)]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in names}
