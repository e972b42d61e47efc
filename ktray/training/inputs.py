"""The inputs of a training, as plain data: labelled images, targets, and the initial student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ktray import recipe as recipes
from ktray.data.augment import view_keys
from ktray.data.preprocess import Preprocess
from ktray.data.views import ViewPolicy
from ktray.distributed.ray_data import WorkerPool
from ktray.errors import KtrayError
from ktray.models.student.classifier import HUB, Student, published_name, published_source
from ktray.recipe.objective import TEACHER_TARGETS
from ktray.recipe.schema import TrainConfig
from ktray.storage.columns import Rows, read_shards
from ktray.storage.node_arrays import load_arrays
from ktray.storage.node_cache import key_of, this_node
from ktray.storage.store import Dir
from ktray.targets.jpeg import JPEG, PIXELS
from ktray.targets.make_views import MakeViews
from ktray.targets.predict import Loaded, Predict
from ktray.targets.top_k import columns as stored_columns
from ktray.targets.top_k import densify
from ktray.tasks.base import TaskKind, task_kind
from ktray.training.card_rows import ROW, CardRows, fits
from ktray.training.loop import Batch
from ktray.training.prefetch import on_device
from ktray.training.read_windows import made_windows, read_windows, stream_windows
from ktray.training.sampler import Reader, RowSampler
from ktray.training.weights import WEIGHTS
from ktray.training.window_size import FEWEST_BYTES
from ktray.training.worker import WorkerContext

# Bytes of labelled images up to which they are kept on the device, and in the memory of a worker.
_ON_DEVICE = _RESIDENT = 2_000_000_000
_SAMPLED_SHARDS = 32  # largest number of shards that `TargetSet.sample` reads


@dataclass(frozen=True)
class Labels:
    """A folder of the stage LABELS. Its shards have the columns ``canvas`` (train) or ``pixels`` (evaluation view), and
    the columns of labels that the task kind defines.

    Attributes:
        version: version of the shards (`ktray.storage.node_cache.read_through`).
    """

    directory: Dir
    kind: TaskKind
    version: str = ""

    def shards(self, split: str, columns: Sequence[str]) -> Iterator[Rows]:
        """The columns of each shard of a split, in order, with few shards in memory at a time."""
        names = [name for name in self.directory.names(".parquet") if name.startswith(f"{split}-")]
        return read_shards(self.directory, names, columns, self.version)

    def load(self, split: str, column: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) uint8 and their targets (N, ...), see `ktray.tasks.base.TaskKind.targets`.

        Beyond `_RESIDENT` bytes, they are mapped from a file on this node's disk that its workers share.

        Args:
            split: ``train`` or ``val``.
            column: ``canvas`` or ``pixels``.
        """
        target = self.kind.label_column(column)

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for rows in self.shards(split, [column, target]):
                yield rows[column], self.kind.targets(rows[target]).numpy()

        cache = this_node() if self.version else None
        key = key_of(self.directory.uri, split, column, self.kind.key, self.version) if cache else ""
        pixels, targets = load_arrays(cache, key, 2, blocks, _RESIDENT)
        return torch.from_numpy(pixels), torch.from_numpy(targets)

    def batches(
        self, env: WorkerContext, batch: int, policy: ViewPolicy, size: int, seed: int, start: int, stop: int
    ) -> Iterator[Batch]:
        """Batches ``start``..``stop - 1`` of random views: ``images`` (N, 3, size, size) uint8, ``label`` with the
        targets of the same views, and ``view_key`` (N,) int64 (see `ktray.data.augment.view_keys`). ``batch`` is the
        number of views of each of the worker's virtual ranks."""
        canvases, labels = self.load("train", "canvas")
        if canvases.nbytes <= _ON_DEVICE:
            canvases, labels = canvases.to(env.device), labels.to(env.device)
        for rows in _order(len(labels), env, batch, seed, start, stop):
            take = torch.from_numpy(rows["row"]).to(canvases.device, non_blocking=True)
            keys = view_keys(seed, rows["row"], rows["visit"])
            images, target = (x[take].to(env.device, non_blocking=True) for x in (canvases, labels))
            views, target = self.kind.random_views(images, target, policy, keys, size)
            yield {"images": views, "label": target, "view_key": keys}


def _order(count: int, env: WorkerContext, batch: int, seed: int, start: int, stop: int) -> Iterator[Rows]:
    """``row`` and ``visit`` of each batch of the worker's virtual ranks."""
    shards, ranks, rank_count = [("labels", count)], env.own_ranks, env.rank_count
    if count >= rank_count:
        sampler = RowSampler(shards, _row_numbers, batch=batch, ranks=ranks, rank_count=rank_count, seed=seed)
        yield from sampler.batches(start, stop)
        return
    # With fewer images than virtual ranks, each virtual rank has all images, in its own order and with its own views.
    streams = [RowSampler(shards, _row_numbers, batch=batch, seed=seed + rank).batches(start, stop) for rank in ranks]
    for parts in zip(*streams, strict=True):
        visits = [rows["visit"] * rank_count + rank for rows, rank in zip(parts, ranks, strict=True)]
        yield {"row": np.concatenate([rows["row"] for rows in parts]), "visit": np.concatenate(visits)}


