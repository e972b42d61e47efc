"""What every stage shares: its key, reuse, lease, cost, progress, and the count of bad images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktray.accounting.ledger import DirLog, Ledger, Meter
from ktray.data.quarantine import Bad, Quarantine
from ktray.distributed.allocation import Allocation
from ktray.distributed.watchdog import Watchdog, check_limit, watch
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.reporting.progress import Progress
from ktray.stages.manifests import WorkerStart
from ktray.stages.shard_summary import S, ShardSummary
from ktray.storage.lease import Lease, LeaseLost
from ktray.storage.store import Stage, Store
from ktray.tracking.tracker import Tracker
from ktray.training import messages
from ktray.training.messages import BadImages, ControllerState, CurvePoint, Message, Started, TeacherFlops

if TYPE_CHECKING:
    from ktray.data.labelled.read import LabelledSet


@dataclass
class RunContext:
    """One run: what the stages read and report to.

    Attributes:
        recipe: fully resolved.
        task: labels, splits and class names; ``prompts`` are the text head's templates.
        fingerprint: of the labelled set (which image has which label in which split).
        canvas: side of the labelled images kept for finetuning, as a factor on a model's input size.
        say: prints one line for the person who watches.
        metric: what models are chosen by and judged on: a key of the task's metrics.
        source: the labelled generic set of objective.name=supervised.
        phase: name of a part of the pretraining, where there are several; it marks their progress and curves.
        planned: for ``--plan``: nothing is run, and each stage notes here whether it is whole. None in a run.
    """

    recipe: Recipe
    store: Store
    plan: Allocation
    ledger: Ledger
    tracker: Tracker
    task: LabelledSet
    class_names: list[str]
    prompts: list[str]
    fingerprint: str
    canvas: float
    run_id: str
    say: Callable[[str], None]
    quarantine: Quarantine = field(default_factory=Quarantine)
    read: int = 0
    planned: dict[str, bool] | None = None
    metric: str = "top1"
    phase: str = ""
    source: LabelledSet | None = None


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
        context: RunContext,
        name: str,
        meter: Meter,
        watchdog: Watchdog | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.context, self.name, self.meter, self.check = context, name, meter, check
        self.watchdog = watchdog or Watchdog(name, context.recipe.cluster.stall_minutes)
        self.starts: list[WorkerStart] = []
        self.run = context.tracker.stage(name)
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
            earlier = [e for e in self.context.ledger.entries if (e.stage, e.key) == mine]
            self.meter.add(
                images=max(0, int(message.images - sum(e.images for e in earlier))),
                flops=max(0, int(message.flops - sum(e.flops for e in earlier))),
            )
        else:
            self.meter.restart(max(0.0, self._flops - message.flops))
            self.context.say(f"{self.name:<9} goes on from step {message.step} with {message.workers} worker(s)")
        self.starts.append({"step": message.step, "workers": message.workers})
        self._images, self._flops = message.images, message.flops
        self.meter.hold(message.workers if self.context.plan.worker_gpus else message.machines)

    def _state(self, state: str, why: str) -> None:
        """What Ray Train's controller does; no sign of life, since it may do so for ever."""
        if state != "running":
            self.watchdog.waits(f"its training workers (Ray Train is {state})")
        else:
            self.watchdog.waits("the steps of its training workers")
        if why and state == "restarting":
            self.context.say(f"{self.name:<9} lost its workers: {why}")
        elif why and state == "rescheduling" and why != self._refused:  # again and again, while machines are missing
            self.context.say(f"{self.name:<9} could not start its workers: {why}")
            self._refused = why


Work = Callable[[Stage, Reporter], Mapping[str, Any]]  # gives an entry of `ktray.stages.manifests`


def run_stage(
    context: RunContext,
    name: str,
    key_parts: Any,
    work: Work,
    *,
    ledger_name: str | None = None,
    whole: Callable[[dict[str, Any]], bool] | None = None,
) -> StageResult:
    """Reuse the stage's directory when it is whole, else do the work under a lease and commit it.

    Args:
        key_parts: JSON-like; everything that goes into the result, the stage's own version included.
        work: does the stage in its directory and returns the manifest's own entries.
        ledger_name: the name that the cost is booked under, where it is not ``name``.
        whole: asked of the manifest of a finished stage, whether what it names outside its directory still stands;
            where it does not, the work is done again.
    """
    key = digest(name, key_parts)
    stage = context.store.stage(name, key)
    booked = ledger_name or name
    shown = f"{name}-{context.phase}" if context.phase else name

    def made() -> dict[str, Any] | None:
        found = stage.manifest()
        return None if found is None or (whole and not whole(found)) else found

    manifest = made()
    if context.planned is not None:
        context.planned[booked] = manifest is not None and context.planned.get(booked, True)
        return StageResult(stage, manifest or {"key": key}, cached=manifest is not None)
    while manifest is None:
        check_limit()
        try:
            with stage.lease(context.say) as lease:
                manifest = made()  # another job may have finished it while this one waited
                if manifest is None:
                    check_limit()
                    return _attempt(context, stage, lease, (name, shown, booked), key, key_parts, work)
        except LeaseLost as lost:
            context.say(f"{shown:<9} {lost.what}; going on with what it makes")
    context.ledger.reuse(DirLog(stage), booked, key)
    _count(context, manifest)
    again = " (made earlier in this run)" if manifest.get("run") == context.run_id else ""
    context.say(f"{shown:<9} reused {key}{again}")
    return StageResult(stage, manifest, cached=True)


def _attempt(
    context: RunContext, stage: Stage, lease: Lease, names: tuple[str, str, str], key: str, key_parts: Any, work: Work
) -> StageResult:
    name, shown, booked = names
    devices = context.plan.least if context.plan.worker_gpus else 1
    watchdog = Watchdog(shown, context.recipe.cluster.stall_minutes, lambda: stage.exists("manifest.json"))
    with context.ledger.attempt(DirLog(stage), booked, key, devices) as meter:
        reporter = Reporter(context, shown, meter, watchdog, lease.check)
        status = "FAILED"
        try:
            with watch(watchdog):
                found = dict(work(stage, reporter))
            reporter.quarantine.check(reporter.read, context.recipe.data.max_bad_fraction)
            status = "FINISHED"
        finally:
            if reporter.progress:
                reporter.progress.close("done" if status == "FINISHED" else "stopped")
            cost = meter.now()
            reporter.run.finish(
                {"flops": cost.flops, "device_seconds": cost.device_seconds, "wall_seconds": cost.wall_seconds}, status
            )
    found.update(key=key, stage=name, inputs=key_parts, run=context.run_id, read=reporter.read)
    found["quarantine"] = [[b.uri, b.reason, b.stage] for b in reporter.quarantine]
    manifest = stage.commit(found, lease)
    _count(context, manifest)
    return StageResult(stage, manifest, cached=False)


def _count(context: RunContext, manifest: dict[str, Any]) -> None:
    bad = Quarantine(Bad(uri, reason, stage) for uri, reason, stage in manifest.get("quarantine", []))
    # Also of a reused stage: the limit is this recipe's, the stage may have been made under a laxer one.
    bad.check(int(manifest.get("read", 0)), context.recipe.data.max_bad_fraction)
    context.read += int(manifest.get("read", 0))
    context.quarantine.merge(bad)


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
