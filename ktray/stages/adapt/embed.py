"""Embeddings of the labelled images by the frozen tower, one piece for each shard of LABELS.

No process holds the pixels of more than a shard. The pieces are in a folder of the stage, so that an attempt that is
interrupted does not embed them again; the stage deletes the folder when it is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ktray.distributed.device_work import Item
from ktray.distributed.ray_data import map_shards
from ktray.models.teacher.spec import TeacherSpec, Tower, embed_numpy, tower_flops
from ktray.models.teacher.teacher import Teacher
from ktray.stages.base import Reporter, Runtime
from ktray.stages.shard_summary import ShardSummary, finish_shard, finished_shards
from ktray.storage.columns import Rows, read_rows, read_shards, write_rows
from ktray.storage.store import Stage
from ktray.tasks.base import TaskKind
from ktray.training.inputs import Labels

FOLDER = "pieces"


def pieces(stage: Stage) -> Stage:
    """The folder of the pieces of a stage."""
    return Stage(stage.file(FOLDER))


def embed_labels(
    labels: Labels, spec: TeacherSpec, names: Sequence[str], runtime: Runtime, stage: Stage, reporter: Reporter
) -> None:
    """Store a piece for each shard: ``embedding`` (N, D) float32, not of unit length, and the columns of the shard
    except the images.

    Args:
        names: names of the shards of LABELS in the teacher's geometry.
    """
    folder = pieces(stage)
    finished = finished_shards(folder)
    reporter.shards(summary.resumed() for summary in finished.values())
    todo = [{"name": name} for name in names if name not in finished]
    work = _Embed(spec, labels.kind, folder)
    reporter.shards(ShardSummary.each(map_shards(todo, _Read(labels), work, runtime.plan)))
    reporter.read = 0  # LABELS has counted these images


def read_pieces(stage: Stage, names: Sequence[str]) -> Rows:
    """The columns of several pieces together."""
    shards = list(read_shards(pieces(stage), names))
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


@dataclass(frozen=True)
class _Read:
    labels: Labels

    def __call__(self, item: Item) -> Rows:
        columns = dict.fromkeys(["uri", "pixels", "label", self.labels.kind.label_column("pixels")])
        return read_rows(self.labels.directory, item["name"], list(columns), self.labels.version)


@dataclass(frozen=True)
class _Embed:
    spec: TeacherSpec
    kind: TaskKind
    folder: Stage

    reads: ClassVar[tuple[str, ...]] = ("pixels",)

    @property
    def model(self) -> Tower:
        return Tower(self.spec)

    def compute(self, model: Teacher, columns: Rows) -> Rows:
        pixels = columns["pixels"]
        flops = np.array([tower_flops(model) * len(pixels)])
        return {"embedding": embed_numpy(model, pixels, self.kind.embed_batch), "flops": flops}

    def finish(self, item: Item, columns: Rows, computed: Rows) -> dict[str, Any]:
        kept = {name: values for name, values in columns.items() if name not in self.reads}
        write_rows(self.folder, item["name"], {**kept, "embedding": computed["embedding"]})
        rows, flops = len(columns["pixels"]), float(computed["flops"][0])
        return finish_shard(self.folder, ShardSummary(item["name"], rows, read=rows, images=rows, flops=flops))
