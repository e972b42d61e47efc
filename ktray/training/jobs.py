"""What the workers train: adaptation of the teacher, transfer to the student, finetuning on labels.

A job is plain data (paths in the store, numbers); a worker builds the models and the feed from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ktray import recipe as recipes
from ktray.data.augment import random_views
from ktray.data.views import ViewPolicy
from ktray.device import cpu_model
from ktray.models.adapted import AdaptedTeacher
from ktray.models.flops import train_flops
from ktray.models.heads import probe_head
from ktray.models.precision import Precision, choose_precision
from ktray.models.preprocess import Preprocess
from ktray.models.student import Features, build_student, classifier_of, pooled_features
from ktray.models.teacher_load import feature_dim
from ktray.objectives import Context, Objective, build_objective
from ktray.recipe import digest
from ktray.store import Dir
from ktray.streaming import read_rows, read_windows, stream_windows
from ktray.training.feed import Feed
from ktray.training.loop import Batch, Program, Settings, decay_groups
from ktray.training.shell import Env


@dataclass(frozen=True)
class Labels:
    """A folder of the ``labels`` stage: shards of ``canvas`` (train), ``pixels`` (evaluation view), ``label``."""

    directory: Dir

    def load(self, split: str, column: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 3, H, W) uint8 and (N,) int64 of one split."""
        shards = [
            read_rows(self.directory, name, [column, "label"])
            for name in self.directory.names(".parquet")
            if name.startswith(f"{split}-")
        ]
        pixels = np.concatenate([s[column] for s in shards])
        labels = np.concatenate([s["label"] for s in shards])
        return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))


