"""The shells around the loop: workers, DDP, checkpoints in the store, progress on the board.

Ray Train runs what has several workers or a GPU. For each run it starts a controller, workers, and helpers, each of
which imports for seconds: nothing for an hour of training on a cluster, but on two cores 20 s a stage. There a single
worker without a GPU is a plain Ray task, whose process Ray keeps for the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ktray.distributed import watchdog
from ktray.distributed.allocation import Allocation
from ktray.distributed.retried_task import run_with_retries
from ktray.storage.store import Stage, storage_error
from ktray.training.loop import Trainer, TrainerCallbacks, TrainingProgram
from ktray.training.messages import LoopMessage, Message, Started
from ktray.training.outcome import CostReport, Outcome
from ktray.training.worker import TrainingSpec, WorkerContext

FOLDER = "train"  # in the stage's directory, for checkpoints
LAST = "last.json"  # names a lone worker's
MANAGED = "checkpoint_manager_snapshot.json"  # names those of Ray Train's workers; the file is its own


def train(
    job: TrainingSpec,
    stage: Stage,
    plan: Allocation,
    board: Any,
    *,
    max_failures: int,
    on_weights: Callable[[Path], None],
    resize_seconds: float = 60.0,
) -> Outcome:
    """Run a job on ``plan.least`` to ``plan.workers`` workers to its end; goes on from the stage's last checkpoint if
    there is one, however many workers wrote it.

    Args:
        max_failures: of workers that die or fail, and as many of their set-up; -1: any number.
        on_weights: gets the path of the final ``weights.safetensors``; the checkpoints are deleted after it.
        resize_seconds: between looks for room for more workers.

    Raises:
        KtrayError: the stage's watchdog has stopped (`ktray.distributed.watchdog`).
    """
    from ray import cloudpickle

    # Pickled apart, so that a controller, which only passes it on, need not import what it is made of.
    config = {
        "job": cloudpickle.dumps(job),
        "board": board,
        "threads": plan.worker_threads,
        "span": (plan.least, plan.workers),
        "beside": {
            "read_cpus": plan.decode_cpus,
            "teachers": plan.streaming,
            "teacher_gpus": plan.actor_gpus,
            "teacher_threads": plan.actor_threads,
        },
    }
    alone = plan.workers == 1 and not plan.worker_gpus and not stage.exists(f"{FOLDER}/{MANAGED}")
    try:
        if alone:
            outcome = _alone(config, stage, plan, max_failures, on_weights)
        else:
            outcome = _ray_train(config, stage, plan, max_failures, on_weights, resize_seconds)
    except OSError as error:
        raise storage_error(error, stage.uri) from error
    stage.delete(FOLDER)
    return outcome


def _ray_train(
    config: dict[str, Any],
    stage: Stage,
    plan: Allocation,
    max_failures: int,
    on_weights: Callable[[Path], None],
    resize_seconds: float,
) -> Outcome:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from ktray.training.ray_train_callback import ControllerWatcher, should_restart

    board = config["board"]
    resources = {"CPU": plan.worker_cpus}
    if plan.worker_gpus:
        resources["GPU"] = plan.worker_gpus
    least, most = plan.least, plan.workers
    count = str(most) if least == most else f"{least} to {most}"
    asks = " and ".join(f"{amount:g} {name}s" for name, amount in resources.items())
    watchdog.waiting_for("its training workers", f"{count} times {asks} (on one node each time)")

    api: Any = ray.train  # its types are those of the older Train

    def fit() -> Any:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**config, "stage": stage},
            scaling_config=api.ScalingConfig(
                num_workers=most if least == most else (least, most),
                use_gpu=plan.worker_gpus > 0,
                resources_per_worker=resources,
                # Each has the threads of a whole machine (see `resources.plan`); GPUs are better off close together.
                placement_strategy="PACK" if plan.worker_gpus else "SPREAD",
                elastic_resize_monitor_interval_s=resize_seconds,
            ),
            torch_config=TorchConfig(backend="nccl" if plan.worker_gpus else "gloo"),
            run_config=api.RunConfig(
                name=FOLDER,
                storage_path=stage.path,
                storage_filesystem=stage.fs,
                failure_config=api.FailureConfig(max_failures=max_failures),
                checkpoint_config=api.CheckpointConfig(num_to_keep=1),
                callbacks=[ControllerWatcher(board, max_failures)],
            ),
        )
        return trainer.fit()

    failures = 0
    while True:
        try:
            result = watchdog.run_watched(fit, lambda: _end(board))
            break
        except api.ControllerError as error:
            if not should_restart(error.controller_failure, failures, max_failures):
                raise
            failures += 1
            time.sleep(min(30, 2**failures))
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    with stage.local(_managed(result.checkpoint)) as folder:
        return _outcome(folder, on_weights)


def _managed(checkpoint: Any) -> str:
    """Name in the stage of a checkpoint of Ray Train's."""
    return f"{FOLDER}/{Path(checkpoint.path).name}"


def _end(board: Any) -> None:
    """End the training whose controller the board holds."""
    import ray

    if board is None:
        return
    for controller in ray.get(board.controller.remote(), timeout=10):
        with contextlib.suppress(ray.exceptions.RayError):  # it ends by dying
            ray.get(controller.abort.remote(), timeout=5)
        ray.kill(controller)


def _outcome(folder: Path, on_weights: Callable[[Path], None]) -> Outcome:
    on_weights(folder / "weights.safetensors")
    return Outcome.load(folder)


