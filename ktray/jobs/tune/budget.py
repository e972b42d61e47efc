"""The budget of a search: what is spent, what is promised to those that run, what is kept for the winner.

Nothing is begun that does not fit, by the plan and by what earlier runs took; what has begun gets an allowance and is
stopped at it. So what was spent is within the budget, however wrong a plan is. What a run spends are the attempts that
it made itself, by the ledger: a stage that several need is charged once, to the run that made it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.ledger import PART_OF, STAGES, Entry
from ktray.errors import KtrayError
from ktray.recipe.tune import BudgetConfig

UNITS = ("flops", "device_seconds", "usd")
DEFAULT_WALL = 15.0  # minutes, where no limit is set
SLACK = 1.5  # a run may cost so many times what was planned
LOOK_SECONDS = 4.0  # seconds of work that may pass between two looks at the accounts, stopping included
RECORD_SECONDS = 5.0  # seconds between records of the time that has passed
START = 5.0  # seconds in which a stage starts, before any was seen
OVERHEAD = 5.0  # seconds that a run takes beside its stages, likewise
RUN = "run"
CLOSING = 0.04  # share of the time that is left for the page and the logs
CLOSING_LEAST = 8.0  # seconds

Amounts = dict[str, float]


class BudgetExceeded(KtrayError):
    """A run was stopped, since its allowance is spent."""


def limits(budget: BudgetConfig) -> Amounts:
    """The limits of the recipe, with ``wall`` and ``device_seconds`` in seconds."""
    by_unit = {
        "usd": budget.usd,
        "device_seconds": None if budget.device_hours is None else 3600 * budget.device_hours,
        "flops": budget.flops,
        "wall": None if budget.wall is None else 60 * budget.wall,
    }
    limited = {name: float(value) for name, value in by_unit.items() if value is not None}
    return limited or {"wall": 60 * DEFAULT_WALL}


def amounts(entries: Iterable[Entry]) -> Amounts:
    """What attempts cost, in each unit; USD are left out where a device has no price."""
    made = [e for e in entries if PART_OF.get(e.stage, e.stage) in STAGES]
    total = {"flops": float(sum(e.flops for e in made)), "device_seconds": sum(e.device_seconds for e in made)}
    if all(e.usd is not None for e in made):
        total["usd"] = float(sum(e.usd or 0.0 for e in made))
    return total


Seen = tuple[float, float, float]  # FLOPs, wall seconds, device-seconds


@dataclass
class CostRate:
    """How long runs take, by stage: a fixed part and one for each FLOP, learned from the stages that were made.

    Attributes:
        rate: FLOP/s that are assumed until then.
        seen: of each stage what it took; of `RUN` what a run takes beside its stages.
    """

    rate: float
    seen: dict[str, list[Seen]] = field(default_factory=dict)

    def learn(self, entries: Iterable[Entry], wall: float) -> None:
        """Take in a run that came to its end.

        Args:
            wall: seconds that it took, waiting for others included.
        """
        made = [e for e in entries if e.state == "done"]
        for e in made:
            seen = self.seen.setdefault(e.stage, [])
            seen.append((float(e.flops), e.wall_seconds, e.device_seconds))
        overhead = max(0.0, wall - sum(e.wall_seconds for e in made))
        if len(made) < 3:  # one that makes much may have waited for what others made
            self.seen.setdefault(RUN, []).append((0.0, overhead, 0.0))

    def cost(self, stages: Mapping[str, float]) -> tuple[float, float]:
        """Wall seconds and device-seconds of a run that makes stages of so many FLOPs."""
        costs = [self._stage(name, flops) for name, flops in stages.items()]
        overhead = self.seen.get(RUN)
        extra = sum(s[1] for s in overhead) / len(overhead) if overhead else OVERHEAD
        return extra + sum(wall for wall, _ in costs), sum(device for _, device in costs)

    def _stage(self, name: str, flops: float) -> tuple[float, float]:
        guess = START + flops / self.rate
        seen = self.seen.get(name)
        if not seen:
            return guess, guess
        if len({s[0] for s in seen}) < 3:
            # Too few to tell the two parts apart: the guess, corrected by how wrong it was in all.
            whole = sum(START + s[0] / self.rate for s in seen)
            return guess * sum(s[1] for s in seen) / whole, guess * sum(s[2] for s in seen) / whole
        import numpy as np
        from scipy.optimize import nnls

        rows = np.array([[1.0, s[0] / self.rate] for s in seen])
        wall, device = (nnls(rows, np.array([s[column] for s in seen]))[0] for column in (1, 2))
        at = np.array([1.0, flops / self.rate])
        return float(wall @ at), float(device @ at)


@dataclass
class SearchBudget:
    """What a search may still spend; safe from any thread.

    Attributes:
        limits: by unit (`UNITS` and ``wall``, seconds); units that are not in it have no limit.
        parallel: runs at once.
        hourly: USD of an hour of one device, None where it has no price.
        keep: writes `state` to a place that outlives the process.
        charged: by run id, what it spent.
        before: seconds that earlier processes of this search took.
        promised, planned, open_runs: by the name of a run that is under way, its allowance, its plan and its run id.
        reserve: kept for the winner.
        grown: an earlier process of the search had other limits.
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
                "budget.usd is set, and a device of this cluster has no price",
                "Set prices.NAME (USD an hour), or another budget.",
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
        """What nobody has spent, been promised, or needs at the end; of time, what is left until the winner's turn."""
        with self._lock:
            spent = self.spent()
            left = {}
            for unit, limit in self.limits.items():
                promised = 0.0 if unit == "wall" else sum(p.get(unit, 0.0) for p in self.promised.values())
                left[unit] = limit - spent[unit] - promised - self.reserve.get(unit, 0.0) - self.closing(unit)
            return left

    def share(self) -> float:
        """Share of the budget that is spent, of the limit that is nearest."""
        spent = self.spent()
        return max(spent[unit] / limit for unit, limit in self.limits.items())

    def closing(self, unit: str) -> float:
        """What is left for the page, the logs and the end of what is stopped."""
        return max(CLOSING_LEAST, CLOSING * self.limits["wall"]) if unit == "wall" else 0.0

    def rest(self) -> float:
        """Seconds until the time is up."""
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
        """Go on from a kept `state`; returns the runs that were under way when the process ended."""
        self.charged = {run: dict(value) for run, value in state["charged"].items()}
        self.before = float(state["wall"]) + RECORD_SECONDS  # so much may have passed since it was written
        self.speed.seen = {name: [(a, b, c) for a, b, c in rows] for name, rows in state["seen"].items()}
        self.grown = state["limits"] != self.limits
        return list(state["open"].values())

    def record(self) -> None:
        self.keep(self.state())

    # ---------------------------------------------------------------------------------------- promises

    def estimate(self, stages: Mapping[str, float]) -> Amounts:
        """What a run that makes stages of so many FLOPs will cost, in all units."""
        wall, device = self.speed.cost(stages)
        usd = device * (self.hourly or 0.0) / 3600
        return {"flops": sum(stages.values()), "device_seconds": device, "wall": wall, "usd": usd}

    def promise(self, name: str, stages: Mapping[str, float], anyway: bool = False) -> str:
        """Set aside what a run may cost; empty, or why it cannot be paid.

        Args:
            name: of the run, until `settle`.
            stages: that it will make, with the FLOPs of each by the plan.
            anyway: it may try with what is left, even if the plan says that this is too little.
        """
        with self._lock:
            planned, left = self.estimate(stages), self.left()
            for unit, room in left.items():
                # A run that goes beyond its plan is stopped some moments later, for which there must be room too.
                moments = LOOK_SECONDS * planned[unit] / max(1.0, planned["device_seconds"])
                if planned[unit] + (0.0 if unit == "wall" else moments) > room and not anyway:
                    return f"planned {show(unit, planned[unit])}, left {show(unit, max(0.0, room))}"
            self.planned[name] = planned
            known = all(stage in self.speed.seen for stage in stages)
            self.promised[name] = {
                # Before anything was measured a plan in seconds is a guess: the run may take its part of all there is.
                unit: min(room, SLACK * planned[unit]) if unit == "flops" or known else room / self.parallel
                for unit, room in left.items()
                if unit != "wall"
            }
            return ""

    def watch(self, name: str, entries: list[Entry], run: str, final: bool = False) -> None:
        """Look at a run's accounts. A run that is the winner's own may use the time that was kept for it.

        Raises:
            Spent: its allowance is, or the time.
        """
        with self._lock:
            self.open_runs[name] = run
            now = amounts(entries)
            before = self.charged.get(run, {})
            allowed = dict(self.promised.get(name, {}))
            seconds = max(1.0, now["device_seconds"])
            for unit, most in allowed.items():
                used = now.get(unit, 0.0) - before.get(unit, 0.0)
                # What is within its plan ends by itself: a stage may begin faster than it goes on.
                beyond = used > self.planned[name][unit]
                if beyond and used + LOOK_SECONDS * now.get(unit, 0.0) / seconds > most:
                    raise BudgetExceeded(f"stopped at {show(unit, used)} of {show(unit, most)} that it may cost")
            if "wall" in self.limits:
                until = self.limits["wall"] - self.closing("wall") - (0.0 if final else self.reserve.get("wall", 0.0))
                if self.elapsed > until:
                    raise BudgetExceeded(
                        f"stopped after {show('wall', self.elapsed)} of the search, the time that there is"
                    )

    def settle(self, name: str, entries: list[Entry], run: str, wall: float | None = None) -> Amounts:
        """Charge a run what it spent; returns that.

        Args:
            wall: seconds that it took, where it came to its end and so tells how long others will take.
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
    """An amount for a reader."""
    from ktray.reporting.progress import humanise
    from ktray.reporting.units import flops

    if unit == "flops":
        return flops(value)
    if unit == "usd":
        return f"{value:.4f} USD"
    return f"{humanise(value)}{' of device time' if unit == 'device_seconds' else ''}"
