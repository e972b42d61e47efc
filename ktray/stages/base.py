"""What all stages have in common: reuse by key, lease, cost, progress, and the count of bad images."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ktray.accounting.attempts import DirLog
from ktray.accounting.ledger import Ledger, Meter
from ktray.accounting.speeds import Speed
from ktray.data.quarantine import Bad, BadLimit, Quarantine
from ktray.distributed.allocation import Allocation
from ktray.distributed.gauges import StageGauges
from ktray.distributed.machines import ClusterMachines
from ktray.distributed.watchdog import Watchdog, check_limit, watch
from ktray.recipe.cluster import ClusterConfig
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.heartbeat import Heartbeat
from ktray.reporting.progress import Progress
from ktray.stages.bad_images import BadImageWatch
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import WorkerStart
from ktray.stages.shard_summary import S
from ktray.stages.speed import StageLook, keep_speed, known_speed
from ktray.storage.lease import Lease, LeaseLost
from ktray.storage.store import Stage, Store
from ktray.tasks.base import TaskKind, task_kind
from ktray.tracking.tracker import Tracker
from ktray.training import messages
from ktray.training.messages import BadImages, ControllerState, CurvePoint, Message, Started, TeacherFlops

if TYPE_CHECKING:
    from ktray.data.labelled.labelled_set import LabelledSet
logger = logging.getLogger("ktray")


@dataclass
class Runtime:
    """The services that a stage uses. They do not influence its result, which only depends on its inputs and on the
    number formats that were measured once per store (``store/precision``).

    Attributes:
        plan: the run's part of the cluster.
        cluster: how to handle failures, missing machines and stalls.
        bad_limit: how many images may be unusable before a stage fails.
        phase: name of the phase if the pretraining has several; it marks their progress and curves.
        read: number of images that the run has read.
        quarantine: those of these images that cannot be used.
        running: names of the stages that are being computed, the innermost last.
        machines: the machines of the cluster with their prices; None in a plan.
        device: name of the devices, for measured speeds (`ktray.accounting.device.device_name`).
        speeds: by name in the ledger, the speed that was known when the stage began; None: it was not measured.
        planned: for ``--plan``: no stage runs, and each stage is only looked at. None in a run.
    """

    store: Store
    plan: Allocation
    ledger: Ledger
    tracker: Tracker
    run_id: str
    cluster: ClusterConfig
    bad_limit: BadLimit
    phase: str = ""
    read: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine)
    running: list[str] = field(default_factory=list)
    machines: ClusterMachines | None = None
    device: str = ""
    speeds: dict[str, Speed | None] = field(default_factory=dict)
    planned: StageLook | None = None


@dataclass
class RunContext:
    """One run: the sources of the stages' inputs, and the services that the stages use.

    Attributes:
        recipe: the recipe, completely resolved.
        task: the labelled images with their labels and splits.
        class_names: names of the classes in the recipe.
        prompts: templates for the text head.
        canvas: side of the labelled images that are stored for finetuning, as a multiple of a model's input size.
        metric: name of the task's metric that models are chosen and evaluated by.
        source: the labelled generic set (``supervised.data``), if the objective learns from one.
    """

    recipe: Recipe
    runtime: Runtime
    task: LabelledSet
    class_names: list[str]
    prompts: list[str]
    canvas: float
    metric: str = "top1"
    source: LabelledSet | None = None

    @property
    def store(self) -> Store:
        return self.runtime.store

    @property
    def plan(self) -> Allocation:
        return self.runtime.plan

    @property
    def ledger(self) -> Ledger:
        return self.runtime.ledger

    @property
    def tracker(self) -> Tracker:
        return self.runtime.tracker

    @property
    def run_id(self) -> str:
        return self.runtime.run_id

    @property
    def names(self) -> list[str]:
        """The names of the classes for a text tower."""
        return self.class_names if len(self.class_names) == len(self.task.classes) else self.task.classes

    @property
    def kind(self) -> TaskKind:
        """The task kind of the recipe."""
        return task_kind(self.recipe.task.kind)


@dataclass
class StageResult:
    """A complete stage. In a plan, the stage may not be computed yet; its manifest then has only the key."""

    stage: Stage
    manifest: dict[str, Any]
    cached: bool

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def version(self) -> str:
        """Version of the files of the complete stage: another one if the stage was computed again."""
        return digest("files", [self.manifest.get("run"), self.manifest.get("files")])


class Reporter:
    """Reports progress, cost and MLflow steps of one attempt, from shard summaries or from messages in the mailbox."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        meter: Meter,
        watchdog: Watchdog | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.runtime, self.name, self.meter, self.check = runtime, name, meter, check
        self.watchdog = watchdog or Watchdog(name, runtime.cluster.stall_minutes)
        self.starts: list[WorkerStart] = []  # the starts of training workers: their step and number of workers
        self.run = runtime.tracker.stage(name)
        self.gauges = StageGauges(runtime.run_id, name)
        self.progress: Progress | None = None
        self.read = self.done = 0
        self.quarantine = Quarantine()
        self._refused = ""
        self._bad = BadImageWatch(name, runtime.bad_limit)
        self._lock = threading.Lock()
        self._images = self._flops = 0.0  # totals of the training that are already counted

    def expect(self, total: int | None, unit: str = "img") -> None:
        """Start a progress line; ``total`` is None if it is not known beforehand."""
        self.progress = Progress(self.name, total or 0, unit)
        self.watchdog.idle = self.progress.idle
        self._bad.total = total or 0

    def shards(self, summaries: Iterable[S]) -> list[S]:
        """Count shards as they are finished. Returns their summaries."""
        return list(self.counted(summaries))

    def counted(self, summaries: Iterable[S]) -> Iterator[S]:
        """Count shards, or pieces of shards, as they are finished, and pass their summaries on."""
        for summary in summaries:
            self.check()
            check_limit()
            self.done += summary.read
            self.read += summary.read
            self.watchdog.heartbeat(f"{self.done:,} images")
            for uri, reason in summary.bad:
                self.quarantine.add(uri, reason, self.name)
            self.meter.add(flops=summary.flops, images=summary.images)
            self.gauges.images(self.done)
            self.gauges.spent(self.runtime.ledger)
            if self.progress:
                self.progress.update(self.done)
            self._bad.look(self.quarantine, self.read)
            yield summary

    def post(self, message: Message) -> None:
        """Process a message of a task, a training worker or Ray Train's controller."""
        with self._lock:
            match message:
                case BadImages(images):
                    for uri, reason in images:
                        self.quarantine.add(uri, reason, self.name)
                case TeacherFlops(flops):
                    self.meter.add(flops=flops)
                case ControllerState(state, why):
                    self._state(state, why)
                case Heartbeat(progress):
                    self.watchdog.heartbeat(progress)
                case Started(step):
                    self.watchdog.heartbeat(f"step {step}")
                    self._start(message)
                case CurvePoint(step, values):
                    self.watchdog.heartbeat()
                    self.run.metrics(step, dict(values))
                    self.gauges.evaluation(values)
                case messages.StepProgress(step):
                    self.watchdog.heartbeat(f"step {step}")
                    self._advance(message)
                case _:
                    raise TypeError(f"not a message of a training: {message!r}")

    def _advance(self, message: messages.StepProgress) -> None:
        """Count the steps that are done since the last message."""
        if self.progress:
            self.progress.update(message.step, message.data_wait)
        self.meter.add(
            images=max(0, int(message.images - self._images)), flops=max(0, int(message.flops - self._flops))
        )
        self._images, self._flops = message.images, message.flops
        self.gauges.training(message.step, message.images, message.data_wait)
        self.gauges.spent(self.runtime.ledger)

    def _start(self, message: Started) -> None:
        """Count the start of workers. Steps that they repeat after a restart count again."""
        if not self.starts:
            # The checkpoint of a killed attempt may contain steps that are not in its last heartbeat.
            stage = (self.meter.entry.stage, self.meter.entry.key)
            earlier = [e for e in self.runtime.ledger.entries if (e.stage, e.key) == stage]
            self.meter.add(
                images=max(0, int(message.images - sum(e.images for e in earlier))),
                flops=max(0, int(message.flops - sum(e.flops for e in earlier))),
            )
        else:
            self.meter.restart(max(0.0, self._flops - message.flops))
            workers = "1 worker" if message.workers == 1 else f"{message.workers} workers"
            logger.info(f"{self.name:<9} resumed at step {message.step} with {workers}")
        if self.progress:
            self.progress.resume(message.step)
        self.starts.append({"step": message.step, "workers": message.workers})
        self._images, self._flops = message.images, message.flops
        self.gauges.resume(message.images)
        if self.runtime.machines is None or not message.nodes:
            return
        held = self.runtime.machines.workers(message.nodes)
        if len(self.starts) > 1:
            self.meter.hold(held)
        else:  # the workers had their places before they could say so
            self.meter.correct(held)

    @contextlib.contextmanager
    def task(self) -> Iterator[Callable[[str], None]]:
        """Book a task on one device. It yields a function that is to be called with the node of the task."""
        machines = self.runtime.machines
        if machines is None:
            yield lambda node: None
            return
        self.meter.hold(machines.some(self.runtime.plan.worker_gpus or 1.0))

        def worked_at(node: str) -> None:
            held = machines.workers([node])
            self.meter.correct(held)
            self.meter.hold(held)  # what follows is not part of the task

        yield worked_at

    def _state(self, state: str, why: str) -> None:
        """Record the state of Ray Train's controller. It is no heartbeat, because the controller may retry for ever."""
        if state != "running":
            self.watchdog.waits(f"its training workers (Ray Train is {state})")
        else:
            self.watchdog.waits("the steps of its training workers")
        if why and state == "restarting":
            logger.info(f"{self.name:<9} lost its workers: {why}")
        elif why and state == "rescheduling" and why != self._refused:  # it repeats while machines are missing
            logger.info(f"{self.name:<9} could not start its workers: {why}")
            self._refused = why


