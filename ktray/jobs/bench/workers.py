"""The gain by more workers, and the cost of losing one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ktray.distributed.allocation import Allocation, cluster_allocation
from ktray.jobs.bench.lesson import CASES, FEWER, BenchTargets, ensure_targets, less
from ktray.jobs.bench.rows import BenchRow, in_turns
from ktray.jobs.bench.training import STEPS, VARIANTS, Watched, run_job, through_ktray
from ktray.training.worker import TrainingSpec

CASE = "mobilenetv3_small_050"
CACHED = VARIANTS[0]


def workers(folder: Path, plan: Allocation, repeats: int, quick: bool = False) -> Iterator[BenchRow]:
    """Measure two workers with one thread each against one worker with one thread, and a run whose worker is killed
    half-way against an undisturbed run.

    Args:
        quick: use few images and steps, no turn to warm up, and kill no worker.
    """
    targets = ensure_targets(less(CASES[CASE]) if quick else CASES[CASE], folder, plan)
    steps = STEPS[CASE][0] // (FEWER if quick else 1)
    one, two = (replace(cluster_allocation(count, False), worker_threads=1) for count in (1, 2))
    rates = in_turns(
        lambda: 2 * through_ktray(targets, CACHED, steps, one, folder, []),
        lambda: through_ktray(targets, CACHED, steps, two, folder, []),
        repeats,
        warm=not quick,
    )
    yield BenchRow(
        f"train cached, 2 workers of a thread, {targets.case.name}",
        "images/s",
        "twice one worker with one thread",
        *rates,
    )
    if quick:
        return
    whole, broken = in_turns(
        lambda: undisturbed(targets, steps, plan, folder), lambda: killed(targets, steps, plan, folder), repeats
    )
    lost = [steps * targets.case.batch * (1 / b - 1 / a) for a, b in zip(whole, broken, strict=True)]
    facts: dict[str, float | int | str] = {"seconds lost": sorted(lost)[len(lost) // 2], "steps": steps}
    name = f"transfer from start to end, its worker killed half-way, {targets.case.name}"
    yield BenchRow(name, "images/s", "undisturbed", whole, broken, facts)


def undisturbed(targets: BenchTargets, steps: int, plan: Allocation, folder: Path) -> float:
    """Measure images a second from the call to the last checkpoint, with a checkpoint every second."""
    return _rate(_often(targets, steps), targets, plan, folder)


def killed(targets: BenchTargets, steps: int, plan: Allocation, folder: Path) -> float:
    """Measure images a second of `undisturbed` if the worker dies half-way and another resumes from its checkpoint."""
    marker = folder / "killed"
    marker.unlink(missing_ok=True)
    return _rate(Watched(_often(targets, steps), partial(_die, marker, steps // 2)), targets, plan, folder)


def _often(targets: BenchTargets, steps: int) -> TrainingSpec:
    job = targets.job(CACHED.mode, steps, CACHED.part(targets.case.batch))
    return replace(job, settings=replace(job.settings, checkpoint_seconds=1.0))


def _rate(job: TrainingSpec, targets: BenchTargets, plan: Allocation, folder: Path) -> float:
    began = time.perf_counter()
    run_job(job, plan, folder, max_failures=1)
    return job.settings.steps * targets.case.batch / (time.perf_counter() - began)


def _die(marker: Path, at: int, step: int) -> None:
    """End the worker at a step as if it were killed, unless ``marker`` exists."""
    if step == at and not marker.exists():
        marker.touch()
        os._exit(9)