def _worker(config: dict[str, Any]) -> None:
    """What each of Ray Train's workers does."""
    import ray.train
    import ray.train.torch

    context, stage = ray.train.get_context(), config["stage"]

    def upload(local: Any, name: str) -> Any:
        # By the store and not by Ray, which gives up on a busy one after seconds.
        stage.put(Path(local.path), f"{FOLDER}/{name}")
        return ray.train.Checkpoint(f"{context.get_storage().experiment_fs_path}/{name}", stage.fs)

    def save(folder: Path | None, metrics: dict[str, Any], last: bool) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        # Reports keep their order: the last one, which is waited for, has all others behind it.
        mode = ray.train.CheckpointUploadMode.SYNC if last else ray.train.CheckpointUploadMode.ASYNC
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=True,
        )

    checkpoint = ray.train.get_checkpoint()
    last = _last(stage) if checkpoint is None else Path(checkpoint.path).name  # a lone worker may have begun it
    where = ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size()
    with stage.local(f"{FOLDER}/{last}") if last else contextlib.nullcontext() as resume:
        # Left where it is when the training fails: what is being uploaded must stay whole.
        scratch = Path(tempfile.mkdtemp(prefix="ktray-train-"))
        _fit(config, WorkerContext(*where, **config["beside"]), save, resume, scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def _alone(
    config: dict[str, Any], stage: Stage, plan: Allocation, max_failures: int, on_weights: Callable[[Path], None]
) -> Outcome:
    watchdog.waiting_for("its training worker", f"{plan.worker_cpus:g} CPUs")
    # As Ray Train would: a worker that dies, or that loses its disk or network, goes on from its last checkpoint.
    work = partial(_lone_worker, config, stage)
    remedy = "Lower train.batch_size, take a smaller student, or machines with more memory."
    run_with_retries(work, "the training worker", remedy, max_failures, cpus=plan.worker_cpus, also=(OSError,))
    with stage.local(f"{FOLDER}/{_last(stage)}") as folder:
        return _outcome(folder, on_weights)


def _lone_worker(config: dict[str, Any], stage: Stage) -> None:
    def upload(folder: Path, step: int) -> None:
        before, name = _last(stage), f"step-{step}"
        if before == name:  # finished right after a checkpoint of the same step
            name += "-end"
        stage.put(folder, f"{FOLDER}/{name}")
        stage.write_json(f"{FOLDER}/{LAST}", {"checkpoint": name})
        if before:
            stage.delete(f"{FOLDER}/{before}")
        shutil.rmtree(folder)

    under_way: list[Future[None]] = []

    def save(folder: Path | None, metrics: dict[str, Any], last: bool) -> None:
        assert folder is not None  # this is rank 0
        while under_way:  # one at a time, and what went wrong with it ends the attempt
            under_way.pop().result()
        under_way.append(behind.submit(upload, folder, metrics["step"]))
        if last:
            under_way.pop().result()

    last = _last(stage)
    with (
        tempfile.TemporaryDirectory(prefix="ktray-train-") as scratch,  # outlives what is being uploaded from it
        ThreadPoolExecutor(1) as behind,
        stage.local(f"{FOLDER}/{last}") if last else contextlib.nullcontext() as resume,
    ):
        _fit(config, WorkerContext(torch.device("cpu"), 0, 1, **config["beside"]), save, resume, Path(scratch))


def _last(stage: Stage) -> str | None:
    """The newest whole checkpoint of a lone worker."""
    name = f"{FOLDER}/{LAST}"
    return str(stage.read_json(name)["checkpoint"]) if stage.exists(name) else None


def _fit(
    config: dict[str, Any],
    env: WorkerContext,
    save: Callable[[Path | None, dict[str, Any], bool], None],
    resume: Path | None,
    scratch: Path,
) -> None:
    from ray import cloudpickle

    torch.set_num_threads(config["threads"])
    job: TrainingSpec = cloudpickle.loads(config["job"])
    board = config["board"]
    torch.manual_seed(job.settings.seed)

    def report(message: Message) -> None:
        if board is not None:
            board.post.remote(message)

    span = _span(config["span"], env.world, resume)
    program = job.build(replace(env, report=report, span=span))
    begun = time.perf_counter()
    machines = _machines(env.world)

    def progress(message: LoopMessage) -> None:
        if env.rank == 0:
            if isinstance(message, Started):  # the loop does not know of the others
                message = replace(message, workers=env.world, machines=machines)
            report(message)

    def keep(folder: Path | None, metrics: dict[str, Any], last: bool) -> None:
        if folder is not None:
            _report(program, time.perf_counter() - begun, span).save(folder)
        save(folder, metrics, last)

    names = iter(range(1 << 30))

    def folder() -> Path:
        path = scratch / str(next(names))
        path.mkdir()
        return path

    Trainer(program, job.settings, TrainerCallbacks(save=keep, progress=progress, folder=folder), resume).run()


def _span(span: tuple[int, int], world: int, resume: Path | None) -> tuple[int, int]:
    """The run's fewest and most workers, by which its rows are ordered: those that it began with, as long as they
    allow for the workers that there are now (the same command may have been given again with another number)."""
    low, high = (CostReport.load(resume).span if resume else None) or span
    return (low, high) if world <= high else span


def _machines(world: int) -> int:
    """On how many the workers are."""
    import ray
    import torch.distributed as dist

    here: list[Any] = [ray.get_runtime_context().get_node_id()]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, here[0])
        here = gathered
    return len(set(here))


def _report(program: TrainingProgram, seconds: float, span: tuple[int, int]) -> CostReport:
    from ktray.accounting.device import peak_rss

    peak = torch.cuda.max_memory_allocated() if program.device.type == "cuda" else peak_rss()
    return CostReport(
        flops_per_step=program.flops_per_step,
        images_per_step=program.images_per_step,
        autocast=str(program.autocast).replace("torch.", "") if program.autocast else "fp32",
        peak_memory_bytes=int(peak),
        seconds=seconds,
        pid=os.getpid(),
        span=span,
    )
