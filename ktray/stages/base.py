"""What every stage shares: its key, reuse, lease, cost, progress, and the count of bad images."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ktray.accounting.ledger import DirLog, Ledger, Meter
from ktray.data.quarantine import Bad, Quarantine
from ktray.distributed.allocation import Allocation
from ktray.distributed.watchdog import Watchdog, check_limit, watch
from ktray.recipe.cluster import ClusterConfig
from ktray.recipe.schema import Recipe
from ktray.reporting.progress import Progress
from ktray.stages.inputs import StageInputs
from ktray.stages.manifests import WorkerStart
from ktray.stages.shard_summary import S, ShardSummary
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
    """The services that a stage works with. Nothing in it says what a stage is to make: that is in its inputs.

    Attributes:
        plan: which part of the cluster the run has.
        cluster: how failures, missing machines and hangs are met.
        max_bad_fraction: of unusable images, above which a stage fails.
        phase: name of a part of the pretraining, where there are several; it marks their progress and curves.
        read, quarantine: images that the run has read, and those of them that cannot be used.
        planned: for ``--plan``: nothing is run, and each stage notes here whether it is whole. None in a run.
    """

    store: Store
    plan: Allocation
    ledger: Ledger
    tracker: Tracker
    run_id: str
    cluster: ClusterConfig
    max_bad_fraction: float
    phase: str = ""
    read: int = 0
    quarantine: Quarantine = field(default_factory=Quarantine)
    planned: dict[str, bool] | None = None


@dataclass
class RunContext:
    """One run: what the stages' inputs are taken from, and the services that the stages work with.

    Attributes:
        recipe: fully resolved.
        task: labels, splits and class names; ``prompts`` are the text head's templates.
        fingerprint: of the labelled set (which image has which label in which split).
        canvas: side of the labelled images kept for finetuning, as a factor on a model's input size.
        metric: what models are chosen by and judged on: a key of the task's metrics.
        source: the labelled generic set (``supervised.data``) of an objective that learns from one.
    """

    recipe: Recipe
    runtime: Runtime
    task: LabelledSet
    class_names: list[str]
    prompts: list[str]
    fingerprint: str
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
        """The classes as text for a text tower."""
        return self.class_names if len(self.class_names) == len(self.task.classes) else self.task.classes

    @property
    def kind(self) -> TaskKind:
        """The task kind of the recipe."""
        return task_kind(self.recipe.task.kind)


@dataclass
class StageResult:
    """A whole stage; in a plan perhaps one that is still to be made, with nothing but its key in the manifest."""

    stage: Stage
    manifest: dict[str, Any]
    cached: bool

    @property
    def key(self) -> str:
        return str(self.manifest["key"])


class Reporter:
    """Progress, cost and MLflow steps of one attempt; fed by shard summaries or by the board."""

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
        self.starts: list[WorkerStart] = []  # of the training workers: at which step, how many
        self.run = runtime.tracker.stage(name)
        self.progress: Progress | None = None
        self.read = self.done = 0
        self.quarantine = Quarantine()
        self._refused = ""
        self._lock = threading.Lock()
        self._images = self._flops = 0.0  # totals of the training that are counted

    def expect(self, total: int | None, unit: str = "img") -> None:
        """Start a progress line; ``total`` None when it is not known beforehand."""
        self.progress = Progress(self.name, total or 0, unit)

    def shards(self, summaries: Iterable[S]) -> list[S]:
        """Count shards as they are finished; returns their summaries."""
        kept = []
        for s in summaries:
            self.check()
            check_limit()
            self.done += s.read
            self.read += s.read
            self.watchdog.heartbeat(f"{self.done:,} images")
            for uri, reason in s.bad:
                self.quarantine.add(uri, reason, self.name)
            self.meter.add(flops=s.flops, images=s.images)
            if self.progress:
                self.progress.update(self.done)
            kept.append(s)
        return kept

    def post(self, message: Message) -> None:
        """A message of a training worker or of Ray Train's controller."""
        with self._lock:
            match message:
                case BadImages(images):
                    for uri, reason in images:
                        self.quarantine.add(uri, reason, self.name)
                case TeacherFlops(flops):
                    self.meter.add(flops=flops)
                case ControllerState(state, why):
                    self._state(state, why)
                case Started(step):
                    self.watchdog.heartbeat(f"step {step}")
                    self._start(message)
                case CurvePoint(step, values):
                    self.watchdog.heartbeat()
                    self.run.metrics(step, dict(values))
                case messages.Progress(step):
                    self.watchdog.heartbeat(f"step {step}")
                    self._advance(message)
                case _:
                    raise TypeError(f"no message: {message!r}")

    def _advance(self, message: messages.Progress) -> None:
        """Steps are done: what is new in their totals is counted."""
        if self.progress:
            self.progress.update(message.step, message.data_wait)
        self.meter.add(
            images=max(0, int(message.images - self._images)), flops=max(0, int(message.flops - self._flops))
        )
        self._images, self._flops = message.images, message.flops

    def _start(self, message: Started) -> None:
        """Workers begin at a step: what they do again after a checkpoint counts again."""
        if not self.starts:
            # The checkpoint of a killed attempt proves steps that its last heartbeat knew nothing of.
            mine = (self.meter.entry.stage, self.meter.entry.key)
            earlier = [e for e in self.runtime.ledger.entries if (e.stage, e.key) == mine]
            self.meter.add(
                images=max(0, int(message.images - sum(e.images for e in earlier))),
                flops=max(0, int(message.flops - sum(e.flops for e in earlier))),
            )
        else:
            self.meter.restart(max(0.0, self._flops - message.flops))
            logger.info(f"{self.name:<9} goes on from step {message.step} with {message.workers} worker(s)")
        self.starts.append({"step": message.step, "workers": message.workers})
        self._images, self._flops = message.images, message.flops
        self.meter.hold(message.workers if self.runtime.plan.worker_gpus else message.machines)

    def _state(self, state: str, why: str) -> None:
        """What Ray Train's controller does; no sign of life, since it may do so for ever."""
        if state != "running":
            self.watchdog.waits(f"its training workers (Ray Train is {state})")
        else:
            self.watchdog.waits("the steps of its training workers")
        if why and state == "restarting":
            logger.info(f"{self.name:<9} lost its workers: {why}")
        elif why and state == "rescheduling" and why != self._refused:  # again and again, while machines are missing
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
    """Reuse the stage's directory when it is whole, else do the work under a lease and commit it.

    Args:
        inputs: all that the stage may read; their key names the directory.
        work: does the stage in its directory and returns the manifest's own entries. It is a plain function, not a
            closure, so that it reads nothing but what it is given.
        ledger_name: the name that the cost is booked under, where it is not the stage's.
        whole: asked of the manifest of a finished stage, whether what it names outside its directory still stands;
            where it does not, the work is done again.
    """
    key, stage_name = inputs.key, inputs.stage
    stage = runtime.store.stage(stage_name, key)
    booked = ledger_name or stage_name
    shown = f"{stage_name}-{runtime.phase}" if runtime.phase else stage_name

    def made() -> dict[str, Any] | None:
        found = stage.manifest()
        return None if found is None or (whole and not whole(found)) else found

    manifest = made()
    if runtime.planned is not None:
        runtime.planned[booked] = manifest is not None and runtime.planned.get(booked, True)
        return StageResult(stage, manifest or {"key": key}, cached=manifest is not None)
    while manifest is None:
        check_limit()
        try:
            with stage.lease() as lease:
                manifest = made()  # another job may have finished it while this one waited
                if manifest is None:
                    check_limit()
                    return _attempt(runtime, stage, lease, (shown, booked), inputs, work)
        except LeaseLost as lost:
            logger.info(f"{shown:<9} {lost.what}; going on with what it makes")
    runtime.ledger.reuse(DirLog(stage), booked, key)
    _count(runtime, manifest)
    again = " (made earlier in this run)" if manifest.get("run") == runtime.run_id else ""
    logger.info(f"{shown:<9} reused {key}{again}")
    return StageResult(stage, manifest, cached=True)


