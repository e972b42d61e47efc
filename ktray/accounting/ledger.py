"""The ledger: the cost of a run in FLOPs, device-seconds, money and energy, for each stage and attempt.

Every attempt at a stage writes records into an append-only log in the stage's folder of the store: one at its start,
heartbeats, and one at its end. The last record of an attempt is its cost, so an attempt that was killed costs what its
last heartbeat recorded. A run *spends* the cost of its own attempts and of the unfinished attempts that it resumes
from. The cost of a reused stage when it was computed is its *original cost*; it only counts in ``without_cache``.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Protocol

from ktray.accounting.device import peak_rss
from ktray.accounting.held import Held
from ktray.accounting.prices import hourly_price

STAGES = ("adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate")
# Decoding the labelled images counts for the stage that needs them first; suggestions are made by jobs/curate.py.
PART_OF = {"labels": "adapt", "suggest": "curate"}
LOG_NAME = "ledger.jsonl"
JOULES_PER_KWH = 3.6e6


class Log(Protocol):
    """The log with the records of one stage under one key."""

    def append(self, line: str) -> None:
        """Append a record; it must still exist when this process has ended."""

    def read(self) -> list[str]:
        """All records in their order."""


class LogDirectory(Protocol):
    """The part of `ktray.storage.store.Dir` that `DirLog` needs."""

    def append_line(self, name: str, line: str) -> None: ...

    def read_lines(self, name: str) -> list[str]: ...


@dataclass(frozen=True)
class DirLog:
    """A `Log` in a directory of the store."""

    directory: LogDirectory

    def append(self, line: str) -> None:
        self.directory.append_line(LOG_NAME, line)

    def read(self) -> list[str]:
        return self.directory.read_lines(LOG_NAME)


@dataclass(frozen=True)
class Entry:
    """One attempt at a stage.

    Attributes:
        stage, key: name of the stage, and the hash of its inputs.
        attempt: number of the attempt under this key, from 1.
        run: id of the run that made the attempt.
        flops: FLOPs that were executed, forward and backward.
        device_seconds: wall seconds times the devices that were held (accelerators, or machines without any).
        wall_seconds: elapsed time.
        images: number of images that were processed; repeats count.
        peak_memory_bytes: largest peak of the processes that reported.
        kwh: measured energy; None if it was not measured.
        usd: price; None if the price of the device is not known.
        cached: whether this run reused the attempt instead of making it.
        restarts: how often the workers restarted, from a checkpoint or with another number of workers.
        lost_flops: the part of ``flops`` that a restart repeated.
        state: ``running`` (the attempt still runs or was killed), ``done`` or ``failed``.
    """

    stage: str
    key: str
    attempt: int = 1
    run: str = ""
    flops: int = 0
    device_seconds: float = 0.0
    wall_seconds: float = 0.0
    images: int = 0
    peak_memory_bytes: int = 0
    kwh: float | None = None
    usd: float | None = 0.0
    cached: bool = False
    restarts: int = 0
    lost_flops: int = 0
    state: str = "done"


def attempts(lines: Iterable[str]) -> list[Entry]:
    """The attempts in a log, each with its last record. Incomplete lines of a killed process are ignored."""
    names = {f.name for f in fields(Entry)}
    latest: dict[tuple[str, str, int], Entry] = {}
    for line in lines:
        try:
            record = json.loads(line)
            entry = Entry(**{name: value for name, value in record.items() if name in names})
        except (ValueError, TypeError, AttributeError):
            continue
        latest[entry.stage, entry.key, entry.attempt] = entry
    return list(latest.values())


class Meter:
    """Measures one attempt at a stage; a context manager.

    It writes a record on entry, then heartbeats, and a record on exit, with the state ``failed`` if an exception passes
    through. The intervals between heartbeats grow with the length of the attempt, so that a long attempt does not write
    too often; if an attempt is killed, at most 2% of its cost is lost.

    Args:
        log: the stage's log.
        entry: stage, key, attempt and run.
        held: the devices that the attempt holds at its start.
        joules: an energy counter such as that of `ktray.accounting.energy.gpu_joules`, or None.
        interval: seconds between heartbeats at the start of the attempt.
        clock: returns seconds; monotonic.
    """

    def __init__(
        self,
        log: Log,
        entry: Entry,
        held: Held,
        joules: Callable[[], float] | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        # The devices held now, since ``_since``, and what was held before.
        self._held, self._since = held, 0.0
        self._before: list[tuple[float, Held]] = []  # seconds, devices
        self._restarts = self._lost = 0
        self._joules, self._interval, self._clock = joules, interval, clock
        self._lock = threading.Lock()
        self._flops = self._images = self._peak = 0
        self._worker_joules: float | None = None
        self._began = self._joules_began = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.entry = entry

    def add(
        self,
        flops: float = 0,
        images: int = 0,
        peak_memory_bytes: int = 0,
        joules: float | None = None,
    ) -> None:
        """Count work; may be called from any thread. All values are added up, except the peak, which is a maximum.

        Args:
            flops: FLOPs that were executed.
            images: number of images that were processed.
            peak_memory_bytes: peak memory of a process.
            joules: energy that workers measured.
        """
        with self._lock:
            self._flops += round(flops)
            self._images += images
            self._peak = max(self._peak, peak_memory_bytes)
            if joules is not None:
                self._worker_joules = (self._worker_joules or 0.0) + joules

    def restart(self, lost_flops: float) -> None:
        """Count a restart of the workers, after which work of ``lost_flops`` is repeated."""
        with self._lock:
            self._restarts += 1
            self._lost += round(lost_flops)

    def hold(self, held: Held) -> None:
        """Set the devices that the attempt holds from now on."""
        with self._lock:
            now = self._clock()
            self._before.append((now - self._since, self._held))
            self._held, self._since = held, now

    def correct(self, held: Held) -> None:
        """Set the devices that the attempt holds since the last `hold`, or since its start, and from now on."""
        with self._lock:
            self._held = held

    def now(self, state: str = "running") -> Entry:
        """The attempt's cost up to this moment."""
        joules = None if self._joules is None else self._joules()  # other nodes may have to answer: without the lock
        with self._lock:
            now = self._clock()
            wall = now - self._began
            parts = [*self._before, (now - self._since, self._held)]
            priced = [seconds * held.hourly / 3600 for seconds, held in parts if held.hourly is not None]
            energy = self._worker_joules
            if joules is not None:
                energy = (energy or 0.0) + joules - self._joules_began
            return replace(
                self.entry,
                flops=self._flops,
                images=self._images,
                wall_seconds=wall,
                device_seconds=sum(seconds * held.devices for seconds, held in parts),
                peak_memory_bytes=max(self._peak, peak_rss()),
                kwh=None if energy is None else energy / JOULES_PER_KWH,
                usd=sum(priced) if len(priced) == len(parts) else None,
                restarts=self._restarts,
                lost_flops=self._lost,
                state=state,
            )

    def beat(self) -> None:
        """Record the cost so far."""
        self._log.append(json.dumps(asdict(self.now())))

    def __enter__(self) -> Meter:
        self._began = self._since = self._clock()
        self._joules_began = self._joules() if self._joules is not None else 0.0
        self.beat()
        self._thread = threading.Thread(target=self._beats, name="ktray-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.entry = self.now("failed" if kind else "done")
        # A full disk or an unreachable store must not hide the exception that passes through.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._log.append(json.dumps(asdict(self.entry)))

    def _beats(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            with contextlib.suppress(Exception):  # if the store is unreachable for a while, only heartbeats are lost
                self.beat()
            wait = max(self._interval, 0.02 * (self._clock() - self._began))


@dataclass
class Ledger:
    """The accounts of one run.

    Args:
        device: the machine of the run: the result of `ktray.accounting.device.describe_device`.
        run: the run's id. All attempts with this id count as spent, also those before a restart of the run.
        prices: the recipe's ``prices``.
        joules: an energy counter such as that of `ktray.accounting.energy.gpu_joules`, or None.
        entries: the attempts that are finished or reused.
        running: the meters of the attempts that are running.
    """

    device: Mapping[str, Any]
    run: str = ""
    prices: Mapping[str, float] = field(default_factory=dict)
    joules: Callable[[], float] | None = None
    entries: list[Entry] = field(default_factory=list)
    running: list[Meter] = field(default_factory=list)

    def spent(self) -> list[Entry]:
        """The attempts that this run has made, each once, including those of a baseline.

        A running attempt has its cost up to now. May be called from any thread.
        """
        entries = [*self.entries, *(meter.now() for meter in list(self.running))]
        own = {(e.stage, e.key, e.attempt): e for e in entries if self.run and e.run == self.run}
        return list(own.values())

    @contextlib.contextmanager
    def attempt(self, log: Log, stage: str, key: str, held: Held | None = None) -> Iterator[Meter]:
        """Measure an attempt: ``with ledger.attempt(log, "teach", key) as meter: ... meter.add(...)``.

        Earlier attempts under the same key that did not finish are also entered, because this one resumes from them.

        Args:
            held: the devices that the attempt holds at its start; None: one like those of the run's machine.
        """
        earlier = [replace(e, stage=stage) for e in attempts(log.read())]
        self.entries += earlier
        number = 1 + max((e.attempt for e in earlier), default=0)
        held = held or Held(1, hourly_price(self.device, self.prices))
        meter = Meter(log, Entry(stage, key, number, self.run), held, self.joules)
        try:
            with meter:
                self.running.append(meter)
                yield meter
        finally:
            if meter in self.running:
                self.running.remove(meter)
            self.entries.append(meter.entry)

    def reuse(self, log: Log, stage: str, key: str) -> None:
        """Enter a complete stage with its original cost, which counts as spent only if this run made the stage.

        The name in the ledger is ``stage``, even if the run that made the stage used another name. A stage that two
        parts of a run use counts once.
        """
        earlier = attempts(log.read()) or [Entry(stage, key, attempt=0)]
        entered = {(e.key, e.attempt) for e in self.entries}
        self.entries += [
            replace(e, stage=stage, cached=not (self.run and e.run == self.run))
            for e in earlier
            if (e.key, e.attempt) not in entered
        ]

    def summary(self) -> dict[str, Any]:
        """`cost_summary` of all entries."""
        return cost_summary(self.entries)

    def stages(self) -> list[dict[str, Any]]:
        """`stage_rows` of all entries."""
        return stage_rows(self.entries)


def cost_summary(entries: Iterable[Entry], stages: Sequence[str] = STAGES) -> dict[str, Any]:
    """The ``cost`` object of ``result.json``.

    ``flops`` and ``device_seconds`` have a key for each stage, including ``evaluate``, and their ``total``. Entries of
    any other stage (a baseline such as ``scratch``, or ``hygiene``) are not part of the method: they are under
    ``baselines`` and in no total but ``with_baselines``, which is what was spent. ``usd`` is None if a price is not
    known, ``kwh`` if nothing was measured. ``without_cache`` also has the original cost of the reused stages.

    Args:
        stages: the stages of the method; another job than those of the pipeline has its own.
    """
    all_entries = [replace(e, stage=PART_OF.get(e.stage, e.stage)) for e in entries]
    method = [e for e in all_entries if e.stage in stages]
    spent = [e for e in method if not e.cached]
    others = [e for e in all_entries if e.stage not in stages]
    return {
        "flops": _by_stage(spent, "flops", stages),
        "device_seconds": _by_stage(spent, "device_seconds", stages),
        "wall_seconds": sum(e.wall_seconds for e in spent),
        "usd": _money(spent),
        "kwh": _energy(spent),
        "images_seen": sum(e.images for e in spent),
        "peak_memory_bytes": max((e.peak_memory_bytes for e in spent), default=0),
        "without_cache": _totals(method),
        "baselines": {s: _totals([e for e in others if e.stage == s]) for s in dict.fromkeys(e.stage for e in others)},
        "with_baselines": _totals([e for e in all_entries if not e.cached]),
    }


def stage_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The ``stages`` list of ``result.json``, in the order of the first entries; numbers are what this run spent."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.stage, entry.key), []).append(entry)
    rows = []
    for (stage, key), group in groups.items():
        spent = [e for e in group if not e.cached]
        rows.append(
            {
                "name": stage,
                "key": key,
                "cached": not spent,
                "attempts": max(e.attempt for e in group),
                "restarts": sum(e.restarts for e in group),
                "wall_seconds": sum(e.wall_seconds for e in spent),
                "flops": sum(e.flops for e in spent),
                "lost_flops": sum(e.lost_flops for e in spent),
                "device_seconds": sum(e.device_seconds for e in spent),
                "images": sum(e.images for e in spent),
                "usd": _money(spent),
            }
        )
    return rows


def _by_stage(spent: list[Entry], what: str, stages: Sequence[str]) -> dict[str, Any]:
    sums = {stage: sum(getattr(e, what) for e in spent if e.stage == stage) for stage in stages}
    return {**sums, "total": sum(sums.values())}


def _totals(entries: list[Entry]) -> dict[str, Any]:
    return {
        "flops": sum(e.flops for e in entries),
        "device_seconds": sum(e.device_seconds for e in entries),
        "usd": _money(entries),
    }


def _money(entries: list[Entry]) -> float | None:
    priced = [e.usd for e in entries if e.usd is not None]
    return sum(priced) if len(priced) == len(entries) else None


def _energy(entries: list[Entry]) -> float | None:
    measured = [e.kwh for e in entries if e.kwh is not None]
    return sum(measured) if measured else None
