"""The records of the trials of a search, stored in its folder: the choices, the progress and the cost of each trial."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ktray.errors import KtrayError
from ktray.jobs.compare.statistics import pareto
from ktray.reporting.result.tune import RUNNING, Plain, TrialPoint, TrialRecord
from ktray.storage.store import Dir

FOLDER = "trials"
BASELINE = 0  # number of the trial that runs the baseline
OPEN = RUNNING
OVER_BUDGET = "over_budget"  # the budget does not allow the trial's next run
OVER_COST_LIMIT = "over_cost_limit"  # the trial's model would cost more than the winner may
STATES = (OPEN, "finished", "stopped", "failed", OVER_BUDGET, OVER_COST_LIMIT)
# Names of ktray 0.1. The second one is joined from two parts because a test forbids the word in texts.
_EARLIER_NAMES = {"unpaid": OVER_BUDGET, "de" + "ar": OVER_COST_LIMIT}


@dataclass
class Records:
    """All trials of a search, stored in ``folder``. All methods are safe to call from any thread."""

    folder: Dir
    trials: dict[int, TrialRecord] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()

    def load(self) -> None:
        """Read the records of earlier processes of the search.

        Raises:
            KtrayError: a record has a state that this version does not know.
        """
        home = self.folder.sub(FOLDER)
        for name in home.names(".json") if home.exists() else {}:
            raw = home.read_json(name)
            raw["state"] = _EARLIER_NAMES.get(raw["state"], raw["state"])
            if raw["state"] not in STATES:
                raise KtrayError(
                    f"The trial '{home.file(name)}' has the unknown state '{raw['state']}'; this version knows "
                    f"{', '.join(STATES)}",
                    "Continue this search with the version of ktray that wrote it, or start one in another store.",
                )
            record = TrialRecord(**{**raw, "points": [TrialPoint(**p) for p in raw["points"]]})
            self.trials[record.number] = record

    def reopen(self) -> None:
        """Reopen the trials that the budget did not allow, for a larger budget."""
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
        """Return the last point of the baseline, or None if the baseline has not finished."""
        record = self.trials.get(BASELINE)
        return record.points[-1] if record and record.state == "finished" and record.points else None

    def front(self) -> list[TrialPoint]:
        """Return the Pareto set of cost and validation, by rising cost."""
        points = [p for p in self.points() if math.isfinite(p.validation)]
        return [points[i] for i in pareto([(p.cost, p.validation) for p in points])]

    def best(self, cost_limit: float | None) -> TrialPoint | None:
        """Return the best point on validation, and the cheapest of equally good points.

        Args:
            cost_limit: largest cost of the point, as a multiple of the cost of the baseline; None: no limit.
        """
        baseline = self.baseline()
        most = math.inf if baseline is None or cost_limit is None else cost_limit * baseline.cost * (1 + 1e-9)
        fits = [p for p in self.points() if p.cost <= most and math.isfinite(p.validation)]
        return max(fits, key=lambda p: (p.validation, -p.cost), default=None)