def _attempt(
    runtime: Runtime, stage: Stage, lease: Lease, names: tuple[str, str], inputs: Inputs, work: Work[Inputs]
) -> StageResult:
    shown, booked = names
    devices = runtime.plan.least if runtime.plan.worker_gpus else 1
    watchdog = Watchdog(shown, runtime.cluster.stall_minutes, lambda: stage.exists("manifest.json"))
    with runtime.ledger.attempt(DirLog(stage), booked, inputs.key, devices) as meter:
        reporter = Reporter(runtime, shown, meter, watchdog, lease.check)
        status = "FAILED"
        try:
            with watch(watchdog):
                found = dict(work(inputs, runtime, stage, reporter))
            reporter.quarantine.check(reporter.read, runtime.max_bad_fraction)
            status = "FINISHED"
        finally:
            if reporter.progress:
                reporter.progress.close("done" if status == "FINISHED" else "stopped")
            cost = meter.now()
            reporter.run.finish(
                {"flops": cost.flops, "device_seconds": cost.device_seconds, "wall_seconds": cost.wall_seconds}, status
            )
    found.update(key=inputs.key, stage=inputs.stage, inputs=inputs.key_parts(), run=runtime.run_id, read=reporter.read)
    found["quarantine"] = [[b.uri, b.reason, b.stage] for b in reporter.quarantine]
    manifest = stage.commit(found, lease)
    _count(runtime, manifest)
    return StageResult(stage, manifest, cached=False)


def _count(runtime: Runtime, manifest: dict[str, Any]) -> None:
    bad = Quarantine(Bad(uri, reason, stage) for uri, reason, stage in manifest.get("quarantine", []))
    # Also of a reused stage: the limit is this recipe's, the stage may have been made under a laxer one.
    bad.check(int(manifest.get("read", 0)), runtime.max_bad_fraction)
    runtime.read += int(manifest.get("read", 0))
    runtime.quarantine.merge(bad)


def finished_shards(stage: Stage) -> dict[str, ShardSummary]:
    """Summaries of the shards that an earlier attempt has finished, by shard name."""
    return {
        name.removesuffix(".json"): ShardSummary.from_json(stage.read_json(name))
        for name in stage.names(".parquet.json")
    }


def finish_shard(stage: Stage, summary: ShardSummary) -> dict[str, Any]:
    """Declare a shard finished: its summary is written after its data, so that a restart counts it once.

    Returns:
        `ShardSummary.to_json`, for `ktray.distributed.ray_data.map_shards`.
    """
    content = summary.to_json()
    stage.write_json(f"{summary.name}.json", content)
    return content
