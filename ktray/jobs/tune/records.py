"""The trials of a search as they are remembered in its folder: what each was given, how far it came, what it cost."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ktray.jobs.compare.statistics import pareto
from ktray.reporting.result.tune import RUNNING, Plain, TrialPoint, TrialRecord
from ktray.storage.store import Dir

FOLDER = "trials"
BASELINE = 0  # number of the trial that is the recipe as given
OPEN = RUNNING
OVER_BUDGET = "over_budget"  # the budget did not suffice for its next run
OVER_COST_LIMIT = "over_cost_limit"  # its model would cost more than the winner may
EARLIER_STATES = {"unpaid": OVER_BUDGET, "dear": OVER_COST_LIMIT}  # as records of ktray 0.1 name them


@dataclass
class Records:
    """All trials of a search, kept in ``folder``; safe from any thread."""

    folder: Dir
    trials: dict[int, TrialRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()

    def load(self) -> None:
        """Read what an earlier process of the search has kept."""
        home = self.folder.sub(FOLDER)
        for name in home.names(".json") if home.exists() else {}:
            raw = home.read_json(name)
            raw["state"] = EARLIER_STATES.get(raw["state"], raw["state"])
            record = TrialRecord(**{**raw, "points": [TrialPoint(**p) for p in raw["points"]]})
            self.trials[record.number] = record

    def reopen(self) -> None:
        """Trials that could not be paid are to go on: there is more to spend."""
        for record in self.in_order():
            if record.state == OVER_BUDGET:
                self.close(record, OPEN)

    def begin(self, params: dict[str, Plain], keys: dict[str, Any]) -> TrialRecord:
        with self._lock:
            record = TrialRecord(max(self.trials, default=-1) + 1, params, keys)
            self.trials[record.number] = record
        self.keep(record)
        return record

    def keep(self, record: TrialRecord) -> None:
        self.folder.sub(FOLDER).write_json(f"{record.number:05d}.json", asdict(record))

    def close(self, record: TrialRecord, state: str, reason: str = "") -> None:
        with self._lock:
            record.state, record.reason = state, reason
        self.keep(record)

    def in_order(self) -> list[TrialRecord]:
        with self._lock:
            return [self.trials[number] for number in sorted(self.trials)]

    def points(self) -> Iterator[TrialPoint]:
        for record in self.in_order():
            yield from list(record.points)

    def baseline(self) -> TrialPoint | None:
        """The recipe as given, trained to its end; None as long as it is not."""
        record = self.trials.get(BASELINE)
        return record.points[-1] if record and record.state == "finished" and record.points else None

    def front(self) -> list[TrialPoint]:
        """The Pareto set of cost and validation, by rising cost."""
        points = [p for p in self.points() if math.isfinite(p.validation)]
        return [points[i] for i in pareto([(p.cost, p.validation) for p in points])]

    def best(self, cost_limit: float | None) -> TrialPoint | None:
        """The most accurate on validation, of equals the cheapest.

        Args:
            cost_limit: times the cost of the recipe as given, that it may cost at most.
        """
        baseline = self.baseline()
        most = math.inf if baseline is None or cost_limit is None else cost_limit * baseline.cost * (1 + 1e-9)
        fits = [p for p in self.points() if p.cost <= most and math.isfinite(p.validation)]
        return max(fits, key=lambda p: (p.validation, -p.cost), default=None)
