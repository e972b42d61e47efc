"""What a run cost: FLOPs, device-seconds, money, energy, by stage and attempt.

Every attempt at a stage writes records into an append-only log in the stage's folder of the store: one at its
start, heartbeats, one at its end. The last record of an attempt is its cost, so an attempt that was killed costs
what its last heartbeat said. What a run *spent* are the attempts made in it and the broken ones that it went on
from; what a reused stage took when it was made is its *worth*, told apart as ``without_cache``.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Protocol

from ktray.accounting.device import peak_rss
from ktray.accounting.prices import price_of

STAGES = ("adapt", "index", "curate", "teach", "transfer", "finetune", "evaluate")
PART_OF = {"labels": "adapt"}  # decoding the labelled images is booked on the stage that first needs them
LOG_NAME = "ledger.jsonl"
JOULES_PER_KWH = 3.6e6


class Log(Protocol):
    """Where the records of one stage under one key are kept; appending must survive the process."""

    def append(self, line: str) -> None: ...

    def read(self) -> list[str]: ...


class LogDirectory(Protocol):
    """The part of `ktray.storage.store.Dir` that `DirLog` needs."""

    def append_line(self, name: str, line: str) -> None: ...

    def read_lines(self, name: str) -> list[str]: ...


@dataclass(frozen=True)
class DirLog:
    """The `Log` in a directory of the store."""

    directory: LogDirectory

    def append(self, line: str) -> None:
        self.directory.append_line(LOG_NAME, line)

    def read(self) -> list[str]:
        return self.directory.read_lines(LOG_NAME)


@dataclass(frozen=True)
class Entry:
    """One attempt at a stage.

    Attributes:
        stage, key: which stage, and the hash of its inputs.
        attempt: 1 for the first under this key.
        run: the run that made it.
        flops: really executed, forward and backward.
        device_seconds: wall seconds times devices held (accelerators; machines where there are none).
        wall_seconds, images: elapsed time; images processed, repeats counted.
        peak_memory_bytes: largest of the processes that reported.
        kwh: measured energy, None where it was not measured.
        usd: None where the device has no known price.
        cached: reused by this run, not spent in it.
        restarts: of its workers, from a checkpoint or with more or fewer of them.
        lost_flops: those among ``flops`` that were done again after a restart.
        state: ``running`` (then it was killed, or still goes on), ``done`` or ``failed``.
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
    """The attempts in a log, each as its last record tells; a torn line (killed while writing) is passed over."""
    known = {f.name for f in fields(Entry)}
    latest: dict[tuple[str, str, int], Entry] = {}
    for line in lines:
        try:
            record = json.loads(line)
            entry = Entry(**{name: value for name, value in record.items() if name in known})
        except (ValueError, TypeError, AttributeError):
            continue
        latest[entry.stage, entry.key, entry.attempt] = entry
    return list(latest.values())


# -------------------------------------------------------------------------------------------------- money


# ------------------------------------------------------------------------------------------------- energy


# --------------------------------------------------------------------------------------------- accounting


