"""The launcher of the training loop: workers, DDP, checkpoints in the store, and progress in the mailbox.

Ray Train runs trainings with several workers. For each training it starts a controller, workers and helper processes,
and each of them needs seconds for its imports. That does not matter for an hour of training on a cluster, but it takes
20 s per stage. A single worker is therefore a plain Ray task.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
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
from ktray.distributed.device_workers import WORKERS
from ktray.distributed.mailbox import Posts
from ktray.distributed.ray_data import forget_model
from ktray.distributed.retried_task import run_with_retries
from ktray.models.device import device
from ktray.reporting.heartbeat import heard_by
from ktray.storage.store import Stage, storage_error
from ktray.training.loop import Trainer, TrainerCallbacks, TrainingProgram
from ktray.training.messages import LoopMessage, Started
from ktray.training.outcome import CostReport, Outcome
from ktray.training.worker import TrainingSpec, WorkerContext

FOLDER = "train"  # folder for checkpoints in the stage's directory
LAST = "last.json"  # names the last checkpoint of a single worker
_STARTING_S = 10.0  # in which a controller of Ray Train starts
MANAGED = "checkpoint_manager_snapshot.json"  # Ray Train's own file, which names the checkpoints of its workers


def train(
    job: TrainingSpec,
    stage: Stage,
    plan: Allocation,
    mailbox: Any,
    *,
    max_failures: int,
    on_weights: Callable[[Path], None],
    resize_seconds: float = 60.0,
) -> Outcome:
    """Run a training to its end on ``plan.least`` to ``plan.workers`` workers.

    It resumes from the stage's last checkpoint if there is one, with any number of workers.

    Args:
        job: the specification of the training.
        stage: the directory of the stage.
        mailbox: handle of the `ktray.distributed.mailbox.ProgressActor` for messages; None: no messages.
        max_failures: number of times that workers may die or fail, and that their set-up may fail; -1: any number.
        on_weights: called with the path of the final ``weights.safetensors``; the checkpoints are deleted after it.
        resize_seconds: seconds between two checks whether there is room for more workers.

    Raises:
        KtrayError: the stage's watchdog found a stall (`ktray.distributed.watchdog`).
    """
    from ray import cloudpickle

    # The job is pickled separately, so that the controller, which only passes it on, does not have to import its parts.
    config = {
        "job": cloudpickle.dumps(job),
        "mailbox": mailbox,
        "threads": plan.worker_threads,
        "span": (plan.least, plan.workers),
        "resources": {
            "read_cpus": plan.decode_cpus,
            "teachers": plan.streaming,
            "teacher_gpus": plan.actor_gpus,
            "teacher_threads": plan.actor_threads,
        },
    }
    single = plan.workers == 1 and not stage.exists(f"{FOLDER}/{MANAGED}")
    try:
        if single:
            outcome = _single_worker(config, stage, plan, max_failures, on_weights)
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

    mailbox = config["mailbox"]
    resources = {"CPU": plan.worker_cpus}
    if plan.worker_gpus:
        resources["GPU"] = plan.worker_gpus
    least, most = plan.least, plan.workers
    count = str(most) if least == most else f"{least} to {most}"
    shares = " and ".join(f"{amount:g} {name}s" for name, amount in resources.items())
    watchdog.waiting_for("its training workers", f"{count} workers with {shares} each, each worker on one node")

    WORKERS.end()  # idle device workers hold GPUs that the training workers need
    api: Any = ray.train  # Ray declares the types of the older Train

    def fit() -> Any:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={**config, "stage": stage},
            scaling_config=api.ScalingConfig(
                num_workers=most if least == most else (least, most),
                use_gpu=plan.worker_gpus > 0,
                resources_per_worker=resources,
                # Each worker has the threads of a whole machine (see `ktray.distributed.allocation`). GPUs exchange
                # gradients faster if they are close together.
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
                callbacks=[ControllerWatcher(mailbox, max_failures)],
            ),
        )
        return trainer.fit()

    failures = 0
    while True:
        try:
            result = watchdog.run_watched(fit, lambda: _end(mailbox))
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
    """Name of one of Ray Train's checkpoints in the stage."""
    return f"{FOLDER}/{Path(checkpoint.path).name}"


def _end(mailbox: Any) -> None:
    """End the training whose controller is known to the mailbox."""
    import ray

    from ktray.distributed.ray_internals import remove_placement_groups

    if mailbox is None:
        return
    # One that is still starting would otherwise begin to train, or to ask for machines, after this end.
    until = time.monotonic() + _STARTING_S
    while not (controllers := ray.get(mailbox.controller.remote(), timeout=10)) and time.monotonic() < until:
        time.sleep(0.2)
    for controller in controllers:
        with contextlib.suppress(ray.exceptions.RayError):  # the controller dies when it aborts
            ray.get(controller.abort.remote(), timeout=5)
        ray.kill(controller)
        remove_placement_groups(controller)


def _outcome(folder: Path, on_weights: Callable[[Path], None]) -> Outcome:
    on_weights(folder / "weights.safetensors")
    return Outcome.load(folder)


