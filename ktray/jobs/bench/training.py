"""Training from the target cache, with streaming teachers and with a live teacher, against the bare student's step; in
addition, timm's own distillation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktray.distributed.allocation import Allocation
from ktray.distributed.mailbox import open_mailbox
from ktray.distributed.retried_task import run_with_retries
from ktray.jobs.bench.lesson import CASES, CLASSES, FEWER, BenchTargets, Case, ensure_targets, less
from ktray.jobs.bench.rows import BenchRow, StageSpeed, in_turns
from ktray.models.device import device
from ktray.recipe.choice import default_objective
from ktray.recipe.schema import TrainConfig
from ktray.stages.speed_facts import transfer_facts
from ktray.storage.store import Store
from ktray.training.loop import Batch, TrainerSettings, TrainingProgram
from ktray.training.messages import Message, StepProgress
from ktray.training.outcome import Outcome
from ktray.training.ray_train import train
from ktray.training.settled import settle_precision
from ktray.training.worker import TrainingSpec, WorkerContext

PART = TrainConfig()


@dataclass(frozen=True)
class Variant:
    """A source of training rows.

    Attributes:
        mode: value of ``teach.mode``.
        resident: whether rows stay in memory after the first pass.
        with_teacher: whether the teacher runs during training.
        jpeg: JPEG quality of the stored views; None: raw pixels.
    """

    name: str
    mode: str
    resident: bool
    with_teacher: bool
    jpeg: int | None = None

    def part(self, batch: int) -> TrainConfig:
        """Return section train of the recipe.

        Args:
            batch: batch size over all workers.
        """
        keys: dict[str, Any] = {"batch_size": batch}
        if not self.resident:
            # Windows of a few shards. Otherwise the small set of the benchmark would fit into one window, and would be
            # read before the first step.
            keys |= {"resident_bytes": 0, "window_bytes": 40_000_000}
        return PART.model_copy(update=keys)


VARIANTS = (
    Variant("cached", "cached", True, False),
    Variant("cached, read from disk", "cached", False, False),
    Variant("streamed", "streamed", False, True),
    Variant("live", "live", True, True),
)
# Steps of a turn without and with a teacher, which makes a step cost several times more. The second half is measured,
# which takes some seconds.
STEPS = {"mobilenetv3_small_050": (48, 12), "miniverse": (120, 40)}


def training(folder: Path, plan: Allocation, repeats: int, quick: bool = False) -> Iterator[BenchRow]:
    """Measure images a second of the steps, without start-up, evaluation and checkpoints.

    Args:
        quick: use few images and steps and no turn to warm up, and measure only one row of the large case.
    """
    for name, case in CASES.items():
        if quick:
            case = less(case)
        targets = ensure_targets(case, folder, plan)
        steps_without, steps_with_teacher = (max(4, steps // FEWER) if quick else steps for steps in STEPS[name])
        limit_name = "bare step, tensors in memory"

        def limit(targets: BenchTargets = targets, steps: int = steps_without) -> float:
            return bare(targets, steps, plan)

        for variant in VARIANTS[:1] if quick and case.large else VARIANTS:
            waits: list[float] = []
            through = partial(
                through_ktray,
                targets,
                variant,
                steps_with_teacher if variant.with_teacher else steps_without,
                plan,
                folder,
                waits,
            )
            facts: dict[str, float | int | str] = {"batch": case.batch, "teacher": case.teacher}
            rates = in_turns(limit, through, repeats, warm=not quick)
            facts["data_wait"] = max(waits)
            steps = steps_with_teacher if variant.with_teacher else steps_without
            stage = stage_speed(targets, variant, steps, plan)
            yield BenchRow(f"train {variant.name}, {case.name}", "images/s", limit_name, *rates, facts, stage)
        if case.large and not quick:
            rates = in_turns(limit, partial(on_device, timm_step, targets, steps_with_teacher, plan), repeats)
            yield BenchRow(f"timm's distillation task, {case.name}", "images/s", limit_name, *rates)


def stage_speed(targets: BenchTargets, variant: Variant, steps: int, plan: Allocation) -> StageSpeed | None:
    """What TRANSFER's speed depends on; None for a variant that a run would not choose for so few rows."""
    if variant.jpeg is not None or not (variant.resident or variant.mode == "streamed"):
        return None
    part = variant.part(targets.case.batch * plan.workers)
    own = transfer_facts(targets.student, default_objective().name, part, variant.mode)
    images = steps * int(part.batch_size or 1)
    measured = images if variant.mode == "streamed" else images // 2
    return StageSpeed({"stage": "transfer", **own}, measured, plan.workers * plan.worker_gpus or 1.0)


def through_ktray(
    targets: BenchTargets, variant: Variant, steps: int, plan: Allocation, folder: Path, waits: list[float]
) -> float:
    """Measure images a second of the second half of TRANSFER's steps, in the workers of a run.

    Each worker has the batch size of the case. For streamed rows, all steps and the wait for the first are measured,
    since rows that were computed in advance cost as much as others.

    Args:
        waits: gets the share of the time that the first worker waited for data, as in the progress line.
    """
    batch = targets.case.batch * plan.workers
    outcome, posts = run_job(targets.job(variant.mode, steps, variant.part(batch)), plan, folder)
    waits.append(next(p.data_wait for p in reversed(posts) if isinstance(p, StepProgress) and p.data_wait is not None))
    if variant.mode == "streamed":
        return float(steps * batch / outcome.state.seconds)
    return second_half(outcome.state.curve, batch)