@dataclass(frozen=True)
class Cache:
    """A folder of TEACH: shards of ``pixels`` (views) and the teacher's ``targets`` for them."""

    directory: Dir
    shards: tuple[tuple[str, int], ...]
    row_bytes: int
    targets: tuple[str, ...]
    embed_dim: int

    def feed(self, part: recipes.Train, env: Env, batch: int, seed: int) -> Feed:
        rows = sum(n for _, n in self.shards)
        resident = rows * self.row_bytes <= part.resident_bytes
        columns = ["pixels", *self.targets]
        if resident:
            return Feed(
                self.shards,
                read_windows(self.directory, columns),
                batch=batch,
                rank=env.rank,
                world=env.world,
                seed=seed,
            )
        window = max(batch, part.window_bytes // self.row_bytes)
        return Feed(
            self.shards,
            stream_windows(self.directory, columns, env.read_cpus),
            batch=batch,
            rank=env.rank,
            world=env.world,
            seed=seed,
            window_rows=window,
        )


class Pretrain(nn.Module):
    """Student under an objective."""

    def __init__(self, student: nn.Module, preprocess: Preprocess, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.preprocess = preprocess

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = self.objective.prepare({**batch, "images": batch["pixels"].float()}, generator)
        return self.objective.loss(self.student(self.preprocess.normalise(batch["images"])), batch)


class Supervise(nn.Module):
    """Student on labels, with the distillation term on replayed transfer images where there are any."""

    def __init__(self, student: nn.Module, preprocess: Preprocess, objective: Objective) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.preprocess = preprocess

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        images, labels = batch["images"], batch["label"]
        replay: Batch = {}
        if "replay_pixels" in batch:
            replay = {"images": batch["replay_pixels"].float(), "logits": batch["replay_logits"]}
            replay = self.objective.prepare(replay, generator)
            images = torch.cat([images, replay["images"]])
        out = self.student(self.preprocess.normalise(images)).float()
        loss = F.cross_entropy(out[: len(labels)], labels)
        if replay:
            loss = loss + self.objective.loss(out[len(labels) :], replay)["loss"]
        return {"loss": loss}


def evaluator(pixels: torch.Tensor, labels: torch.Tensor, predict: Any, env: Env, batch: int = 256) -> Any:
    """model -> (score, {"val_top1", "val_loss"}) over all rows, the rows shared among the ranks.

    Counts are summed as integers, so accuracy does not depend on the number of ranks. The score is top-1, and
    among equals the lower loss.
    """
    mine = slice(env.rank, None, env.world)
    pixels, labels = pixels[mine], labels[mine]

    @torch.inference_mode()
    def evaluate(model: nn.Module) -> tuple[float, dict[str, float]]:
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=env.device)
        for at in range(0, len(labels), batch):
            x, y = pixels[at : at + batch].to(env.device), labels[at : at + batch].to(env.device)
            logits = predict(model, x).float()
            sums[0] += (logits.argmax(1) == y).sum()
            sums[1] += F.cross_entropy(logits, y, reduction="sum")
            sums[2] += len(y)
        if env.world > 1:
            dist.all_reduce(sums)
        right, loss, count = sums.tolist()
        top1, nll = right / count, loss / count
        return top1 - 1e-5 * min(nll, 50.0), {"val_top1": top1, "val_loss": nll}

    return evaluate


@torch.inference_mode()
def _features(model: nn.Module, preprocess: Preprocess, pixels: torch.Tensor, env: Env) -> torch.Tensor:
    model.eval()
    batches = (pixels[i : i + 256].to(env.device) for i in range(0, len(pixels), 256))
    return torch.cat([pooled_features(model, preprocess.normalise(x)).float() for x in batches])


def _fit_classifier(model: nn.Module, preprocess: Preprocess, labels: Labels, env: Env) -> None:
    """Set a pretrained student's untrained classifier to a linear probe of its features, for a fair start.

    The probe sees features of unit length; its weights are divided by the mean length, since the classifier does not.
    """
    pixels, y = labels.load("train", "pixels")
    val_pixels, val_y = labels.load("val", "pixels")
    features = _features(model, preprocess, pixels, env)
    classifier = classifier_of(model)
    val = (_features(model, preprocess, val_pixels, env), val_y)
    head = probe_head(features, y, len(classifier.weight), val=val)
    with torch.no_grad():
        weight = head.weight / features.norm(dim=1).mean()
        classifier.weight.copy_(weight.view_as(classifier.weight))
        assert classifier.bias is not None  # classifier_of has checked it
        classifier.bias.copy_(head.bias)


def _settle_precision(
    directory: Dir, spec: StudentSpec, model: nn.Module, env: Env, batch: int, wish: Any
) -> Precision:
    size = spec.image_size
    # A measurement may end differently next time. The first decision of a store holds for every rank, restart
    # and seed, so that runs differ by what the recipe says alone.
    name = f"{digest([spec.name, spec.kwargs, size, batch, env.world, str(env.device.type), cpu_model(), wish])}.json"
    found: list[Any] = [None]
    if env.rank == 0:
        if directory.exists(name):
            found = [Precision.from_dict(directory.read_json(name))]
        else:
            found = [choose_precision(model, env.device, size, batch, train=True, precision=wish)]
            directory.write_json(name, found[0].to_dict())
    if env.world > 1:
        dist.broadcast_object_list(found, 0)
    chosen: Precision = found[0]
    if chosen.channels_last:
        model.to(memory_format=torch.channels_last)
    return chosen


@dataclass(frozen=True)
class StudentSpec:
    """How to make the student, and the weights to start from (a file in the store)."""

    name: str
    kwargs: dict[str, Any]
    num_classes: int
    image_size: int
    pretrained: bool = False
    checkpoint: str | None = None
    start: tuple[Dir, str] | None = None

    def build(self, env: Env, seed: int) -> tuple[nn.Module, Preprocess]:
        torch.manual_seed(seed)
        student = build_student(
            self.name, self.kwargs, self.num_classes, self.image_size, self.pretrained, self.checkpoint
        )
        if self.start is not None:
            from safetensors.torch import load

            directory, name = self.start
            student.model.load_state_dict(load(directory.read(name)))
        return student.model.to(env.device), student.preprocess


@dataclass(frozen=True)
class TransferJob:
    """Pretraining on the target cache."""

    settings: Settings
    student: StudentSpec
    cache: Cache
    val: Labels
    objective: recipes.Objective
    part: recipes.Train
    directory: Dir

    def build(self, env: Env) -> Program:
        model, preprocess = self.student.build(env, self.settings.seed)
        batch = max(1, -(-int(self.part.batch_size or 1) // env.world))
        precision = _settle_precision(self.directory, self.student, model, env, batch, self.part.precision)
        objective = build_objective(self.objective)
        objective.setup(Context(self.student.num_classes, feature_dim(model), self.cache.embed_dim, self.settings.seed))
        reads_logits = objective.reads == "logits"
        if not reads_logits:
            # It takes no part in the loss; the optimizer and DDP must not wait for it.
            classifier_of(model).requires_grad_(False)
        module = Pretrain(model if reads_logits else Features(model), preprocess, objective).to(env.device)
        if self.part.compile:
            module.student = torch.compile(module.student)  # type: ignore[assignment]
        feed = self.cache.feed(self.part, env, batch, self.settings.seed)
        pixels, labels = self.val.load("val", "pixels")
        size = (3, *preprocess.size)
        return Program(
            module=module,
            model=model,
            groups=decay_groups(model, self.settings.weight_decay) + decay_groups(objective, 0.0),
            batches=lambda start, stop: _to_device(feed.batches(start, stop), env.device),
            evaluate=evaluator(pixels, labels, lambda m, x: m(preprocess.normalise(x)), env) if reads_logits else None,
            flops_per_step=train_flops(model, size) * batch * env.world,
            images_per_step=batch * env.world,
            device=env.device,
            autocast=precision.autocast_dtype,
        )


@dataclass(frozen=True)
class FinetuneJob:
    """Finetuning on the labels; from random weights it is the scratch floor."""

    settings: Settings
    student: StudentSpec
    labels: Labels
    policy: ViewPolicy
    batch: int
    objective: recipes.Objective
    part: recipes.Train
    directory: Dir
    cache: Cache | None = None
    replay: float = 0.0

    def build(self, env: Env) -> Program:
        model, preprocess = self.student.build(env, self.settings.seed)
        batch = max(1, -(-self.batch // env.world))
        objective = build_objective(self.objective)
        if self.student.start is not None and objective.reads == "features":
            _fit_classifier(model, preprocess, self.labels, env)
        # The distillation term reads predictions; after feature matching there is none to keep.
        extra = round(batch * self.replay) if self.cache and objective.reads == "logits" else 0
        precision = _settle_precision(self.directory, self.student, model, env, batch + extra, self.part.precision)
        module = Supervise(model, preprocess, objective).to(env.device)
        canvases, labels = self.labels.load("train", "canvas")
        pixels, val_labels = self.labels.load("val", "pixels")
        size = preprocess.size

        def batches(start: int, stop: int) -> Iterator[Batch]:
            rows = _label_feed(len(labels), batch, env, self.settings.seed).batches(start, stop)
            replayed = (
                self.cache.feed(self.part, env, extra, self.settings.seed + 1).batches(start, stop)
                if self.cache and extra
                else None
            )
            for step, row in enumerate(rows, start):
                take = torch.from_numpy(row["row"])
                x = canvases[take].to(env.device)
                seed = self.settings.seed * 1000 + env.rank
                out = {
                    "images": random_views(x, self.policy, seed=seed, step=step, size=size[0]),
                    "label": labels[take].to(env.device),
                }
                if replayed is not None:
                    more = next(replayed)
                    out["replay_pixels"] = torch.from_numpy(np.array(more["pixels"])).to(env.device)
                    out["replay_logits"] = torch.from_numpy(np.array(more["logits"])).to(env.device)
                yield out

        images = (batch + extra) * env.world
        return Program(
            module=module,
            model=model,
            groups=decay_groups(model, self.settings.weight_decay),
            batches=batches,
            evaluate=evaluator(pixels, val_labels, lambda m, x: m(preprocess.normalise(x)), env),
            flops_per_step=train_flops(model, (3, *size)) * images,
            images_per_step=images,
            device=env.device,
            autocast=precision.autocast_dtype,
        )


@dataclass(frozen=True)
class AdaptJob:
    """Finetuning of the teacher's image tower and head on the labels, with layer-wise learning rate decay."""

    settings: Settings
    start: Dir
    labels: Labels
    policy: ViewPolicy
    part: recipes.Finetuning

    def build(self, env: Env) -> Program:
        with self.start.local() as folder:
            teacher = AdaptedTeacher.load(folder, env.device)
        batch = max(1, -(-self.part.batch_size // env.world))
        canvases, labels = self.labels.load("train", "canvas")
        pixels, val_labels = self.labels.load("val", "pixels")
        size = teacher.preprocess.size
        groups = teacher.param_groups(self.part.layer_decay, self.part.weight_decay, self.part.head_lr / self.part.lr)

        def batches(start: int, stop: int) -> Iterator[Batch]:
            rows = _label_feed(len(labels), batch, env, self.settings.seed).batches(start, stop)
            for step, row in enumerate(rows, start):
                take = torch.from_numpy(row["row"])
                seed = self.settings.seed * 1000 + env.rank
                x = random_views(canvases[take].to(env.device), self.policy, seed=seed, step=step, size=size[0])
                yield {"images": x, "label": labels[take].to(env.device)}

        return Program(
            module=_Adapt(teacher),
            model=teacher,
            groups=groups,
            batches=batches,
            evaluate=evaluator(pixels, val_labels, lambda m, x: m.logits(x), env),
            flops_per_step=train_flops(teacher.image_tower, (3, *size)) * batch * env.world,
            images_per_step=batch * env.world,
            device=env.device,
            autocast=torch.bfloat16 if env.device.type == "cuda" else None,
        )


class _Adapt(nn.Module):
    def __init__(self, teacher: AdaptedTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"loss": F.cross_entropy(self.teacher.logits(batch["images"]).float(), batch["label"])}


def _label_feed(count: int, batch: int, env: Env, seed: int) -> Feed:
    def read(windows: Any) -> Iterator[dict[str, np.ndarray]]:
        for window in windows:
            yield {"row": np.concatenate([np.arange(s.start, s.rows, s.step) for s in window])}

    world = env.world if count >= env.world else 1  # fewer images than ranks: every rank sees all
    return Feed(
        [("labels", count)], read, batch=batch, rank=env.rank % world, world=world, seed=seed + env.rank * (world == 1)
    )


def _to_device(rows: Iterator[dict[str, np.ndarray]], device: torch.device) -> Iterator[Batch]:
    for row in rows:
        yield {k: torch.from_numpy(np.ascontiguousarray(v)).to(device, non_blocking=True) for k, v in row.items()}