def _worker(config: dict[str, Any]) -> None:
    """The work of each of Ray Train's workers."""
    import ray.train
    import ray.train.torch

    context, stage = ray.train.get_context(), config["stage"]
    one_upload = threading.Semaphore()

    def upload(local: Any, name: str) -> Any:
        # The store uploads, not Ray, because Ray fails after a few seconds if a store is busy.
        try:
            stage.put(Path(local.path), f"{FOLDER}/{name}")
        finally:
            one_upload.release()
        return ray.train.Checkpoint(f"{context.get_storage().experiment_fs_path}/{name}", stage.fs)

    def save(folder: Path | None, metrics: dict[str, Any], last: bool) -> None:
        if folder:
            one_upload.acquire()  # otherwise checkpoints fill the disk if the store is slower than training
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        # Reports are processed in order: when the last one, which is waited for, is done, so are all others.
        mode = ray.train.CheckpointUploadMode.SYNC if last else ray.train.CheckpointUploadMode.ASYNC
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=mode,
            checkpoint_upload_fn=upload,
            delete_local_checkpoint_after_upload=True,
        )

    checkpoint = ray.train.get_checkpoint()
    last = _last(stage) if checkpoint is None else Path(checkpoint.path).name  # a single worker may have started it
    place = ray.train.torch.get_device(), context.get_world_rank(), context.get_world_size()
    with stage.local(f"{FOLDER}/{last}") if last else contextlib.nullcontext() as resume:
        # If the training fails, the folder is not deleted, because a checkpoint may still be uploaded from it.
        scratch = Path(tempfile.mkdtemp(prefix="ktray-train-"))
        _fit(config, WorkerContext(*place, **config["resources"]), save, resume, scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def _single_worker(
    config: dict[str, Any], stage: Stage, plan: Allocation, max_failures: int, on_weights: Callable[[Path], None]
) -> Outcome:
    watchdog.waiting_for("its training worker", f"{plan.worker_cpus:g} CPUs and {plan.worker_gpus:g} GPUs")
    # As with Ray Train, a worker that dies, or that loses its disk or network, resumes from its last checkpoint.
    work = partial(_work_alone, config, stage)
    remedy = "Lower train.batch_size, or use a smaller student or machines with more memory."
    run_with_retries(
        work,
        "the training worker",
        remedy,
        max_failures,
        cpus=plan.worker_cpus,
        gpus=plan.worker_gpus,
        also=(OSError,),
    )
    with stage.local(f"{FOLDER}/{_last(stage)}") as folder:
        return _outcome(folder, on_weights)


def _work_alone(config: dict[str, Any], stage: Stage) -> None:
    """The work of a single worker without Ray Train."""

    def upload(folder: Path, step: int) -> None:
        before, name = _last(stage), f"step-{step}"
        if before == name:  # the training ended right after a checkpoint of the same step
            name += "-end"
        stage.put(folder, f"{FOLDER}/{name}")
        stage.write_json(f"{FOLDER}/{LAST}", {"checkpoint": name})
        if before:
            stage.delete(f"{FOLDER}/{before}")
        shutil.rmtree(folder)

    uploads: list[Future[None]] = []

    def save(folder: Path | None, metrics: dict[str, Any], last: bool) -> None:
        assert folder is not None  # a single worker is rank 0
        while uploads:  # there is one upload at a time, and its error ends the attempt
            uploads.pop().result()
        uploads.append(background.submit(upload, folder, metrics["step"]))
        if last:
            uploads.pop().result()

    last = _last(stage)
    with (
        tempfile.TemporaryDirectory(prefix="ktray-train-") as scratch,  # exists until the uploads from it are done
        ThreadPoolExecutor(1) as background,
        stage.local(f"{FOLDER}/{last}") if last else contextlib.nullcontext() as resume,
    ):
        _fit(config, WorkerContext(device(), 0, 1, **config["resources"]), save, resume, Path(scratch))


def _last(stage: Stage) -> str | None:
    """Name of the newest complete checkpoint of a single worker; None if there is none."""
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
    forget_model()  # a task of an earlier stage may have run in this process
    job: TrainingSpec = cloudpickle.loads(config["job"])
    report = Posts(config["mailbox"])
    torch.manual_seed(job.settings.seed)

    span = _span(config["span"], env.world, resume)
    with heard_by(report):  # before the first step, each worker may compute features of all labelled images
        program = job.build(replace(env, report=report, span=span))
    begun = time.perf_counter()
    nodes = _nodes(env.world)

    def progress(message: LoopMessage) -> None:
        if env.rank == 0:
            if isinstance(message, Started):  # the loop does not know the other workers
                message = replace(message, workers=env.world, nodes=nodes)
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

    try:
        with heard_by(report):
            Trainer(program, job.settings, TrainerCallbacks(save=keep, progress=progress, folder=folder), resume).run()
    finally:
        report.deliver()


def _span(span: tuple[int, int], world: int, resume: Path | None) -> tuple[int, int]:
    """Minimum and maximum number of workers, which the order of the rows depends on.

    These are the numbers at the start of the run, as long as they allow the current number of workers: the run may be
    resumed with another number in its recipe.
    """
    low, high = (CostReport.load(resume).span if resume else None) or span
    return (low, high) if world <= high else span


def _nodes(world: int) -> tuple[str, ...]:
    """Ray's id of the node of each worker."""
    import ray
    import torch.distributed as dist

    here: list[Any] = [ray.get_runtime_context().get_node_id()]
    if world > 1:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, here[0])
        here = gathered
    return tuple(here)


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
        compiled=program.compiled,
    )
