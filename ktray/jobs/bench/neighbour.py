"""Training on CPUs beside other programs that use all cores, against the same training alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ktray.accounting.device import usable_cpus
from ktray.distributed.allocation import Allocation
from ktray.jobs.bench.lesson import CASES, BenchTargets, ensure_targets, less
from ktray.jobs.bench.rows import BenchRow, in_turns
from ktray.jobs.bench.training import VARIANTS, run_job, second_half

CASE = "miniverse"
STEPS = 600  # of which the second half is measured: the first one finds the number of threads


def neighbour(folder: Path, plan: Allocation, repeats: int, quick: bool = False) -> Iterator[BenchRow]:
    """Measure images a second of TRANSFER with and without one busy program for each core.

    A fair share is half of the cores.

    Args:
        quick: use fewer steps.
    """
    targets = ensure_targets(less(CASES[CASE]) if quick else CASES[CASE], folder, plan)
    steps = STEPS // 4 if quick else STEPS
    losses: dict[str, float] = {}

    def beside(count: int) -> float:
        with busy_programs(count):
            rate, losses["beside them" if count else "alone"] = _rate(targets, steps, plan, folder)
            return rate

    cores = max(1, int(usable_cpus()))
    if not quick:
        beside(0)  # the first training measures number formats, and its choice holds for the others
    rates = in_turns(partial(beside, 0), partial(beside, cores), repeats, warm=False)
    facts: dict[str, float | int | str] = {f"loss {when}": loss for when, loss in losses.items()}
    yield BenchRow(f"train beside {cores} busy programs", "images/s", "the same alone", *rates, facts)


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy with programs of one thread each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2 * bool(count))
        yield
    finally:
        for program in programs:
            program.kill()
        for program in programs:
            program.wait()


def _rate(targets: BenchTargets, steps: int, plan: Allocation, folder: Path) -> tuple[float, float]:
    """Images a second of the second half of the steps, and the last loss."""
    batch = targets.case.batch * plan.workers
    outcome, _ = run_job(targets.job("cached", steps, VARIANTS[0].part(batch)), plan, folder)
    curve = outcome.state.curve
    return second_half(curve, batch), curve[-1]["loss"]