Inputs = TypeVar("Inputs", bound=StageInputs)
Work = Callable[[Inputs, Runtime, Stage, "Reporter"], Mapping[str, Any]]  # an entry of `ktray.stages.manifests`


def run_stage(
    runtime: Runtime,
    inputs: Inputs,
    work: Work[Inputs],
    *,
    ledger_name: str | None = None,
    whole: Callable[[dict[str, Any]], bool] | None = None,
) -> StageResult:
    """Reuse the stage's directory if it is complete, else compute the stage under a lease and commit it.

    Args:
        inputs: everything that the stage may read; their key is the name of the directory.
        work: computes the stage in its directory, and returns the entries of the manifest. It is a plain function, not
            a closure, so that it reads only its arguments.
        ledger_name: the stage's name in the ledger, if it differs from the stage's own name.
        whole: checks the manifest of a finished stage: whether everything that it names outside its directory still
            exists. If not, the stage is computed again.

    Raises:
        KtrayError: more images are unusable than ``Runtime.bad_limit`` allows, or the stage stalled.
    """
    parts, stage_name = inputs.key_parts(), inputs.stage
    key = inputs.key_of(parts)
    stage = runtime.store.stage(stage_name, key)
    ledger_stage = ledger_name or stage_name
    shown = f"{stage_name}-{runtime.phase}" if runtime.phase else stage_name

    def complete() -> dict[str, Any] | None:
        manifest = stage.manifest()
        return None if manifest is None or (whole and not whole(manifest)) else manifest

    manifest = complete()
    if runtime.planned is not None:
        runtime.planned.see(ledger_stage, inputs, manifest is not None)
        return StageResult(stage, manifest or {"key": key}, cached=manifest is not None)
    while manifest is None:
        check_limit()
        try:
            with stage.lease() as lease:
                manifest = complete()  # another job may have finished the stage while this one waited
                if manifest is None:
                    check_limit()
                    return _attempt(runtime, stage, lease, (shown, ledger_stage), inputs, parts, work)
        except LeaseLost as lost:
            logger.info(f"{shown:<9} {lost.what}; continuing with the results of that job")
    runtime.ledger.reuse(DirLog(stage), ledger_stage, key)
    _count(runtime, manifest)
    note = " (computed earlier in this run)" if manifest.get("run") == runtime.run_id else ""
    logger.info(f"{shown:<9} reused {key}{note}")
    return StageResult(stage, manifest, cached=True)