def _row_numbers(windows: Any) -> Iterator[dict[str, np.ndarray]]:
    for window in windows:
        yield {"row": np.concatenate([np.arange(s.start, s.rows, s.step) for s in window])}


@dataclass(frozen=True)
class Live:
    """A teacher in the trainer's process. It computes from views (N, 3, H, W) uint8 what stored rows would contain."""

    loaded: Loaded
    classes: int

    @property
    def flops(self) -> float:
        """FLOPs for one view."""
        return self.loaded.flops

    def __call__(self, pixels: torch.Tensor) -> Batch:
        return densify(self.loaded(pixels), self.classes)


@dataclass(frozen=True)
class TargetSet:
    """The result of TEACH: rows with ``pixels`` (views or canvases), ``view_id`` and the ``targets`` of each view. The
    rows are stored (``cached``), or they are computed from TEACH's lists of images.

    Attributes:
        directory: the directory of TEACH.
        shards: name and number of rows of each shard.
        row_bytes: size of a row when it is read.
        targets: names of the targets.
        mode: ``cached``: rows are read from the store. ``streamed``: teachers that run during training compute them.
            ``live``: rows have no targets of the teacher, and the trainer adds them (`teacher`).
        cut, predict: how rows are computed if they are not stored.
        embed_dim, patch_dim: widths of the teacher's embeddings; 0 if they are not needed.
        vocabulary, text_length: size of the vocabulary and length of the captions' tokens; 0 if they are not stored.
        source_classes: number of classes of the labelled generic set; 0 if there is none.
        classes: number of classes of the task if only the largest logits are stored (`ktray.targets.top_k`); 0: all
            logits are stored.
        jpeg: whether views are stored as JPEG (`ktray.targets.jpeg`).
        weight: name of the weights of rows in `ktray.training.weights.WEIGHTS`; ``none``: equal weights.
        views: number of consecutive rows of a shard that show one image.
        version: version of the stored shards (`ktray.storage.node_cache.read_through`).
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
    weight: str = "none"
    views: int = 1
    version: str = ""

    @property
    def size(self) -> int:
        """The size of all rows in bytes."""
        return sum(n for _, n in self.shards) * self.row_bytes

    def is_resident(self, part: TrainConfig) -> bool:
        """Whether all rows stay in memory during a training."""
        return self.size <= part.resident_bytes

    def sampler(
        self, part: TrainConfig, env: WorkerContext, batch: int, seed: int, card: CardRows | None = None
    ) -> RowSampler:
        """The sampler of a worker, for ``batch`` rows of each of its virtual ranks.

        Args:
            card: takes the columns of a set that stays in memory; the sampler's rows then are places in it.
        """
        resident = self.is_resident(part)
        read, weigh = self._reader(env, resident), None
        if self.weight in WEIGHTS:
            weigh = partial(WEIGHTS[self.weight], classes=self.classes)
        if card is not None:
            read, weigh = card.reader(read, weigh), None
        # The windows of a virtual rank are the same with any number of workers, so their size is what each worker can
        # hold when there are the fewest workers.
        window = 1 << 62
        if not resident:
            window = max(batch, (part.window_bytes or FEWEST_BYTES) // self.row_bytes // env.max_ranks)
        return RowSampler(
            self.shards,
            read,
            batch=batch,
            ranks=env.own_ranks,
            rank_count=env.rank_count,
            seed=seed,
            window_rows=window,
            views=self.views,
            weigh=weigh,
        )

    def _reader(self, env: WorkerContext, resident: bool) -> Reader:
        live = self.mode == "live"
        targets = tuple(t for t in self.targets if not (live and t in TEACHER_TARGETS))
        # On a GPU, a step is a sequence of launches, which wait for the interpreter lock.
        apart = env.device.type == "cuda"
        columns = [JPEG if self.jpeg else PIXELS, "view_id", *stored_columns(targets, self.classes)]
        if self.cut is None:
            return (
                read_windows(self.directory, columns, self.version)
                if resident
                else stream_windows(self.directory, columns, env.read_cpus, self.version, apart)
            )
        pool = WorkerPool(env.teachers, env.read_cpus, env.read_cpus, env.teacher_gpus, env.teacher_threads)
        predict = None if live else self.predict
        return made_windows(self.directory, self.cut, predict, columns, pool, env.report, apart)

    def teacher(self) -> Live | None:
        """The teacher that the trainer calls in each step, in this process; None if rows already have their targets."""
        return Live(self.predict.load(), self.classes) if self.mode == "live" and self.predict else None

    def sample(self, column: str, rows: int = 8192) -> torch.Tensor:
        """About ``rows`` values (M, ...) float32 of a stored column, from shards and rows that are spread evenly over
        the set. They depend on the stored files alone, so they are the same for every worker and after a restart.

        Raises:
            KtrayError: the targets are not stored.
        """
        if self.mode != "cached":
            raise KtrayError(
                f"A sample of the teacher's targets ({column}) is needed, and teach.mode={self.mode} stores none",
                "Set teach.mode=cached.",
            )
        names = [name for name, _ in self.shards]
        read = names[:: -(-len(names) // _SAMPLED_SHARDS)]
        shards = read_shards(self.directory, read, [column], self.version)
        values = np.concatenate([rows[column] for rows in shards])
        return torch.from_numpy(values[:: -(-len(values) // rows)].astype(np.float32))

    def batches(
        self, part: TrainConfig, env: WorkerContext, batch: int, seed: int, start: int, stop: int
    ) -> Iterator[Batch]:
        """Batches ``start``..``stop - 1`` on the device, with ``batch`` rows of each of the worker's virtual ranks, as
        `ktray.objectives.base.Objective.step` expects them."""
        # Each of several workers on one GPU holds a part of the set only; the whole set is an upper bound.
        card = CardRows(env.device) if self.is_resident(part) and fits(env.device, self.size) else None

        def on_cpu() -> Iterator[Batch]:
            for rows in self.sampler(part, env, batch, seed, card).batches(start, stop):
                keys = view_keys(seed, rows.pop("view_id"), rows.pop("visit"))
                yield {"view_key": keys, **{k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in rows.items()}}

        # The random numbers of a view are computed from its key on the CPU.
        for columns in on_device(on_cpu(), env.device, stay=("view_key",)):
            keys = columns.pop("view_key")
            if card is not None:
                columns = card.gather(columns[ROW])
            yield {**densify(columns, self.classes), "view_key": keys}


@dataclass(frozen=True)
class StudentSpec:
    """How to build the student, with its initial weights.

    Attributes:
        kind: the task kind.
        name, kwargs: timm's name of the model and its arguments.
        num_classes: number of outputs of the model.
        image_size: side of the input in pixels.
        pretrained: the source of the published weights that it starts from
            (`ktray.models.student.classifier.published_source`); false: random weights.
        checkpoint: a file of weights that it starts from.
        options: other options of the task kind's student; see `ktray.tasks.base.TaskKind.student_options`.
        start: directory and name of a file in the store with the initial weights; None: a new student.
    """

    kind: TaskKind
    name: str
    kwargs: dict[str, Any]
    num_classes: int
    image_size: int
    pretrained: bool | str = False
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: tuple[Dir, str] | None = None

    @classmethod
    def of(cls, recipe: recipes.Recipe, num_classes: int, start: tuple[Dir, str] | None = None) -> StudentSpec:
        """The student of a resolved recipe."""
        part, kind = recipe.student, task_kind(recipe.task.kind)
        model = str(part.name), dict(part.kwargs), num_classes, int(recipe.image_size or 0)
        # The source of the weights is part of the stages' keys, and is the same on all machines.
        pretrained = part.pretrained is True and published_source(str(part.name))
        return cls(kind, *model, pretrained, part.checkpoint, kind.student_options(part), start)

    @property
    def initial(self) -> str:
        """The origin of the initial weights of a new student, in words: ``random``, ``checkpoint``, or ``published``
        with the name of the weights."""
        if self.checkpoint:
            return "checkpoint"
        if not self.pretrained:
            return "random"
        return f"published ({published_name(self.name) if self.pretrained == HUB else self.pretrained})"

    @property
    def published(self) -> bool:
        """Whether a new student starts from weights of another training."""
        return bool(self.pretrained) or self.checkpoint is not None

    def from_scratch(self) -> StudentSpec:
        """The same student with random initial weights."""
        return replace(self, pretrained=False, checkpoint=None)

    def make(self, bare: bool = False) -> Student:
        """Build the student.

        Args:
            bare: with random weights, without loading any: for callers that load weights or only count FLOPs.
        """
        weights = (False, None) if bare else (self.pretrained, self.checkpoint)
        model = (self.name, self.kwargs, self.num_classes, self.image_size)
        return self.kind.build_student(*model, *weights, **self.options)

    def build(self, env: WorkerContext, seed: int) -> tuple[nn.Module, Preprocess]:
        """The student's model on the worker's device, with its initial weights, and its preprocessing."""
        torch.manual_seed(seed)
        student = self.make(bare=self.start is not None)
        if self.start is not None:
            from safetensors.torch import load

            directory, name = self.start
            student.model.load_state_dict(load(directory.read(name)))
        return student.model.to(env.device), student.preprocess
