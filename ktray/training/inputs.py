"""What training reads, as plain data: labelled images, cached targets, and the student to start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ktray import recipe as recipes
from ktray.data.augment import view_keys
from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy
from ktray.distributed.ray_data import WorkerPool
from ktray.models.student.classifier import Student
from ktray.recipe.objective import TEACHER_TARGETS
from ktray.recipe.schema import TrainConfig
from ktray.storage.columns import Rows, read_rows
from ktray.storage.store import Dir
from ktray.targets.jpeg import JPEG, PIXELS
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Loaded, Predict
from ktray.targets.top_k import columns as stored_columns
from ktray.targets.top_k import densify
from ktray.tasks.base import TaskKind, task_kind
from ktray.training.loop import Batch
from ktray.training.read_windows import made_windows, read_windows, stream_windows
from ktray.training.sampler import Reader, RowSampler
from ktray.training.worker import WorkerContext


@dataclass(frozen=True)
class Labels:
    """A folder of the ``labels`` stage: shards of ``canvas`` (train), ``pixels`` (evaluation view), and the columns
    that the task kind keeps of the labels."""

    directory: Dir
    kind: TaskKind

    def load(self, split: str, column: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) uint8 and the targets of each (N, ...), see `ktray.tasks.base.TaskKind.targets`."""
        target = self.kind.label_column(column)
        shards = [
            read_rows(self.directory, name, [column, target])
            for name in self.directory.names(".parquet")
            if name.startswith(f"{split}-")
        ]
        pixels = np.concatenate([s[column] for s in shards])
        targets = np.concatenate([s[target] for s in shards])
        return torch.from_numpy(pixels.copy()), self.kind.targets(targets)

    def batches(
        self, env: WorkerContext, batch: int, policy: ViewPolicy, size: int, seed: int, start: int, stop: int
    ) -> Iterator[Batch]:
        """Batches ``start``..``stop - 1`` of random views, ``batch`` of each of the worker's lanes: ``images``
        (N, 3, size, size) uint8 and ``label``, the targets of the same views."""
        canvases, labels = self.load("train", "canvas")
        for rows in _order(len(labels), env, batch, seed, start, stop):
            take = torch.from_numpy(rows["row"])
            keys = view_keys(seed, rows["row"], rows["visit"])
            images, target = canvases[take].to(env.device), labels[take].to(env.device)
            views, target = self.kind.random_views(images, target, policy, keys, size)
            yield {"images": views, "label": target}


def _order(count: int, env: WorkerContext, batch: int, seed: int, start: int, stop: int) -> Iterator[Rows]:
    """``row`` and ``visit`` of each batch of the worker's lanes."""
    shards = [("labels", count)]
    if count >= env.of:
        yield from RowSampler(shards, _numbers, batch=batch, lanes=env.mine, of=env.of, seed=seed).batches(start, stop)
        return
    # With fewer images than lanes each lane sees all, in an order and in views of its own.
    feeds = [RowSampler(shards, _numbers, batch=batch, seed=seed + lane).batches(start, stop) for lane in env.mine]
    for found in zip(*feeds, strict=True):
        visits = [rows["visit"] * env.of + lane for rows, lane in zip(found, env.mine, strict=True)]
        yield {"row": np.concatenate([rows["row"] for rows in found]), "visit": np.concatenate(visits)}


def _numbers(windows: Any) -> Iterator[dict[str, np.ndarray]]:
    for window in windows:
        yield {"row": np.concatenate([np.arange(s.start, s.rows, s.step) for s in window])}


@dataclass(frozen=True)
class Live:
    """A teacher in the trainer's process: (N, 3, H, W) uint8 views to what rows would bring."""

    loaded: Loaded
    classes: int

    @property
    def flops(self) -> float:
        """Of a view."""
        return self.loaded.flops

    def __call__(self, pixels: torch.Tensor) -> Batch:
        return densify(self.loaded(pixels), self.classes)