def run_job(job: TrainingSpec, plan: Allocation, folder: Path, max_failures: int = 0) -> tuple[Outcome, list[Message]]:
    """Run a job of TRANSFER; returns its outcome and the messages of its workers."""
    stage = Store(str(folder)).stage("bench-transfer", "0" * 16)
    stage.delete()
    posts: list[Message] = []
    with open_mailbox(posts.append) as board:
        outcome = train(job, stage, plan, board, max_failures=max_failures, on_weights=lambda path: None)
    return outcome, posts


def second_half(curve: list[dict[str, float]], batch: int) -> float:
    """Images a second between the last two evaluations of a training, which are a half of its steps apart."""
    (first, middle), (last, end) = ((row["step"], row["seconds"]) for row in curve[-2:])
    return (last - first) * batch / (end - middle)


@dataclass(frozen=True)
class Watched:
    """A job with a picklable function ``see``, which is called with the number of each step when its batch is ready."""

    job: TrainingSpec
    see: Callable[[int], None]

    @property
    def settings(self) -> TrainerSettings:
        return self.job.settings

    def build(self, env: WorkerContext) -> TrainingProgram:
        program = self.job.build(env)

        def batches(start: int, stop: int) -> Iterator[Batch]:
            for step, batch in enumerate(program.batches(start, stop), start):
                self.see(step)
                yield batch

        return replace(program, batches=batches)


def bare(targets: BenchTargets, steps: int, plan: Allocation) -> float:
    """Measure images a second of the student's supervised step (forward, backward, fused AdamW) on tensors in memory,
    in a worker like TRANSFER's."""
    return float(on_device(_bare_step, targets, steps, plan))


def on_device(work: Any, targets: BenchTargets, steps: int, plan: Allocation) -> Any:
    """Call ``work(targets, steps, threads)`` in a worker like TRANSFER's."""
    what = partial(work, targets, steps, plan.worker_threads)
    return run_with_retries(
        what, "the worker", "Use a larger machine.", 0, cpus=plan.worker_cpus, gpus=plan.worker_gpus
    )


def _bare_step(targets: BenchTargets, steps: int, threads: int) -> float:
    case, (model, preprocess, precision, place) = targets.case, _student(targets, threads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    batches = _tensors(case, place)

    def step(number: int) -> None:
        pixels, labels = batches[number % len(batches)]
        with torch.autocast(place.type, dtype=precision, enabled=precision is not None):
            loss = nn.functional.cross_entropy(model(preprocess.scale(pixels)).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _rate(step, steps, case.batch, place)


def timm_step(targets: BenchTargets, steps: int, threads: int) -> float:
    """Measure timm's LogitDistillationTask with the frozen teacher's tower, and the same student and optimizer."""
    from timm.task import LogitDistillationTask

    from ktray.jobs.bench.embedding import encoder

    case, (model, preprocess, precision, place) = targets.case, _student(targets, threads)
    teacher = encoder(case.teacher, Path(targets.home.path).parent).tower()
    side = teacher.preprocess.size
    resize = nn.Identity() if side == (case.size, case.size) else nn.Upsample(side, mode="bilinear")
    tower = nn.Sequential(resize, teacher.image_tower, nn.Linear(teacher.embed_dim, CLASSES)).to(place).eval()
    task = LogitDistillationTask(
        model, tower, nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=1.0, device=place, verbose=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    batches = _tensors(case, place)

    def step(number: int) -> None:
        pixels, labels = batches[number % len(batches)]
        with torch.autocast(place.type, dtype=precision, enabled=precision is not None):
            loss = task(preprocess.scale(pixels), labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _rate(step, steps, case.batch, place)


def _student(targets: BenchTargets, threads: int) -> Any:
    """Return the student with the number format and memory layout that TRANSFER chose."""
    torch.set_num_threads(threads)
    place = device()
    env = WorkerContext(place, 0, 1, 1.0)
    model, preprocess = targets.student.build(env, 0)
    precision = settle_precision(
        targets.home.sub("precision"), targets.student, model, env, targets.case.batch, PART.precision
    )
    return model.train(), preprocess, precision.autocast_dtype, place


def _tensors(case: Case, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.size, case.size)
    return [
        (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device),
            torch.randint(0, CLASSES, (case.batch,), generator=generator).to(device),
        )
        for _ in range(4)
    ]


def _rate(step: Any, steps: int, batch: int, device: torch.device) -> float:
    """Measure images a second of the second half of the steps."""
    half = steps // 2
    for number in range(half):
        step(number)
    _settled(device)
    began = time.perf_counter()
    for number in range(half, steps):
        step(number)
    _settled(device)
    return (steps - half) * batch / (time.perf_counter() - began)


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