def _attempt(
    runtime: Runtime,
    stage: Stage,
    lease: Lease,
    names: tuple[str, str],
    inputs: Inputs,
    parts: dict[str, Any],
    work: Work[Inputs],
) -> StageResult:
    """Compute a stage and commit it. ``names`` are its names for people and in the ledger; ``parts`` are the parts of
    its key, which name the directory: they are not computed a second time, so that a file that changes while the stage
    runs cannot change them."""
    key = inputs.key_of(parts)
    shown, ledger_stage = names
    runtime.speeds.setdefault(ledger_stage, known_speed(runtime.store, inputs, runtime.device))
    watchdog = Watchdog(shown, runtime.cluster.stall_minutes, lambda: stage.exists("manifest.json"))
    held = runtime.machines.expected(inputs.devices) if runtime.machines else None
    with runtime.ledger.attempt(DirLog(stage), ledger_stage, key, held) as meter:
        reporter = Reporter(runtime, shown, meter, watchdog, lease.check)
        status = "FAILED"
        try:
            runtime.running.append(shown)
            with watch(watchdog):
                manifest = dict(work(inputs, runtime, stage, reporter))
            reporter.quarantine.check(reporter.read, runtime.bad_limit)
            status = "FINISHED"
            runtime.running.pop()  # after a failure it stays, and names the stage
        finally:
            if reporter.progress:
                reporter.progress.close("done" if status == "FINISHED" else "stopped")
            reporter.gauges.end()
            cost = meter.now()
            reporter.run.finish(
                {"flops": cost.flops, "device_seconds": cost.device_seconds, "wall_seconds": cost.wall_seconds}, status
            )
    manifest.update(key=key, stage=inputs.stage, inputs=parts, run=runtime.run_id, read=reporter.read)
    manifest["quarantine"] = [[b.uri, b.reason, b.stage] for b in reporter.quarantine]
    manifest = stage.commit(manifest, lease)
    keep_speed(runtime.store, inputs, runtime.device, meter.entry, manifest, runtime.run_id)
    _count(runtime, manifest)
    return StageResult(stage, manifest, cached=False)


def _count(runtime: Runtime, manifest: dict[str, Any]) -> None:
    bad = Quarantine(Bad(uri, reason, stage) for uri, reason, stage in manifest.get("quarantine", []))
    # A reused stage is also checked: it may have been computed with a higher limit than this recipe's.
    bad.check(int(manifest.get("read", 0)), runtime.bad_limit)
    runtime.read += int(manifest.get("read", 0))
    runtime.quarantine.merge(bad)
