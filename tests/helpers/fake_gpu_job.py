"""A job on a Ray that believes in GPUs which this machine does not have, so that device workers compute on the CPU.

Usage: fake_gpu_job.py GPUS FOLDER JOB key=value ...    JOB: distill, tune, bench or devices
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch


def seen() -> list[Any]:
    """What a task may use: whether a GPU was assigned to it, and the device it would compute on."""
    from ktray.models import device

    return [device._assigned, device.device().type]


def main(gpus: int, folder: Path, job: str, keys: list[str]) -> None:
    ray.init(
        address="local", num_cpus=4, num_gpus=gpus, include_dashboard=False, object_store_memory=300_000_000,
        log_to_driver=False,
    )  # fmt: skip
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

    folder: str
    model: Any = field(default_factory=Constant)
    reads: tuple[str, ...] = ("x",)

    def compute(self, model: int, columns: dict[str, Any]) -> dict[str, Any]:
        die_once(int(columns["x"][0]), Path(self.folder) / "died with a model")
        return {"sum": columns["x"] + model, "threads": np.full(len(columns["x"]), torch.get_num_threads())}

    def finish(self, item: dict[str, Any], columns: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
        return {"item": item["x"], "sum": computed["sum"].tolist(), "threads": computed["threads"].tolist()}


def column(item: dict[str, Any]) -> dict[str, Any]:
    return {"x": np.array([item["x"]])}


def shard(item: dict[str, Any]) -> dict[str, Any]:
    return {"gpu": bool(seen()[0])}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
