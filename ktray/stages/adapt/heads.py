"""The heads that the task kind fits on the embeddings of the labelled images by the frozen tower."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ktray.models.teacher.adapted import save_candidate
from ktray.models.teacher.spec import TeacherSpec
from ktray.stages.adapt.embed import read_pieces
from ktray.storage.columns import write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import HeadSettings, LabelledSplit
from ktray.training.inputs import Labels


def fit_heads(
    stage: Stage,
    labels: Labels,
    names: list[str],
    spec: TeacherSpec,
    settings: HeadSettings,
    metric: str,
    threads: int,
) -> dict[str, Any]:
    """Store the candidates with a frozen tower, and the embeddings, which are the queries of retrieval.

    Args:
        stage: the stage, with the pieces of `embed_labels`.
        labels: the LABELS stage, in the teacher's geometry.
        names: names of its shards.
        metric: the metric that chooses the best candidate.
        threads: number of threads of torch.

    Returns:
        ``scores``: the scores of the candidates on validation; ``start``: the best candidate, from which finetuning
        starts; ``flops``: the work.
    """
    torch.set_num_threads(threads)
    teacher, kind = spec.load(), labels.kind
    splits: dict[str, LabelledSplit] = {}
    for split in ("train", "val"):
        columns = read_pieces(stage, [name for name in names if name.startswith(f"{split}-")])
        embedding = columns["embedding"].copy()
        unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
        label = columns["label"] if kind.image_classes else np.zeros(len(unit), np.int64)
        rows = {"uri": columns["uri"].astype(str), "label": label, "embedding": unit.astype(np.float16)}
        if kind.label_sets:
            rows["classes"] = columns["label"]
        write_rows(stage, f"embedding-{split}.parquet", rows)
        targets = kind.targets(columns[kind.label_column("pixels")])
        splits[split] = LabelledSplit(partial(_pixels, labels, split), torch.from_numpy(embedding), targets)
    fitted = kind.fit_heads(teacher, splits["train"], splits["val"], settings)
    for name, adapted in fitted.teachers.items():
        save_candidate(stage, name, adapted)
    scores = {n: {**judged, "temperature": fitted.teachers[n].temperature} for n, judged in fitted.scores.items()}
    start = max(scores, key=lambda n: (scores[n][metric], -scores[n]["loss"]))
    return {"scores": scores, "start": start, "flops": fitted.flops}


def _pixels(labels: Labels, split: str) -> Iterator[np.ndarray]:
    return (rows["pixels"] for rows in labels.shards(split, ["pixels"]))
