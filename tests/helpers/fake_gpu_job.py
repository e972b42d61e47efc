"""A job on a Ray that believes in GPUs which this machine does not have, so that device workers compute on the CPU.

Usage: fake_gpu_job.py GPUS FOLDER JOB key=value ...    JOB: distill, tune, bench, devices, deadly or lost
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster


def seen() -> list[Any]:
    """What a task may use: whether a GPU was assigned to it, and the device it would compute on."""
    from ktray.models import device

    return [device._assigned, device.device().type]


def main(gpus: int, folder: Path, job: str, keys: list[str]) -> None:
    size: dict[str, Any] = {"num_cpus": 4, "num_gpus": gpus, "object_store_memory": 300_000_000}
    if job == "lost":
        cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
        ray.init(cluster.address, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **size)
    from ktray import recipe as recipes
    from ktray.distributed import device_workers
    from ktray.distributed.allocation import allocate
    from ktray.distributed.ray_data import cpu_shards, map_numbered, map_shards
    from ktray.distributed.retried_task import run_with_retries

    if job == "devices":
        device_workers._DeviceWorker = slow_after_death(folder)
        plan = allocate(4, gpus, 1, 1, "auto")
        found: Any = {
            "with a GPU": run_with_retries(seen, "a", "b", 0, cpus=1, gpus=1),
            "without": run_with_retries(seen, "a", "b", 0, cpus=1),
            "numbered": [rows["gpu"].tolist() for _, rows in map_numbered([0, 1], numbered, plan)],
            "shared": sorted(
                (number, rows["sum"].tolist(), rows["writeable"].tolist())
                for number, rows in map_numbered([1, 2, 3], added, plan, [np.arange(100_000), 5])
            ),
            "killed": sorted(
                (number, rows["item"].tolist())
                for number, rows in map_numbered([4, 5, 6], fragile, plan, [str(folder)])
            ),
            "killed with a model": sorted(
                (summary["item"], summary["sum"], summary["threads"])
                for summary in map_shards([{"x": 4}, {"x": 5}, {"x": 6}], column, FragileWork(str(folder)), plan)
            ),
            "torch": "cuda" if torch.cuda.is_available() else "cpu",
            "cpu shards": [summary["gpu"] for summary in cpu_shards([{"name": "x"}], shard, plan)],
        }
    elif job == "deadly":
        plan = allocate(4, gpus, 1, 1, "auto")
        found = {
            "numbered": failure(lambda: list(map_numbered([4, 5], deadly, plan))),
            "shards": failure(lambda: list(map_shards([{"x": 4}, {"x": 5}], column, DeadlyWork(), plan))),
            "alone": failure(
                lambda: run_with_retries(partial(os._exit, 1), "the worker", "Change it.", 1, cpus=1, gpus=1)
            ),
        }
    elif job == "lost":
        found = with_a_lost_machine(cluster)
    elif job == "distill":
        from ktray.pipeline.run import run

        found = run(recipes.load(None, keys))
    elif job == "bench":
        from ktray.jobs.bench.gpu import gpu

        rows = gpu(folder / "bench", allocate(4, gpus, 1, 1, "auto"), 2, quick=True)
        found = [[row.name, row.limit, row.reached] for row in rows]
    else:
        from ktray.jobs.tune.run import tune

        found = tune(recipes.load(None, keys))
    (folder / "found.json").write_text(json.dumps(found, default=float))
    ray.shutdown()
    if job == "lost":
        cluster.shutdown()  # otherwise it ends at exit, before this process has left it


def numbered(item: int) -> dict[str, Any]:
    return {"gpu": np.array([bool(seen()[0])])}


def added(item: int, first: Any, second: int) -> dict[str, Any]:
    return {"sum": np.array([item * first.sum() + second]), "writeable": np.array([first.flags.writeable])}


def fragile(item: int, folder: str) -> dict[str, Any]:
    """The first call for the second item ends the process, as a lack of memory would."""
    die_once(item, Path(folder) / "died")
    return {"item": np.array([item])}


def die_once(item: int, marker: Path) -> None:
    if item == 5 and not marker.exists():
        marker.touch()
        os._exit(1)


def slow_after_death(folder: Path) -> Any:
    """A device worker whose process needs longer to start again than Ray's tries of a call would last."""
    from ktray.distributed.device_workers import _DeviceWorker

    class SlowWorker(_DeviceWorker):
        def __init__(self) -> None:
            time.sleep(8 if (folder / "died").exists() else 0)
            super().__init__()

    return SlowWorker


class Constant:
    def load(self) -> int:
        return 7


@dataclass(frozen=True)
class FragileWork:
    """Like `fragile`, for shards with a model."""

    folder: str = ""
    model: Any = field(default_factory=Constant)
    reads: tuple[str, ...] = ("x",)

    def compute(self, model: int, columns: dict[str, Any]) -> dict[str, Any]:
        if self.folder:
            die_once(int(columns["x"][0]), Path(self.folder) / "died with a model")
        return {"sum": columns["x"] + model, "threads": np.full(len(columns["x"]), torch.get_num_threads())}

    def finish(self, item: dict[str, Any], columns: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
        return {"item": item["x"], "sum": computed["sum"].tolist(), "threads": computed["threads"].tolist()}


def deadly(item: int) -> dict[str, Any]:
    if item == 5:
        os._exit(1)
    return {"item": np.array([item])}


class DeadlyWork(FragileWork):
    """Ends the process each time."""

    def compute(self, model: int, columns: dict[str, Any]) -> dict[str, Any]:
        deadly(int(columns["x"][0]))
        return super().compute(model, columns)


def failure(work: Any) -> list[Any]:
    """How a job tells the error of the work, and its exit code."""
    from ktray.distributed.explain import exit_code, explain

    try:
        return [work()]
    except Exception as error:
        return [explain(error), exit_code(error)]


def with_a_lost_machine(cluster: Any) -> dict[str, Any]:
    """Two machines with a GPU each, of which one is lost while both work."""
    from ktray.distributed import device_calls
    from ktray.distributed.allocation import allocate
    from ktray.distributed.ray_data import map_numbered, map_shards

    device_calls.PATIENCE_S = 3.0  # in this process; the tasks have the usual time
    plan, found = allocate(8, 2, 2, 1, "auto"), {}

    def numbered() -> list[Any]:
        return [(number, rows["item"].tolist()) for number, rows in map_numbered(list(range(12)), slow, plan)]

    def shards() -> list[Any]:
        return [(s["item"], s["sum"]) for s in map_shards([{"x": x} for x in range(12)], column, SlowWork(), plan)]

    for name, work in (("numbered", numbered), ("shards", shards)):
        second = cluster.add_node(num_cpus=4, num_gpus=1, object_store_memory=200_000_000)
        cluster.wait_for_nodes()
        lost = threading.Timer(10, cluster.remove_node, [second], {"allow_graceful": False})
        lost.start()
        found[name] = sorted(work())
        lost.join()
    return found


def slow(item: int) -> dict[str, Any]:
    time.sleep(3)
    return {"item": np.array([item])}


class SlowWork(FragileWork):
    def compute(self, model: int, columns: dict[str, Any]) -> dict[str, Any]:
        time.sleep(3)
        return super().compute(model, columns)


def column(item: dict[str, Any]) -> dict[str, Any]:
    return {"x": np.array([item["x"]])}


def shard(item: dict[str, Any]) -> dict[str, Any]:
    return {"gpu": bool(seen()[0])}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
