"""The savings by stored targets: a sweep of complete runs from one cache, against a teacher in every step."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ktray import recipe as recipes
from ktray.distributed.allocation import Allocation
from ktray.jobs.bench.embedding import encoder
from ktray.jobs.bench.rows import BenchRow
from ktray.miniverse import ensure_gallery
from ktray.pipeline import run as pipeline
from ktray.recipe.schema import Recipe
from ktray.reporting.log import muted

logger = logging.getLogger("ktray")

EPOCHS, IMAGES, BATCH = 20, 500, 128
# Eight trials, like those of a search over the loss and the learning rate.
TRIALS: tuple[dict[str, Any], ...] = tuple(
    {"train.lr": lr, "objective.temperature": temperature, "objective.mixup": mixup}
    for lr, temperature, mixup in itertools.product((0.01, 0.02), (1.0, 2.0), (0.0, 0.2))
)


@dataclass(frozen=True)
class Pair:
    """A teacher for the default task's student.

    Attributes:
        network: the architecture, see `encoder`; None: the miniverse's teacher, which is small.
    """

    name: str
    network: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)


PAIRS = (
    Pair("the miniverse's teacher"),
    # The ratio of teacher cost to student cost is that of a ViT-L/14 and a FastViT-S12: about 15 forward passes.
    Pair(
        "a ViT-S/16 teacher at 64 px",
        "timm:vit_small_patch16_224",
        {"teacher.image_size": 64, "teacher.adapt": "probe"},
    ),
)


@dataclass(frozen=True)
class Sweep:
    """Costs of trials: FLOPs, seconds and validation accuracy of each, and the total FLOPs of TEACH (``stored``)."""

    flops: list[float]
    seconds: list[float]
    accuracy: list[float]
    stored: float


def reuse(folder: Path, plan: Allocation, trials: int = len(TRIALS), images: int = IMAGES) -> Iterator[BenchRow]:
    """Measure compute and time of a live teacher, with stored targets as the limit."""
    for pair in PAIRS:
        sweeps = {}
        for mode in ("cached", "live"):
            sweeps[mode] = sweep(pair, mode, folder, plan, trials, images)
            logger.info(f"bench     {pair.name}, {mode}: {sum(sweeps[mode].seconds):.0f} s for {trials} trials")
        yield from compared(pair.name, sweeps["cached"], sweeps["live"])


def compared(name: str, cached: Sweep, live: Sweep) -> list[BenchRow]:
    """Return two rows, for compute and time; the facts of the first contain further figures."""
    trials = len(live.flops)
    # In both sweeps, the first trial adapted the teacher and drew the transfer set, so the difference is the teacher's.
    flops_per_epoch = (sum(live.flops) - sum(cached.flops) + cached.stored) / (EPOCHS * trials)
    apart = [a - b for a, b in zip(cached.accuracy, live.accuracy, strict=True)]
    facts: dict[str, float | int | str] = {
        "one trial's compute": live.flops[0] / cached.flops[0],
        "one trial's time": live.seconds[0] / cached.seconds[0],
        "stored targets pay off after epochs": cached.stored / flops_per_epoch if flops_per_epoch else 0.0,
        "accuracy stored": mean(cached.accuracy),
        "accuracy live": mean(live.accuracy),
        "difference, mean over trials": mean(apart),
        "and its s.d.": stdev(apart) if trials > 1 else 0.0,
        "s.d. of the trials' accuracy": stdev(live.accuracy) if trials > 1 else 0.0,
    }
    what = f"a live teacher, {trials} trials of {EPOCHS} epochs, {name}"
    compute = ([sum(cached.flops) / 1e12], [sum(live.flops) / 1e12])
    seconds = ([sum(cached.seconds)], [sum(live.seconds)])
    return [
        BenchRow(f"compute of {what}", "TFLOP", "stored targets", *compute, facts),
        BenchRow(f"time of {what}", "s", "stored targets", *seconds),
    ]


def sweep(pair: Pair, mode: str, folder: Path, plan: Allocation, trials: int, images: int) -> Sweep:
    """Run complete runs in a new store, one after the other; only the gallery exists before."""
    home = folder / "reuse" / f"{pair.network or 'own'}-{mode}".replace(":", "-")
    shutil.rmtree(home, ignore_errors=True)
    base = recipe(pair, mode, folder, home, images)
    flops: list[float] = []
    seconds: list[float] = []
    accuracy: list[float] = []
    stored = 0.0
    for keys in TRIALS[:trials]:
        began = time.perf_counter()
        with muted():
            result = pipeline.run(recipes.override(base, keys), plan=plan, trial=True)
        seconds.append(time.perf_counter() - began)
        flops.append(float(result["cost"]["flops"]["total"]))
        accuracy.append(float(result["metric"]["val"]))
        stored += float(result["cost"]["flops"].get("teach", 0.0))
    return Sweep(flops, seconds, accuracy, stored)


def recipe(pair: Pair, mode: str, folder: Path, home: Path, images: int) -> Recipe:
    """Return the default task with a random transfer set and without the baseline from scratch."""
    keys: dict[str, Any] = {
        "store": str(home),
        "gallery.data": str(ensure_gallery(folder)),
        "transfer.source": "generic",
        "transfer.size": images,
        "teach.mode": mode,
        "train.steps": max(1, EPOCHS * images // BATCH),
        "train.batch_size": BATCH,
        "finetune.steps": 20,
        "baselines.scratch": False,
        "baselines.start": False,
        **pair.keys,
    }
    if pair.network:
        keys |= {"teacher.name": pair.network, "teacher.checkpoint": encoder(pair.network, folder).source.checkpoint}
    return recipes.override(recipes.load("letters", []), keys)
