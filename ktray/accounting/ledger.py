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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

from ktray.accounting.attempts import Entry, Log, attempts
from ktray.accounting.device import peak_rss
from ktray.accounting.held import Held
from ktray.accounting.prices import hourly_price
from ktray.accounting.summary import cost_summary, stage_rows

JOULES_PER_KWH = 3.6e6


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
        self._first: tuple[float, int] | None = None  # device-seconds and images at the first count
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
            if images and self._first is None:
                self._first = self._device_seconds(self._clock()), images
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
            parts = self._parts(now)
            device_seconds = self._device_seconds(now)
            priced = [seconds * held.hourly / 3600 for seconds, held in parts if held.hourly is not None]
            energy = self._worker_joules
            if joules is not None:
                energy = (energy or 0.0) + joules - self._joules_began
            return replace(
                self.entry,
                flops=self._flops,
                images=self._images,
                wall_seconds=wall,
                device_seconds=device_seconds,
                start_seconds=self._start(device_seconds),
                peak_memory_bytes=max(self._peak, peak_rss()),
                kwh=None if energy is None else energy / JOULES_PER_KWH,
                usd=sum(priced) if len(priced) == len(parts) else None,
                restarts=self._restarts,
                lost_flops=self._lost,
                state=state,
            )

    def _parts(self, now: float) -> list[tuple[float, Held]]:
        return [*self._before, (now - self._since, self._held)]

    def _device_seconds(self, now: float) -> float:
        return sum(seconds * held.devices for seconds, held in self._parts(now))

    def _start(self, device_seconds: float) -> float:
        """``Entry.start_seconds`` of an attempt that took ``device_seconds`` so far."""
        spent, images = self._first or (0.0, 0)
        later = self._images - images
        return max(0.0, spent - images * (device_seconds - spent) / later) if later > 0 else 0.0

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