@dataclass(frozen=True)
class TargetSet:
    """What TEACH has left: rows of ``pixels`` (views or canvases), ``view_id`` and the ``targets`` of each, stored
    (``cached``) or to be made from its lists of images.

    Attributes:
        row_bytes: of a row as it is read.
        mode: ``cached``: rows are read as they are. ``streamed``: teachers beside the training make them. ``live``:
            rows come without the teacher's targets, which the trainer adds (`teacher`).
        cut, predict: how rows are made, where they are not stored.
        embed_dim, patch_dim: widths of the teacher's embeddings, 0 where they are not needed.
        vocabulary, text_length: of the captions' tokens, 0 where they are not stored.
        source_classes: of the labelled generic set, 0 where there is none.
        jpeg: views are stored as JPEG (`ktray.targets.jpeg`).
        classes: of the task, where the largest logits alone are stored (`ktray.targets.top_k`); 0: all are.
    """

    directory: Dir
    shards: tuple[tuple[str, int], ...]
    row_bytes: int
    targets: tuple[str, ...]
    mode: str = "cached"
    cut: MakeViews | None = None
    predict: Predict | None = None
    embed_dim: int = 0
    patch_dim: int = 0
    vocabulary: int = 0
    text_length: int = 0
    source_classes: int = 0
    classes: int = 0
    jpeg: bool = False

    def feed(self, part: TrainConfig, env: WorkerContext, batch: int, seed: int) -> RowSampler:
        rows = sum(n for _, n in self.shards)
        resident = rows * self.row_bytes <= part.resident_bytes
        # A lane's windows are the same with any number of workers, so they have the size that the fewest can hold.
        window = 1 << 62 if resident else max(batch, part.window_bytes // self.row_bytes // env.most)
        return RowSampler(
            self.shards,
            self._reader(env, resident),
            batch=batch,
            lanes=env.mine,
            of=env.of,
            seed=seed,
            window_rows=window,
        )

    def _reader(self, env: WorkerContext, resident: bool) -> Reader:
        live = self.mode == "live"
        wanted = tuple(t for t in self.targets if not (live and t in TEACHER_TARGETS))
        columns = [JPEG if self.jpeg else PIXELS, "view_id", *stored_columns(wanted, self.classes)]
        if self.cut is None:
            return (
                read_windows(self.directory, columns)
                if resident
                else stream_windows(self.directory, columns, env.read_cpus)
            )
        crew = WorkerPool(env.teachers, env.read_cpus, env.read_cpus, env.teacher_gpus, env.teacher_threads)
        beside = None if live else self.predict
        return made_windows(self.directory, self.cut, beside, columns, crew, env.report)

    def teacher(self) -> Live | None:
        """The teacher that the trainer asks at each step, in this process; None where rows bring their targets."""
        return Live(self.predict.load(), self.classes) if self.mode == "live" and self.predict else None

    def batches(
        self, part: TrainConfig, env: WorkerContext, batch: int, seed: int, start: int, stop: int
    ) -> Iterator[Batch]:
        """Batches on the device, ``batch`` rows of each of the worker's lanes, as
        `ktray.objectives.base.Objective.step` takes them."""
        for rows in self.feed(part, env, batch, seed).batches(start, stop):
            keys = view_keys(seed, rows.pop("view_id"), rows.pop("visit"))
            found = {
                k: torch.from_numpy(np.ascontiguousarray(v)).to(env.device, non_blocking=True) for k, v in rows.items()
            }
            yield {**densify(found, self.classes), "view_key": keys}


@dataclass(frozen=True)
class StudentSpec:
    """How to make the student, and the weights to start from (a file in the store).

    Attributes:
        num_classes: outputs of the model.
        options: what else the task kind's student has; see `ktray.tasks.base.TaskKind.student_options`.
    """

    kind: TaskKind
    name: str
    kwargs: dict[str, Any]
    num_classes: int
    image_size: int
    pretrained: bool = False
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: tuple[Dir, str] | None = None

    @classmethod
    def of(cls, recipe: recipes.Recipe, num_classes: int, start: tuple[Dir, str] | None = None) -> StudentSpec:
        """The student of a resolved recipe."""
        part, kind = recipe.student, task_kind(recipe.task.kind)
        known = str(part.name), dict(part.kwargs), num_classes, int(recipe.image_size or 0)
        return cls(kind, *known, part.pretrained, part.checkpoint, kind.student_options(part), start)

    def make(self, bare: bool = False) -> Student:
        """The student with its facts.

        Args:
            bare: from random weights, whatever it shall start from: for those who fill it or only count.
        """
        start = (False, None) if bare else (self.pretrained, self.checkpoint)
        known = (self.name, self.kwargs, self.num_classes, self.image_size)
        return self.kind.build_student(*known, *start, **self.options)

    def build(self, env: WorkerContext, seed: int) -> tuple[nn.Module, Preprocess]:
        torch.manual_seed(seed)
        student = self.make(bare=self.start is not None)
        if self.start is not None:
            from safetensors.torch import load

            directory, name = self.start
            student.model.load_state_dict(load(directory.read(name)))
        return student.model.to(env.device), student.preprocess
