"""What a trial does: the pipeline with its recipe, at rising shares of its steps, on validation alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.ledger import Entry, Ledger
from ktray.distributed.allocation import Allocation
from ktray.distributed.explain import explain
from ktray.errors import KtrayError
from ktray.jobs.compare import methods
from ktray.jobs.tune.budget import BudgetExceeded, SearchBudget
from ktray.jobs.tune.records import BASELINE, OVER_BUDGET, OVER_COST_LIMIT, Records, TrialPoint, TrialRecord
from ktray.pipeline import plan as planning
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import run as pipeline
from ktray.pipeline.run import whole_stages
from ktray.recipe.schema import Recipe
from ktray.recipe.tune import BudgetConfig, TuneConfig
from ktray.reporting.log import muted, titled
from ktray.reporting.progress import hushed
from ktray.storage.store import Store
from ktray.tracking.tags import RUN_NAME
from ktray.tracking.tracker import WAY

STUDENTS = ("transfer", "finetune")  # stages that a trial has for itself
LEAST = 0.2  # of the steps that a trial was to have, below which the cost limit does not cut it
ASIDE = "trials"  # the runs of trials are logged in an experiment of their own


def recipe_of(base: Recipe, keys: dict[str, Any], share: float = 1.0, seed: int | None = None) -> Recipe:
    """The recipe of one run: the base with a trial's keys, a share of its steps, and without the search's own part.

    Args:
        base: with ``train.steps`` set.
    """
    plain = base.model_copy(update={"tune": TuneConfig(), "budget": BudgetConfig()}, deep=True)
    recipe = methods.recipe_of(plain, keys, **({} if seed is None else {"seed": seed}))
    if share < 1:
        recipe.train.steps = max(1, round(share * int(recipe.train.steps or 1)))
        recipe.finetune.steps = max(1, round(share * recipe.finetune.steps)) if recipe.finetune.steps else 0
    return recipe


class CostLimitExceeded(KtrayError):
    """A trial whose model would cost more than the winner may."""


@dataclass
class RunMeter:
    """The accounts of one run, from its first look on, and what ends it."""

    budget: SearchBudget
    name: str
    final: bool = False
    ledger: Ledger | None = None

    def __call__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.budget.watch(self.name, ledger.spent(), ledger.run, self.final)

    @property
    def run(self) -> str:
        return self.ledger.run if self.ledger else ""

    def spent(self) -> list[Entry]:
        return self.ledger.spent() if self.ledger else []

    def students(self, unit: str) -> dict[str, float]:
        """What each of the stages that train the student is worth, in a unit."""
        worth: dict[str, float] = {}
        for entry in self.ledger.entries if self.ledger else []:
            if entry.stage in STUDENTS:
                worth[entry.stage] = worth.get(entry.stage, 0.0) + float(getattr(entry, unit) or 0.0)
        return worth


@dataclass
class TrialRunner:
    """Runs the trials' recipes.

    Attributes:
        base: the recipe as given, without open keys that decide a cost.
        share: plan of one pipeline.
        search: id of the search, for tags.
    """

    base: Recipe
    store: Store
    share: Allocation
    budget: SearchBudget
    records: Records
    search: str
    debug: bool = False
    _plans: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def shares(self) -> list[float]:
        return self.base.tune.rungs

    @contextlib.contextmanager
    def lines_of(self, title: str) -> Iterator[None]:
        """Within it, the pipeline's lines have a title and are shown with ``--debug`` only, and there are no progress
        lines: nobody can follow those of several runs at once."""
        with hushed(not self.debug), titled(title, muted=not self.debug):
            yield

    def shares_of(self, record: TrialRecord) -> list[float]:
        """The recipe as given is trained to its end at once: all others are compared with it."""
        return [1.0] if record.number == BASELINE else self.shares

    def answer(self, number: int, rung: int) -> dict[str, Any]:
        """The result of a rung, for Tune; one that was made before is read. Never raises: what goes wrong is the
        trial's."""
        record = self.records.trials[number]
        last = rung == len(self.shares_of(record)) - 1
        if rung < len(record.points):
            return self._result(record, record.points[rung], last)
        try:
            point = self._run(record, rung)
        except CostLimitExceeded as exceeded:
            self.records.close(record, OVER_COST_LIMIT, exceeded.what)
        except BudgetExceeded as spent:
            self.records.close(record, OVER_BUDGET, spent.what)
        except Exception as error:
            self.records.close(record, "failed", explain(error))
        else:
            record.points.append(point)
            self.records.keep(record)
            return self._result(record, point, last)
        return {"validation": math.nan, "cost": math.nan, "full_cost": math.nan, "done": True, "ended": record.state}

    def _result(self, record: TrialRecord, point: TrialPoint, last: bool) -> dict[str, Any]:
        return {
            "validation": point.validation,
            "cost": point.resource,
            "full_cost": record.planned if record.planned is not None else point.cost,
            "done": last,
            "ended": "",
            "baseline": record.number == BASELINE,
        }

    def _run(self, record: TrialRecord, rung: int) -> TrialPoint:
        share = self.shares_of(record)[rung]
        recipe, to_make = self._plan(record, rung)
        unit = self.base.tune.cost
        name = f"{record.number}/{rung}"
        if refused := self.budget.promise(name, to_make):
            raise BudgetExceeded(f"rung {rung + 1} cannot be paid: {refused}")
        # Without the recipe as given there is nothing to compare with: it may take the time that the winner is kept.
        meter, begun, finished = RunMeter(self.budget, name, final=record.number == BASELINE), time.monotonic(), False
        title = "as given" if record.number == BASELINE else f"trial {record.number}"
        tags = {"tune": self.search, WAY: title, RUN_NAME: f"{title}, {share:.2g} of its steps"}
        try:
            with self.lines_of(title):
                result = pipeline(recipe, self.debug, self.share, tags, trial=True, limit=meter)
            finished = True
        finally:
            seconds = time.monotonic() - begun
            spent = self.budget.settle(name, meter.spent(), meter.run, seconds if finished else None)
            if not finished:
                record.lost = spent
        validation = float(result["metric"]["val"])
        if not math.isfinite(validation):
            raise KtrayError(f"validation is {validation}", "A lower learning rate may help.")
        before = record.points[-1].resource if record.points else 0.0
        whole = result["cost"]["without_cache"]
        return TrialPoint(
            trial=record.number,
            rung=rung,
            share=share,
            steps=int(recipe.train.steps or 0),
            run=result["run_id"],
            validation=validation,
            cost=float(whole[unit] or 0.0),
            whole=whole,
            own=meter.students("flops"),
            resource=before + sum(meter.students(unit).values()),
            spent=spent,
            seconds=seconds,
        )

    def _plan(self, record: TrialRecord, rung: int) -> tuple[Recipe, dict[str, float]]:
        """The recipe of a rung, and the FLOPs of the stages that it will make, which the store does not hold."""
        share = self.shares_of(record)[rung]
        if record.number not in self._plans:
            self._plans[record.number] = self._stages(recipe_of(self.base, record.keys))
            self._fit(record)
        recipe = recipe_of(self.base, record.keys, share)
        recipe.mlflow.experiment = f"{recipe.mlflow.experiment}-{ASIDE}"
        with muted():
            there = whole_stages(self.store, resolve(recipe, self.share), self.share)
        planned = {k: v * share if k in STUDENTS else v for k, v in self._plans[record.number].items()}
        return recipe, {stage: flops for stage, flops in planned.items() if not there.get(stage, False)}

    def _stages(self, recipe: Recipe) -> dict[str, float]:
        with muted():
            resolved = resolve(recipe, self.share)
        return {line.stage: line.flops for line in planning.lines(resolved) if line.stage != "evaluate"}

    def _fit(self, record: TrialRecord) -> None:
        """A model that would cost more than the winner may gets so many steps fewer."""
        stages, first = self._plans[record.number], self.records.trials[BASELINE]
        if self.base.tune.cost_limit is not None and record.number != BASELINE:
            # Of trials that begin together another one may be planned before the recipe as given.
            baseline_flops = first.flops or sum(self._stages(recipe_of(self.base, first.keys)).values())
            self._cut(record, stages, baseline_flops, self.base.tune.cost_limit * baseline_flops)
        record.flops = sum(stages.values())
        record.planned = self.budget.estimate(stages)[self.base.tune.cost]
        self.records.keep(record)

    def _cut(self, record: TrialRecord, stages: dict[str, float], baseline_flops: float, limit: float) -> None:
        whole, transfer = sum(stages.values()), stages.get("transfer", 0.0)
        if whole <= limit * (1 + 1e-9):
            return
        share = (limit - (whole - transfer)) / transfer if transfer else 0.0
        if share < LEAST:
            raise CostLimitExceeded(
                f"it would cost {whole / baseline_flops:.2f} times what the recipe as given does (tune.cost_limit)"
            )
        requested = int(recipe_of(self.base, record.keys).train.steps or 1)
        record.keys["train.steps"] = max(1, int(share * requested))
        stages["transfer"] = transfer * record.keys["train.steps"] / requested
