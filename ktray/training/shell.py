"""The Ray Train shell around the loop: workers, DDP, checkpoints in the store, progress on the board."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ktray.resources import Plan
from ktray.store import Stage, storage_error
from ktray.training.loop import Fit, Hooks, Program, Settings


@dataclass(frozen=True)
class Env:
    """Where a worker stands."""

    device: torch.device
    rank: int
    world: int
    read_cpus: float


class Job(Protocol):
    """What to train, as picklable data; the worker builds it."""

    @property
    def settings(self) -> Settings: ...

    def build(self, env: Env) -> Program: ...


@dataclass(frozen=True)
class Outcome:
    """What a training run left: state of the loop, and the cost that this attempt really had."""

    state: dict[str, Any]
    report: dict[str, Any]


def train(
    job: Job, stage: Stage, plan: Plan, board: Any, *, max_failures: int, on_weights: Callable[[Path], None]
) -> Outcome:
    """Run a job on ``plan.workers`` workers to its end; goes on from the stage's last checkpoint if there is one.

    ``on_weights`` gets the path of the final ``weights.safetensors``; the checkpoints are deleted after it.
    """
    import ray.train
    from ray import cloudpickle
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": plan.worker_cpus}
    if plan.worker_gpus:
        resources["GPU"] = plan.worker_gpus
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "job": cloudpickle.dumps(job),
            "board": board,
            "threads": plan.worker_threads,
            "read_cpus": plan.decode_cpus,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=plan.workers, use_gpu=plan.worker_gpus > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if plan.worker_gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=stage.uri,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        result = trainer.fit()
    except OSError as error:
        raise storage_error(error, stage.uri) from error
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    with result.checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "outcome.json").read_text())
        report = json.loads((Path(folder) / "report.json").read_text())
        on_weights(Path(folder) / "weights.safetensors")
    stage.delete("train")
    return Outcome(state, report)


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    from ray import cloudpickle

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config["threads"])
    device = ray.train.torch.get_device()
    # Pickled apart, so that the controller, which only passes it on, need not import what it is made of.
    job: Job = cloudpickle.loads(config["job"])
    board = config["board"]
    torch.manual_seed(job.settings.seed)
    program = job.build(Env(device, rank, world, config["read_cpus"]))
    begun = time.perf_counter()

    def progress(values: dict[str, float]) -> None:
        if rank == 0 and board is not None:
            board.post.remote(values)

    def save(folder: Path | None, metrics: dict[str, Any]) -> None:
        if folder is None:
            ray.train.report(metrics)
            return
        (folder / "report.json").write_text(json.dumps(_report(program, time.perf_counter() - begun)))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))

    with tempfile.TemporaryDirectory(prefix="ktray-train-") as scratch:
        names = iter(range(1 << 30))

        def folder() -> Path:
            path = Path(scratch) / str(next(names))
            path.mkdir()
            return path

        hooks = Hooks(save=save, progress=progress, folder=folder)
        for resume in _resume(ray.train.get_checkpoint()):
            Fit(program, job.settings, hooks, resume).run()


def _resume(checkpoint: Any) -> Iterator[Path | None]:
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _report(program: Program, seconds: float) -> dict[str, Any]:
    from ktray.device import peak_rss

    peak = torch.cuda.max_memory_allocated() if program.device.type == "cuda" else peak_rss()
    return {
        "flops_per_step": program.flops_per_step,
        "images_per_step": program.images_per_step,
        "autocast": str(program.autocast).replace("torch.", "") if program.autocast else "fp32",
        "peak_memory_bytes": int(peak),
        "seconds": seconds,
        "pid": os.getpid(),
    }
