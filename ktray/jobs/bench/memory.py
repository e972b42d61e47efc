"""Whether memory stays constant over epochs, and whether more data than fits passes through Ray's object store.

Run as a program, this module does the second measurement, in a Ray cluster of its own with a small object store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ktray.distributed.allocation import Allocation, cluster_allocation
from ktray.distributed.connect import connect
from ktray.distributed.ray_internals import spilled_bytes
from ktray.jobs.bench.lesson import CASES, ensure_targets
from ktray.jobs.bench.machine import held_by_process
from ktray.jobs.bench.rows import BenchRow
from ktray.jobs.bench.training import VARIANTS, run_job
from ktray.recipe.schema import TrainConfig
from ktray.training.worker import WorkerContext

CASE = "mobilenetv3_small_050"
EPOCHS = 12
STORE_BYTES = 300_000_000
TIMES = 10  # size of the data that passes through the object store, as a multiple of the store's size
WINDOW_BYTES = 64_000_000


def memory(folder: Path, plan: Allocation, epochs: int = EPOCHS) -> Iterator[BenchRow]:
    """Measure memory in the last epochs against memory in the second and third, and what the object store spilled."""
    targets = ensure_targets(CASES[CASE], folder, plan)
    variant = next(variant for variant in VARIANTS if not variant.resident)
    batch = targets.case.batch
    steps_per_epoch = targets.case.images // batch
    job = targets.job(variant.mode, epochs * steps_per_epoch, variant.part(batch))
    samples: list[tuple[float, dict[int, int]]] = []
    spilled, stop = spilled_bytes(), threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            samples.append((time.time(), held_by_process(os.getpid())))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        outcome, _ = run_job(job, plan, folder)
    finally:
        stop.set()
        watcher.join()
    ended = time.time()
    seconds = float(outcome.state.seconds)
    early = _between(samples, ended - seconds * (1 - 1 / epochs), ended - seconds * (1 - 3 / epochs))
    late = _between(samples, ended - seconds * 2 / epochs, ended)
    both = early.keys() & late.keys()
    growth = {pid: late[pid] - early[pid] for pid in both}
    facts: dict[str, float | int | str] = {
        "epochs": epochs,
        "processes": len(both),
        "largest growth of one process (MiB)": max(growth.values(), default=0) / 2**20,
        "spilled bytes": spilled_bytes() - spilled,
    }
    name = f"memory of all processes in epochs {epochs - 1} and {epochs}, read from disk"
    sums = ([sum(early[p] for p in both) / 2**20], [sum(late[p] for p in both) / 2**20])
    yield BenchRow(name, "MiB", "in epochs 2 and 3", *sums, facts)
    yield passing(folder)


def _between(samples: list[tuple[float, dict[int, int]]], first: float, last: float) -> dict[int, float]:
    """Return the mean memory over the samples in a time span, by process, for processes that are in all samples."""
    chosen = [held for at, held in samples if first <= at <= last]
    if not chosen:
        return {}
    pids = set.intersection(*(set(held) for held in chosen))
    return {pid: sum(held[pid] for held in chosen) / len(chosen) for pid in pids}


def passing(folder: Path) -> BenchRow:
    """Measure the bytes of rows that training reads through an object store of a tenth of their size."""
    command = [sys.executable, "-m", "ktray.jobs.bench.memory", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    amounts = json.loads(done.stdout.splitlines()[-1])
    facts: dict[str, float | int | str] = {"spilled bytes": int(amounts["spilled"]), "rows": int(amounts["rows"])}
    sizes = [amounts["store"] / 1e9], [amounts["read"] / 1e9]
    return BenchRow("rows read through a small object store", "GB", "its size", *sizes, facts)


def main(arguments: list[str]) -> None:
    """Read `TIMES` times the object store's size; prints what was read and what was spilled."""
    connect(object_store=STORE_BYTES)
    folder, plan = Path(arguments[0]), cluster_allocation(1, False)
    amounts: dict[str, Any] = read_past(folder, plan, TIMES * STORE_BYTES)
    print(json.dumps({**amounts, "store": STORE_BYTES, "spilled": spilled_bytes()}))


def read_past(folder: Path, plan: Allocation, most: int) -> dict[str, int]:
    """Stream a set of at least ``most`` bytes once, in the same way as training reads rows that are not in memory. The
    set consists of repeated shards of the case."""
    targets = ensure_targets(CASES[CASE], folder, plan)
    target_set = targets.target_set("cached")
    again = -(-most // (target_set.row_bytes * targets.case.images))
    target_set = replace(target_set, shards=target_set.shards * again)
    part = TrainConfig(resident_bytes=0, window_bytes=WINDOW_BYTES)
    batch = targets.case.batch
    steps = sum(rows for _, rows in target_set.shards) // batch
    read = rows = 0
    for batch_rows in target_set.batches(
        part, WorkerContext(torch.device("cpu"), 0, 1, plan.decode_cpus), batch, 0, 0, steps
    ):
        rows += len(batch_rows["pixels"])
        read += sum(value.nbytes for value in batch_rows.values() if isinstance(value, torch.Tensor))
    return {"rows": rows, "read": read}


if __name__ == "__main__":
    main(sys.argv[1:])
