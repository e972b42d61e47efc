"""The budget of a search: what is spent, what is allowed to running runs, and what is reserved for the winner.

A run starts only if it fits into the budget, judged by its plan and by the cost of earlier runs. Each run has an
allowance and is stopped when it reaches it, so the search stays within the budget even if a plan is wrong. A run is
charged for the attempts that it made itself, according to the ledger. So a stage that several runs need is charged
once, to the run that computed it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.attempts import Entry
from ktray.accounting.summary import PART_OF, STAGES
from ktray.errors import KtrayError
from ktray.recipe.tune import BudgetConfig

UNITS = ("flops", "device_seconds", "usd")
DEFAULT_WALL = 15.0  # minutes, if no limit is set
SLACK = 1.5  # a run may cost this factor times its plan
LOOK_SECONDS = 4.0  # seconds of work between two looks at the ledger, including the time to stop a run
RECORD_SECONDS = 5.0  # seconds between two records of the elapsed time
START = 5.0  # assumed seconds of start-up of a stage, until one was measured
OVERHEAD = 5.0  # assumed seconds of a run outside its stages, until one was measured
RUN = "run"
CLOSING = 0.04  # share of the time that is reserved for the page and the logs
CLOSING_LEAST = 8.0  # seconds

Amounts = dict[str, float]


class BudgetExceeded(KtrayError):
    """A run was stopped or refused because the budget does not allow it."""


def limits(budget: BudgetConfig) -> Amounts:
    """Return the limits of the recipe, with ``wall`` and ``device_seconds`` in seconds."""
    by_unit = {
        "usd": budget.usd,
        "device_seconds": None if budget.device_hours is None else 3600 * budget.device_hours,
        "flops": budget.flops,
        "wall": None if budget.wall is None else 60 * budget.wall,
    }
    limited = {name: float(value) for name, value in by_unit.items() if value is not None}
    return limited or {"wall": 60 * DEFAULT_WALL}


def amounts(entries: Iterable[Entry]) -> Amounts:
    """Return the cost of attempts in each unit; without USD if a device has no price."""
    made = [e for e in entries if PART_OF.get(e.stage, e.stage) in STAGES]
    total = {"flops": float(sum(e.flops for e in made)), "device_seconds": sum(e.device_seconds for e in made)}
    if all(e.usd is not None for e in made):
        total["usd"] = float(sum(e.usd or 0.0 for e in made))
    return total


Seen = tuple[float, float, float]  # FLOPs, wall seconds, device-seconds


@dataclass
class CostRate:
    """How long runs take, by stage: a fixed time and a time for each FLOP, estimated from the computed stages.

    Attributes:
        rate: FLOP/s that are assumed until stages were measured, for stages without an entry in ``rates``.
        seen: measurements of each stage, and, under `RUN`, of the time of a run outside its stages.
        rates: by stage, the FLOP/s of the plan (`ktray.pipeline.plan_work`).
    """

    rate: float
    seen: dict[str, list[Seen]] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)

    def learn(self, entries: Iterable[Entry], wall: float) -> None:
        """Add the measurements of a finished run.

        Args:
            entries: attempts of the run.
            wall: seconds that the run took, including the time that it waited for others.
        """
        made = [e for e in entries if e.state == "done"]
        for e in made:
            seen = self.seen.setdefault(e.stage, [])
            seen.append((float(e.flops), e.wall_seconds, e.device_seconds))
        overhead = max(0.0, wall - sum(e.wall_seconds for e in made))
        if len(made) < 3:  # a run with many stages may have waited for stages of other runs
            self.seen.setdefault(RUN, []).append((0.0, overhead, 0.0))

    def cost(self, stages: Mapping[str, float]) -> tuple[float, float]:
        """Estimate wall seconds and device-seconds of a run.

        Args:
            stages: FLOPs of each stage that the run computes.
        """
        costs = [self._stage(name, flops) for name, flops in stages.items()]
        overhead = self.seen.get(RUN)
        extra = sum(s[1] for s in overhead) / len(overhead) if overhead else OVERHEAD
        return extra + sum(wall for wall, _ in costs), sum(device for _, device in costs)

    def _stage(self, name: str, flops: float) -> tuple[float, float]:
        rate = self.rates.get(name, self.rate)
        guess = START + flops / rate
        seen = self.seen.get(name)
        if not seen:
            return guess, guess
        if len({s[0] for s in seen}) < 3:
            # Too few measurements to separate the two parts: scale the guess by its error over all measurements.
            whole = sum(START + s[0] / rate for s in seen)
            return guess * sum(s[1] for s in seen) / whole, guess * sum(s[2] for s in seen) / whole
        import numpy as np
        from scipy.optimize import nnls

        rows = np.array([[1.0, s[0] / rate] for s in seen])
        wall, device = (nnls(rows, np.array([s[column] for s in seen]))[0] for column in (1, 2))
        at = np.array([1.0, flops / rate])
        return float(wall @ at), float(device @ at)


@dataclass
class SearchBudget:
    """What a search has spent and may still spend. All methods are safe to call from any thread.

    Attributes:
        limits: limit of each unit (`UNITS`, and ``wall`` in seconds); a unit without an entry has no limit.
        speed: estimates the time of runs.
        parallel: number of runs at once.
        hourly: price of one device in USD an hour, None if it has no price.
        keep: stores `state` so that it survives the process.
        clock: the time in seconds.
        charged: what each run spent, by run id.
        before: seconds that earlier processes of this search took.
        promised, planned, open_runs: allowance, plan and run id of each running run, by its name.
        reserve: amounts that are reserved for the winner.
        grown: whether an earlier process of the search had other limits.
    """

    limits: Amounts
    speed: CostRate
    parallel: int = 1
    hourly: float | None = None
    keep: Callable[[dict[str, Any]], None] = lambda state: None
    clock: Callable[[], float] = time.monotonic
    charged: dict[str, Amounts] = field(default_factory=dict)
    before: float = 0.0
    promised: dict[str, Amounts] = field(default_factory=dict)
    planned: dict[str, Amounts] = field(default_factory=dict)
    open_runs: dict[str, str] = field(default_factory=dict)
    reserve: Amounts = field(default_factory=dict)
    grown: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._began = self.clock()
        if "usd" in self.limits and self.hourly is None:
            raise KtrayError(
                "budget.usd is set, but a device of this cluster has no price",
                "Set prices.NAME (USD an hour), or another limit in budget.",
            )

    # ------------------------------------------------------------------------------------------- state

    @property
    def elapsed(self) -> float:
        """Seconds that the search has run."""
        return self.before + self.clock() - self._began

    def spent(self) -> Amounts:
        with self._lock:
            total = {unit: sum(c.get(unit, 0.0) for c in self.charged.values()) for unit in UNITS}
        return {**total, "wall": self.elapsed}

    def left(self) -> Amounts:
        """Return the part of each limit that is neither spent, nor promised, nor reserved for the end of the search.

        For time, this is the time until the training of the winner must start.
        """
        with self._lock:
            spent = self.spent()
            left = {}
            for unit, limit in self.limits.items():
                promised = 0.0 if unit == "wall" else sum(p.get(unit, 0.0) for p in self.promised.values())
                left[unit] = limit - spent[unit] - promised - self.reserve.get(unit, 0.0) - self.closing(unit)
            return left

    def share(self) -> float:
        """Return the share of the budget that is spent, for the limit that is most used up."""
        spent = self.spent()
        return max(spent[unit] / limit for unit, limit in self.limits.items())

    def closing(self, unit: str) -> float:
        """Return the amount that is reserved for the page, the logs and the end of stopped runs."""
        return max(CLOSING_LEAST, CLOSING * self.limits["wall"]) if unit == "wall" else 0.0

    def rest(self) -> float:
        """Return the seconds until the time limit."""
        return max(1.0, self.limits["wall"] - self.elapsed) if "wall" in self.limits else 60.0

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {
                "limits": self.limits,
                "wall": self.elapsed,
                "charged": self.charged,
                "open": {name: run for name, run in self.open_runs.items() if run not in self.charged},
                "seen": self.speed.seen,
            }

    def load(self, state: Mapping[str, Any]) -> list[str]:
        """Resume from a stored `state`; returns the ids of the runs that were running when the process ended."""
        self.charged = {run: dict(value) for run, value in state["charged"].items()}
        self.before = float(state["wall"]) + RECORD_SECONDS  # the process may have run that long after its last record
        self.speed.seen = {name: [(a, b, c) for a, b, c in rows] for name, rows in state["seen"].items()}
        self.grown = state["limits"] != self.limits
        return list(state["open"].values())

    def record(self) -> None:
        self.keep(self.state())

    # ---------------------------------------------------------------------------------------- promises

    def estimate(self, stages: Mapping[str, float]) -> Amounts:
        """Estimate the cost of a run in all units.

        Args:
            stages: FLOPs of each stage that the run computes.
        """
        wall, device = self.speed.cost(stages)
        usd = device * (self.hourly or 0.0) / 3600
        return {"flops": sum(stages.values()), "device_seconds": device, "wall": wall, "usd": usd}

    def promise(self, name: str, stages: Mapping[str, float], anyway: bool = False) -> str:
        """Reserve the allowance of a run.

        Args:
            name: name of the run until `settle`.
            stages: planned FLOPs of each stage that the run will compute.
            anyway: whether the run may start with what is left, even if the plan needs more.

        Returns:
            An empty string, or the reason why the budget does not allow the run.
        """
        with self._lock:
            planned, left = self.estimate(stages), self.left()
            for unit, room in left.items():
                # A run that exceeds its plan is stopped some seconds later, and the budget must have room for these.
                moments = LOOK_SECONDS * planned[unit] / max(1.0, planned["device_seconds"])
                if planned[unit] + (0.0 if unit == "wall" else moments) > room and not anyway:
                    return f"planned {show(unit, planned[unit])}, left {show(unit, max(0.0, room))}"
            self.planned[name] = planned
            known = all(stage in self.speed.seen for stage in stages)
            self.promised[name] = {
                # Until its stages were measured, a plan in seconds is a guess: the run may use its share of the rest.
                unit: min(room, SLACK * planned[unit]) if unit == "flops" or known else room / self.parallel
                for unit, room in left.items()
                if unit != "wall"
            }
            return ""

    def watch(self, name: str, entries: list[Entry], run: str, final: bool = False) -> None:
        """Check a run's ledger against its allowance and the time limit.

        Args:
            name: name of the run, see `promise`.
            entries: attempts that the run has made so far.
            run: id of the run.
            final: whether the run may use the time that is reserved for the winner.

        Raises:
            BudgetExceeded: the allowance or the time is used up.
        """
        with self._lock:
            self.open_runs[name] = run
            now = amounts(entries)
            before = self.charged.get(run, {})
            allowed = dict(self.promised.get(name, {}))
            seconds = max(1.0, now["device_seconds"])
            for unit, most in allowed.items():
                used = now.get(unit, 0.0) - before.get(unit, 0.0)
                # A run within its plan is not stopped, because a stage may spend faster at its start than later.
                beyond = used > self.planned[name][unit]
                if beyond and used + LOOK_SECONDS * now.get(unit, 0.0) / seconds > most:
                    raise BudgetExceeded(f"stopped at {show(unit, used)} of its allowance of {show(unit, most)}")
            if "wall" in self.limits:
                until = self.limits["wall"] - self.closing("wall") - (0.0 if final else self.reserve.get("wall", 0.0))
                if self.elapsed > until:
                    raise BudgetExceeded(
                        f"stopped after {show('wall', self.elapsed)} of the search, at the limit of its time"
                    )

    def settle(self, name: str, entries: list[Entry], run: str, wall: float | None = None) -> Amounts:
        """Charge a run for what it spent; returns the amounts.

        Args:
            name: name of the run, see `promise`.
            entries: attempts that the run made.
            run: id of the run; empty if it did not start.
            wall: seconds that the run took if it finished, to estimate the time of other runs; otherwise None.
        """
        with self._lock:
            self.promised.pop(name, None)
            self.planned.pop(name, None)
            self.open_runs.pop(name, None)
            spent = amounts(entries)
            if run:
                self.charged[run] = spent
            if wall is not None:
                self.speed.learn(entries, wall)
        self.record()
        return spent


def show(unit: str, value: float) -> str:
    """Format an amount for a reader."""
    from ktray.reporting.progress import humanise
    from ktray.reporting.units import flops

    if unit == "flops":
        return flops(value)
    if unit == "usd":
        return f"{value:.4f} USD"
    return f"{humanise(value)}{' of device time' if unit == 'device_seconds' else ''}"
