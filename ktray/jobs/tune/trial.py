"""The runs of a trial: the pipeline with the trial's recipe, at rising shares of its steps, without the test split."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ktray.accounting.attempts import Entry
from ktray.accounting.ledger import Ledger
from ktray.distributed.allocation import Allocation
from ktray.distributed.explain import explain
from ktray.errors import KtrayError
from ktray.jobs.compare import methods
from ktray.jobs.tune.budget import BudgetExceeded, SearchBudget
from ktray.jobs.tune.records import BASELINE, OVER_BUDGET, OVER_COST_LIMIT, Records, TrialPoint, TrialRecord
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.resolve import resolve
from ktray.pipeline.run import look_at_stages
from ktray.pipeline.run import run as pipeline
from ktray.recipe.schema import Recipe
from ktray.recipe.tune import BudgetConfig, TuneConfig
from ktray.reporting.log import muted, titled
from ktray.reporting.progress import hushed
from ktray.storage.store import Store
from ktray.tracking.tags import RUN_NAME
from ktray.tracking.tracker import WAY

STUDENTS = ("transfer", "finetune")  # stages that trials do not share
LEAST = 0.2  # smallest share of a trial's steps to which the cost limit may reduce them
ASIDE = "trials"  # the runs of trials are logged in an experiment of their own


def recipe_of(base: Recipe, keys: dict[str, Any], share: float = 1.0, seed: int | None = None) -> Recipe:
    """Return the recipe of one run: the base with a trial's keys and a share of its steps, without tune and budget.

    Args:
        base: a recipe in which ``train.steps`` is set.
        keys: dotted recipe keys of the trial.
        share: share of the steps.
        seed: seed of the run; None: the seed of ``base``.
    """
    plain = base.model_copy(update={"tune": TuneConfig(), "budget": BudgetConfig()}, deep=True)
    recipe = methods.recipe_of(plain, keys, **({} if seed is None else {"seed": seed}))
    if share < 1:
        recipe.train.steps = max(1, round(share * int(recipe.train.steps or 1)))
        recipe.finetune.steps = max(1, round(share * recipe.finetune.steps)) if recipe.finetune.steps else 0
    return recipe


class CostLimitExceeded(KtrayError):
    """The model of a trial would cost more than the winner may."""


@dataclass
class RunMeter:
    """Reads the ledger of one run and stops the run at the limit of its budget.

    Attributes:
        budget: the budget of the search.
        name: name of the run in the budget.
        final: whether the run may use the time that is reserved for the winner.
        ledger: the ledger of the run, None before its first call.
    """

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
        """Return the cost of each stage that trains the student, including reused stages, in a unit."""
        worth: dict[str, float] = {}
        for entry in self.ledger.entries if self.ledger else []:
            if entry.stage in STUDENTS:
                worth[entry.stage] = worth.get(entry.stage, 0.0) + float(getattr(entry, unit) or 0.0)
        return worth


@dataclass
class TrialRunner:
    """Runs the recipes of trials.

    Attributes:
        base: the baseline, resolved: all keys that determine a cost are set.
        store: the store of the search.
        share: allocation of one pipeline.
        budget: the budget of the search.
        records: the trials of the search.
        search: id of the search, for tags.
        debug: whether the lines of the pipelines are shown.
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
        """Within this context, the pipeline's lines have a title and are shown only with ``--debug``, and there are no
        progress lines, since the lines of several runs at once are hard to follow."""
        with hushed(not self.debug), titled(title, muted=not self.debug):
            yield

    def shares_of(self, record: TrialRecord) -> list[float]:
        """Return the shares of steps of a trial's rungs. The baseline has a single rung with all steps, because all
        other trials are compared with it."""
        return [1.0] if record.number == BASELINE else self.shares

    def answer(self, number: int, rung: int) -> dict[str, Any]:
        """Return the result of a rung for Tune. A result that exists is read. Errors never leave this method: they end
        the trial with a reason in its record."""
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
            raise BudgetExceeded(f"the budget does not allow rung {rung + 1}: {refused}")
        planned = dict(self.budget.planned[name])
        # Without the baseline there is nothing to compare with, so it may use the time reserved for the winner.
        meter, begun, finished = RunMeter(self.budget, name, final=record.number == BASELINE), time.monotonic(), False
        title = "baseline" if record.number == BASELINE else f"trial {record.number}"
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
            raise KtrayError(f"the validation metric is {validation}", "A lower learning rate may help.")
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
            planned=planned,
        )

    def _plan(self, record: TrialRecord, rung: int) -> tuple[Recipe, dict[str, float]]:
        """Return the recipe of a rung, and the FLOPs of each stage that it will compute, which the store lacks."""
        share = self.shares_of(record)[rung]
        if record.number not in self._plans:
            self._plans[record.number] = self._stages(recipe_of(self.base, record.keys))
            self._fit(record)
        recipe = recipe_of(self.base, record.keys, share)
        recipe.mlflow.experiment = f"{recipe.mlflow.experiment}-{ASIDE}"
        with muted():
            there = look_at_stages(self.store, resolve(recipe, self.share), self.share).whole
        planned = {k: v * share if k in STUDENTS else v for k, v in self._plans[record.number].items()}
        return recipe, {stage: flops for stage, flops in planned.items() if not there.get(stage, False)}

    def _stages(self, recipe: Recipe) -> dict[str, float]:
        with muted():
            resolved = resolve(recipe, self.share)
        # A trial does not read the test split.
        return {line.stage: line.flops for line in lines(resolved) if line.stage not in ("evaluate", "hygiene")}

    def _fit(self, record: TrialRecord) -> None:
        """Reduce the steps of a trial whose model would cost more than the winner may."""
        stages, first = self._plans[record.number], self.records.trials[BASELINE]
        if self.base.tune.cost_limit is not None and record.number != BASELINE:
            # If trials start at the same time, another trial may be planned before the baseline.
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
                f"its model would cost {whole / baseline_flops:.2f} times as much as the baseline (see tune.cost_limit)"
            )
        requested = int(recipe_of(self.base, record.keys).train.steps or 1)
        record.keys["train.steps"] = max(1, int(share * requested))
        stages["transfer"] = transfer * record.keys["train.steps"] / requested
