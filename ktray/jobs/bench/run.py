"""The benchmarks of a recipe in one run, their table, and the facts about the machine."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from ktray.accounting.device import describe_device, device_name, usable_cpus, versions
from ktray.data.sources.listing import list_shards
from ktray.distributed.allocation import Allocation, cluster_allocation
from ktray.distributed.connect import connect
from ktray.errors import KtrayError
from ktray.jobs.bench.embedding import embedding, encoder
from ktray.jobs.bench.gpu import gpu
from ktray.jobs.bench.ingest import ingest
from ktray.jobs.bench.lesson import CASES
from ktray.jobs.bench.machine import busy_cores, peak_memory
from ktray.jobs.bench.memory import memory
from ktray.jobs.bench.mlflow import log
from ktray.jobs.bench.neighbour import neighbour
from ktray.jobs.bench.order import order
from ktray.jobs.bench.reading import reading
from ktray.jobs.bench.reuse import reuse
from ktray.jobs.bench.rows import BenchRow, markdown
from ktray.jobs.bench.searching import searching
from ktray.jobs.bench.startup import startup
from ktray.jobs.bench.training import training
from ktray.jobs.bench.workers import workers
from ktray.miniverse.photos import ensure_tars
from ktray.recipe.load import dump
from ktray.recipe.schema import Recipe
from ktray.reporting.result import SCHEMA, BenchResult, finished, write_result
from ktray.stages.speed import measured_speeds
from ktray.storage.clock import day, stamp
from ktray.storage.store import Store
from ktray.tracking.tags import commit

logger = logging.getLogger("ktray")

# Above this number of cores that are busy with other work, a line warns.
_IDLE = 0.2


def bench(recipe: Recipe, debug: bool = False) -> dict[str, Any]:
    """Run ``bench.only`` on this machine; returns the content of ``result.json``.

    Raises:
        KtrayError: the store is not a local folder.
    """
    if "://" in recipe.store:
        raise KtrayError(
            f"jobs/bench.py measures this machine, but the store '{recipe.store}' is not a local folder",
            "Set store= to a folder on this machine.",
        )
    store = Store(recipe.store)
    store.check_writable()
    recipe = quick(recipe) if recipe.bench.quick else recipe
    busy = busy_cores()
    if busy is not None and busy > _IDLE:
        logger.info(f"bench     {busy:.1f} cores are busy with other work, so the rates below are too low and vary")
    connect(debug)
    plan = cluster_allocation(recipe.cluster.span, recipe.cluster.use_gpu)
    logger.info(plan.line)
    began = time.time()
    rows: list[BenchRow] = []
    with peak_memory() as peak:
        for name in recipe.bench.only:
            logger.info(f"bench     {name}")
            for row in _BENCHES[name](recipe, Path(store.path) / "bench", plan):
                rows.append(row)
                if not recipe.bench.quick:  # the rates of a quick bench are too rough to plan with
                    keep_speed(store, row, bool(plan.worker_gpus))
                logger.info(markdown([row]).splitlines()[-1])
    run_id = f"{stamp()}-bench-{uuid.uuid4().hex[:4]}"
    folder = store.run(run_id)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": run_id,
        "rows": [row.to_dict() for row in rows],
        "peak_memory_bytes": peak.bytes,
        "busy_cores_before": busy,
        "commit": (commit() or "")[:7] or None,
        "versions": versions(),
        "device": describe_device(),
        **finished(began),
        "wall_seconds": round(time.time() - began, 1),
    }
    folder.write("recipe.yaml", dump(recipe).encode())
    folder.write("bench.md", _page(result, rows, recipe.bench.quick).encode())
    result["mlflow"] = log(recipe, Path(store.path), result, rows)
    result = write_result(folder, BenchResult(**result))
    if recipe.bench.json_file:
        target = Path(recipe.bench.json_file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1))
    return {**result, "folder": folder.uri}


def keep_speed(store: Store, row: BenchRow, gpu: bool) -> None:
    """Keep the speed of a stage that a row measured, for plans of runs with this store.

    Args:
        gpu: whether GPUs worked.
    """
    if row.stage is None:
        return
    facts = {**row.stage.facts, "device": device_name(describe_device(), gpu)}
    measured_speeds(store).record(facts, row.stage.measured(median(row.reached)), stamp(), bench=True)


def quick(recipe: Recipe) -> Recipe:
    """Return a recipe with so little data that the benchmarks take three minutes on two cores; the rates are rough."""
    teacher = CASES["mobilenetv3_small_050"].teacher  # the training rows need its weights in any case
    few = {"repeats": 1, "images": 300, "encoders": [teacher], "vectors": 20_000}
    return recipe.model_copy(update={"bench": recipe.bench.model_copy(update=few)})


def _read(recipe: Recipe, folder: Path, plan: Allocation) -> list[BenchRow]:
    # The size of a shard that ktray makes of single files, and at least two shards for each core.
    images_per_tar = min(1000, math.ceil(recipe.bench.images / (2 * usable_cpus())))
    shards = list_shards(ensure_tars(folder / "photos", recipe.bench.images, images_per_tar))
    return [reading(shards, plan, usable_cpus(), recipe.bench.repeats)]


def _embed(recipe: Recipe, folder: Path, plan: Allocation) -> list[BenchRow]:
    # Small shards, because an encoder takes seconds for a shard and should not wait long for its first one.
    images = max(1, recipe.bench.images // (3 if recipe.bench.quick else 1))
    shards = list_shards(ensure_tars(folder / "photos", images, a_tar=50))
    return [
        embedding(shards, images, encoder(name, folder), plan, usable_cpus(), recipe.bench.repeats, folder)
        for name in recipe.bench.encoders
    ]


def _search(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    part = recipe.bench
    return searching(folder, part.vectors, plan, usable_cpus(), part.repeats, part.quick)


def _ingest(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return ingest(folder, plan, usable_cpus(), recipe.bench.repeats, recipe.bench.quick)


def _train(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return training(folder, plan, recipe.bench.repeats, recipe.bench.quick)


def _workers(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return workers(folder, plan, recipe.bench.repeats, recipe.bench.quick)


def _startup(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return startup(folder, recipe.bench.repeats, recipe.bench.quick)


def _reuse(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return reuse(folder, plan, *((2, 256) if recipe.bench.quick else ()))


def _memory(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return memory(folder, plan, *((4,) if recipe.bench.quick else ()))


def _order(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return order()


def _gpu(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return gpu(folder, plan, usable_cpus(), recipe.bench.quick, recipe.bench.vectors)


def _neighbour(recipe: Recipe, folder: Path, plan: Allocation) -> Iterator[BenchRow]:
    return neighbour(folder, plan, recipe.bench.repeats, recipe.bench.quick)


_BENCHES: dict[str, Callable[[Recipe, Path, Allocation], Iterable[BenchRow]]] = {
    "read": _read,
    "embed": _embed,
    "search": _search,
    "ingest": _ingest,
    "train": _train,
    "workers": _workers,
    "startup": _startup,
    "reuse": _reuse,
    "memory": _memory,
    "gpu": _gpu,
    "order": _order,
    "neighbour": _neighbour,
}


def _page(result: dict[str, Any], rows: list[BenchRow], rough: bool) -> str:
    device = result["device"]
    gpus = ", ".join(gpu["name"] for gpu in device["gpus"]) or "no GPU"
    facts = [f"- {row.name}: {', '.join(f'{k} {_value(v)}' for k, v in row.facts.items())}" for row in rows]
    about = (
        f"{device['cpu']}, {device['cores']} cores, {gpus}; commit {result['commit']}; {day()}; "
        f"torch {result['versions'].get('torch')}, ray {result['versions'].get('ray')}; other work before the start: "
        f"{'unknown' if result['busy_cores_before'] is None else format(result['busy_cores_before'], '.2f')} cores; "
        f"at most {result['peak_memory_bytes'] / 2**30:.1f} GiB of memory in all processes"
    )
    note = ["Measured with bench.quick: one turn on little data. The rates are rough, and lower than without it.", ""]
    return "\n".join([markdown(rows), *(note if rough else []), about, "", *facts, ""])


def _value(value: float | int | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
