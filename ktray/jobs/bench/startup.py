"""The time of a job from the shell to its first batch, by part. Run as a program, this module is such a job."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ktray.distributed.allocation import cluster_allocation
from ktray.distributed.connect import connect
from ktray.jobs.bench.lesson import CASES, ensure_targets, less
from ktray.jobs.bench.rows import BenchRow
from ktray.jobs.bench.training import VARIANTS, Watched, run_job

TARGET = 10.0  # seconds from the start of TRANSFER to its first batch
CASE = "mobilenetv3_small_050"


def startup(folder: Path, repeats: int, quick: bool = False) -> Iterator[BenchRow]:
    """Measure seconds of new processes, each with its own Ray cluster; the transfer set exists.

    Args:
        quick: use few images.

    Raises:
        subprocess.CalledProcessError: a process failed; its message is on the terminal.
    """
    turns, case = [], less(CASES[CASE]) if quick else CASES[CASE]
    for _ in range(repeats):
        began = time.time()
        command = [sys.executable, "-m", "ktray.jobs.bench.startup", str(folder), repr(began), str(case.images)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        turns.append(json.loads(done.stdout.splitlines()[-1]))
    middle = sorted(turns, key=lambda turn: turn["first batch"])[len(turns) // 2]
    facts: dict[str, float | int | str] = {f"{part} (s)": seconds for part, seconds in middle.items()}
    reached = [turn["first batch"] for turn in turns]
    yield BenchRow(
        "first batch after transfer starts, fresh processes", "s", "at most", [TARGET] * repeats, reached, facts
    )


def note(path: Path, step: int) -> None:
    """Write the time of the first batch to a file."""
    if step == 0:
        path.write_text(repr(time.time()))


def main(arguments: list[str]) -> None:
    """Run a job like jobs/distill.py until the first batch; prints seconds by part."""
    folder, began = Path(arguments[0]), float(arguments[1])
    case = replace(CASES[CASE], images=int(arguments[2]))
    imported = time.time()
    connect()
    plan = cluster_allocation(1, "auto")
    connected = time.time()
    targets = ensure_targets(case, folder, plan)
    variant, path = VARIANTS[0], folder / "first-batch"
    path.unlink(missing_ok=True)
    started = time.time()
    run_job(Watched(targets.job(variant.mode, 4, variant.part(targets.case.batch)), partial(note, path)), plan, folder)
    ended, first = time.time(), float(path.read_text())
    parts = {
        "imports": imported - began,
        "Ray": connected - imported,
        "first batch": first - started,
        "4 steps, evaluation and checkpoint": ended - first,
    }
    print(json.dumps(parts))


if __name__ == "__main__":
    # Workers import `note` by the name of its module, which is not ``__main__``.
    from ktray.jobs.bench.startup import main as job

    job(sys.argv[1:])