class Meter:
    """Measures one attempt at a stage; a context manager.

    Record on entry, then at intervals that grow with the attempt's length (so that a long one does not write
    without end; at most 2% of it is lost when it is killed), and on exit, with the state ``failed`` when an
    exception passes through.

    Args:
        log: the stage's log.
        entry: stage, key, attempt and run.
        device, devices, prices: see `price_of`.
        joules: an energy counter such as `gpu_joules` gives, or None.
        interval: seconds between heartbeats at the start of the attempt.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        log: Log,
        entry: Entry,
        device: Mapping[str, Any],
        devices: int = 1,
        prices: Mapping[str, float] | None = None,
        joules: Callable[[], float] | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._device, self._prices = log, device, dict(prices or {})
        self._devices, self._held, self._since = devices, 0.0, 0.0  # now; device-seconds of those before, until when
        self._restarts = self._lost = 0
        self._joules, self._interval, self._clock = joules, interval, clock
        self._lock = threading.Lock()
        self._flops = self._images = self._peak = 0
        self._device_seconds: float | None = None
        self._handed_joules: float | None = None
        self._began = self._joules_began = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.entry = entry

    def add(
        self,
        flops: float = 0,
        images: int = 0,
        device_seconds: float | None = None,
        peak_memory_bytes: int = 0,
        joules: float | None = None,
    ) -> None:
        """Count work; safe from any thread. All are added up but the peak, whose largest counts.

        Args:
            device_seconds: device time as workers measured it; once given, it replaces wall times devices.
            joules: energy that workers measured.
        """
        with self._lock:
            self._flops += round(flops)
            self._images += images
            self._peak = max(self._peak, peak_memory_bytes)
            if device_seconds is not None:
                self._device_seconds = (self._device_seconds or 0.0) + device_seconds
            if joules is not None:
                self._handed_joules = (self._handed_joules or 0.0) + joules

    def restart(self, lost_flops: float) -> None:
        """Workers began anew, and do again what took ``lost_flops``."""
        with self._lock:
            self._restarts += 1
            self._lost += round(lost_flops)

    def hold(self, devices: int) -> None:
        """From now on the attempt holds so many devices."""
        with self._lock:
            now = self._clock()
            self._held += (now - self._since) * self._devices
            self._devices, self._since = devices, now

    def now(self, state: str = "running") -> Entry:
        """The attempt's cost up to this moment."""
        with self._lock:
            now = self._clock()
            wall = now - self._began
            device_seconds = self._device_seconds
            if device_seconds is None:
                device_seconds = self._held + (now - self._since) * self._devices
            energy = self._handed_joules
            if self._joules is not None:
                energy = (energy or 0.0) + self._joules() - self._joules_began
            return replace(
                self.entry,
                flops=self._flops,
                images=self._images,
                wall_seconds=wall,
                device_seconds=device_seconds,
                peak_memory_bytes=max(self._peak, peak_rss()),
                kwh=None if energy is None else energy / JOULES_PER_KWH,
                usd=price_of(self._device, device_seconds, 1, self._prices),
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
        # A full disk or a lost store must not hide the exception that is on its way.
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self._log.append(json.dumps(asdict(self.entry)))

    def _beats(self) -> None:
        wait = self._interval
        while not self._stop.wait(wait):
            with contextlib.suppress(Exception):  # a store that is away for a while costs a heartbeat, no run
                self.beat()
            wait = max(self._interval, 0.02 * (self._clock() - self._began))


@dataclass
class Ledger:
    """The accounts of one run.

    Args:
        device: the machine that works, as `ktray.accounting.device.describe_device` returns it.
        run: the run's id; attempts under it count as spent however often the run was restarted.
        prices: the recipe's ``prices``.
        joules: an energy counter such as `gpu_joules` gives, or None.
    """

    device: Mapping[str, Any]
    run: str = ""
    prices: Mapping[str, float] = field(default_factory=dict)
    joules: Callable[[], float] | None = None
    entries: list[Entry] = field(default_factory=list)
    running: list[Meter] = field(default_factory=list)

    def spent(self) -> list[Entry]:
        """The attempts that this very run has made, each once, one that still goes on as it stands now; those of a
        baseline too. Safe from any thread."""
        made = [*self.entries, *(meter.now() for meter in list(self.running))]
        own = {(e.stage, e.key, e.attempt): e for e in made if self.run and e.run == self.run}
        return list(own.values())

    @contextlib.contextmanager
    def attempt(self, log: Log, stage: str, key: str, devices: int = 1) -> Iterator[Meter]:
        """Measure an attempt: ``with ledger.attempt(log, "teach", key) as meter: ... meter.add(...)``.

        Earlier attempts under the same key that did not finish are entered too: this one goes on from them.
        """
        earlier = [replace(e, stage=stage) for e in attempts(log.read())]
        self.entries += earlier
        number = 1 + max((e.attempt for e in earlier), default=0)
        meter = Meter(log, Entry(stage, key, number, self.run), self.device, devices, self.prices, self.joules)
        try:
            with meter:
                self.running.append(meter)
                yield meter
        finally:
            if meter in self.running:
                self.running.remove(meter)
            self.entries.append(meter.entry)

    def reuse(self, log: Log, stage: str, key: str) -> None:
        """Enter a stage that was found whole: worth what it took, spent only if this very run had made it.

        It is booked under ``stage``, whatever the run that made it called it. A stage that two parts of one run use
        counts once.
        """
        made = attempts(log.read()) or [Entry(stage, key, attempt=0)]
        known = {(e.key, e.attempt) for e in self.entries}
        self.entries += [
            replace(e, stage=stage, cached=not (self.run and e.run == self.run))
            for e in made
            if (e.key, e.attempt) not in known
        ]

    def summary(self) -> dict[str, Any]:
        """`cost_summary` of all entries."""
        return cost_summary(self.entries)

    def stages(self) -> list[dict[str, Any]]:
        """`stage_rows` of all entries."""
        return stage_rows(self.entries)


def cost_summary(entries: Iterable[Entry]) -> dict[str, Any]:
    """The ``cost`` object of ``result.json``.

    ``flops`` and ``device_seconds`` have a key per stage, ``evaluate`` among them, and their ``total``. Entries of
    any other stage (a baseline such as ``scratch``) are no part of the method: they stand under ``baselines`` and
    in no total. ``usd`` is None when a device in use has no price, ``kwh`` (the sum over what was measured) when
    nothing was. ``without_cache`` adds the worth of the reused stages.
    """
    all_entries = [replace(e, stage=PART_OF.get(e.stage, e.stage)) for e in entries]
    method = [e for e in all_entries if e.stage in STAGES]
    spent = [e for e in method if not e.cached]
    others = [e for e in all_entries if e.stage not in STAGES]
    names = list(dict.fromkeys(e.stage for e in others))
    return {
        "flops": _by_stage(spent, "flops"),
        "device_seconds": _by_stage(spent, "device_seconds"),
        "wall_seconds": sum(e.wall_seconds for e in spent),
        "usd": _money(spent),
        "kwh": _energy(spent),
        "images_seen": sum(e.images for e in spent),
        "peak_memory_bytes": max((e.peak_memory_bytes for e in spent), default=0),
        "without_cache": _totals(method),
        "baselines": {name: _totals([e for e in others if e.stage == name]) for name in names},
    }


def stage_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The ``stages`` list of ``result.json``, in the order of first mention; numbers are what this run spent."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.stage, entry.key), []).append(entry)
    rows = []
    for (stage, key), made in groups.items():
        spent = [e for e in made if not e.cached]
        rows.append(
            {
                "name": stage,
                "key": key,
                "cached": not spent,
                "attempts": max(e.attempt for e in made),
                "restarts": sum(e.restarts for e in made),
                "wall_seconds": sum(e.wall_seconds for e in spent),
                "flops": sum(e.flops for e in spent),
                "lost_flops": sum(e.lost_flops for e in spent),
                "device_seconds": sum(e.device_seconds for e in spent),
                "images": sum(e.images for e in spent),
                "usd": _money(spent),
            }
        )
    return rows


def _by_stage(spent: list[Entry], what: str) -> dict[str, Any]:
    sums = {stage: sum(getattr(e, what) for e in spent if e.stage == stage) for stage in STAGES}
    return {**sums, "total": sum(sums.values())}


def _totals(entries: list[Entry]) -> dict[str, Any]:
    return {
        "flops": sum(e.flops for e in entries),
        "device_seconds": sum(e.device_seconds for e in entries),
        "usd": _money(entries),
    }


def _money(entries: list[Entry]) -> float | None:
    known = [e.usd for e in entries if e.usd is not None]
    return sum(known) if len(known) == len(entries) else None


def _energy(entries: list[Entry]) -> float | None:
    known = [e.kwh for e in entries if e.kwh is not None]
    return sum(known) if known else None
