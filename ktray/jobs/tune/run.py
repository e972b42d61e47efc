"""``jobs/tune.py``: a search from its budget to the winner, which is the only model that is tested.

An interrupted search resumes in its folder with the same command: ended trials are read, running trials are started
again and find their finished stages in the store, and the spent budget stays spent.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ktray import recipe as recipes
from ktray.accounting.attempts import DirLog, Entry, attempts
from ktray.distributed import gauges
from ktray.distributed.allocation import Allocation
from ktray.distributed.machines import ClusterMachines
from ktray.errors import KtrayError
from ktray.jobs.compare.parallel import how_many, share
from ktray.jobs.tune import mlflow, result
from ktray.jobs.tune.budget import RECORD_SECONDS, Amounts, CostRate, SearchBudget, amounts, limits, show
from ktray.jobs.tune.default_space import default_space
from ktray.jobs.tune.random_draw import random_draw
from ktray.jobs.tune.records import Records
from ktray.jobs.tune.space import Space, read
from ktray.jobs.tune.trial import STUDENTS, TrialRunner, recipe_of
from ktray.jobs.tune.warm_start import earlier_trials
from ktray.jobs.tune.winner import train_winner
from ktray.models.teacher.families.base import family_of
from ktray.pipeline.checks import require_test_split
from ktray.pipeline.estimate import PlannedDevice
from ktray.pipeline.failure import failure_recorded
from ktray.pipeline.plan_stages import lines
from ktray.pipeline.plan_work import PlannedWork
from ktray.pipeline.resolve import Resolved, resolve
from ktray.pipeline.run_folder import open_run, task_title
from ktray.pipeline.session import Session, open_session
from ktray.recipe.load import dump
from ktray.recipe.schema import Recipe
from ktray.recipe.section import digest
from ktray.recipe.tune import BudgetConfig
from ktray.reporting import log
from ktray.storage.store import Dir, Store, local_home
from ktray.tracking.tracker import tracking_uri

logger = logging.getLogger("ktray")

BUDGET_FILE = "purse.json"
SPARE = 1.2  # factor on the planned time of the winner's seeds: of runs at the same time, some take longer than others


def tune(recipe: Recipe, debug: bool = False) -> dict[str, Any]:
    """Run the search; returns the content of its ``result.json``.

    Raises:
        KtrayError: the space or the budget is invalid, or the budget does not allow the baseline, or the baseline
            failed.
    """
    begun = time.monotonic()
    with open_session(recipe, debug) as session, contextlib.ExitStack() as until:
        return _tune(recipe, debug, begun, session, until)


def _tune(recipe: Recipe, debug: bool, begun: float, session: Session, until: contextlib.ExitStack) -> dict[str, Any]:
    from ktray.jobs.tune import engine

    store, whole = session.store, session.allocation
    at_once, why = how_many(recipe.tune.parallel, whole, recipe.tune.trials or 10**6, session.memory)
    logger.info(f"cluster   {at_once} runs at once ({why})")
    part = share(whole, at_once)
    resolved = baseline(recipe, part)
    require_test_split(resolved.task, "jobs/tune.py tests the best configuration on it")
    base = resolved.recipe
    space = space_of(base, part)
    for spec in space.specs:
        logger.info(f"space     {result.described(spec)}")
    # A search with another budget is the same search; any other change of the recipe makes another search.
    same = digest("tune", dump(recipe.model_copy(update={"budget": BudgetConfig()})))
    run_id, folder = open_run(store, same, f"tune-{task_title(base)}", until)
    folder.write("recipe.yaml", dump(base).encode())
    logger.info(f"tune      {folder.uri}")
    until.enter_context(failure_recorded(folder, run_id, time.time()))
    records = Records(folder)
    records.load()
    budget = _open_budget(resolved, store, folder, at_once, begun, part)
    logger.info("budget    " + ", ".join(show(unit, limit) for unit, limit in budget.limits.items()))
    if budget.grown:
        records.reopen()
    if records.trials:
        logger.info(f"tune      resumes after {len(records.trials)} trials and {show('wall', budget.elapsed)}")
    runner = TrialRunner(base, store, part, budget, records, run_id, debug)
    tracker = mlflow.open_run(base, store, run_id, budget)
    status = "FAILED"
    try:
        reporter = result.SearchReporter(base, records, budget, folder, partial(mlflow.trial, tracker, base, run_id))
        own, test = _planned(resolved, STUDENTS), _planned(resolved, ("evaluate",))
        first = base.tune.rungs[0] * budget.estimate(own)[base.tune.cost]
        with _recording(budget, lambda: keep_for_the_winner(budget, records, base, own, test)):
            engine.run(
                base.tune, space, records, budget, runner.answer, at_once, first, reporter, _former(base, store, space)
            )
        result.check_baseline(records)
        budget.reserve = {}
        with _recording(budget, lambda: None):
            final = train_winner(base, records, budget, runner, test, at_once)
            final["random"] = random_draw(base, records, budget, runner, final["point"], final["results"])
        content = result.build(base, run_id, folder, space, records, budget, final)
        content = result.write(content, base, folder, records, budget, tracker)
        status = "FINISHED"
    finally:
        tracker.finish(status)
        tracker.tell(tracker.close(20))
    log.result("")
    log.result(result.table(content))
    log.result(f"\npage      {folder.file('tune.html')}\nresult    {folder.file('result.json')}")
    log.result(f"student   {content['winner']['student']}")
    log.result(f"chart     {mlflow.chart(base, store, run_id)}")
    return content


def _former(base: Recipe, store: Store, space: Space) -> list[Any]:
    """Return the trials of the experiment ``tune.warm_start``."""
    if base.tune.warm_start is None:
        return []
    uri = tracking_uri(base.mlflow.uri, local_home(store))
    trials = earlier_trials(uri, base.tune.warm_start, base, space, base.tune.search == "nsga2")
    logger.info(f"tune      learns from {len(trials)} runs of '{base.tune.warm_start}' that are within the space")
    return trials


def baseline(recipe: Recipe, plan: Allocation) -> Resolved:
    """Return the baseline, which is the recipe without any change, resolved and with the search's number of steps."""
    if recipe.tune.steps:
        recipe = recipes.override(recipe, {"train.steps": recipe.tune.steps})
    resolved = resolve(recipe, plan)
    # A trial may have another student, for which other weights can be had.
    resolved.recipe.student.pretrained = recipe.student.pretrained
    return resolved


def space_of(base: Recipe, plan: Allocation) -> Space:
    """Return the space of ``tune.space`` of a resolved recipe, or the default space."""
    requested = base.tune.space
    if not requested:
        text = base.teacher.name is not None and family_of(base.teacher.name).has_text
        requested = default_space(base, text, plan.worker_gpus > 0)
    return read(recipe_of(base, {}), requested)


def _planned(resolved: Resolved, stages: Sequence[str]) -> dict[str, float]:
    """Return the planned FLOPs of some stages of the baseline."""
    return {line.stage: line.flops for line in lines(resolved) if line.stage in stages}


def _open_budget(
    resolved: Resolved, store: Store, folder: Dir, at_once: int, begun: float, part: Allocation
) -> SearchBudget:
    base = resolved.recipe
    device = PlannedDevice.of_cluster(ClusterMachines(part, base.prices), part)
    if base.tune.cost == "usd" and device.hourly is None:
        raise KtrayError(
            "tune.cost is usd, but a device of this cluster has no price", "Set prices.NAME (USD an hour)."
        )
    budget = SearchBudget(
        limits(base.budget),
        planned_rate(PlannedWork.of(resolved, part, device.gpu), device, at_once),
        at_once,
        device.hourly,
        lambda state: _keep(folder, state),
    )
    budget.before = time.monotonic() - begun
    if folder.exists(BUDGET_FILE):
        under_way = budget.load(folder.read_json(BUDGET_FILE))
        budget.before += time.monotonic() - begun
        for run, spent in lost(store, under_way).items():
            budget.charged[run] = spent
    budget.record()
    return budget


def planned_rate(work: PlannedWork, device: PlannedDevice, at_once: int) -> CostRate:
    """The speed of each stage of the baseline on a device that ``at_once`` runs share, as it is planned, without the
    start of stages, which `CostRate` adds."""
    found = {stage: planned.device_seconds - planned.start for stage, planned in work.on(device).items()}
    timed = {line.stage: (line.flops, found[line.stage]) for line in work.lines}
    timed = {stage: (flops, spent) for stage, (flops, spent) in timed.items() if flops > 0 and spent > 0}
    rates = {stage: flops / spent / at_once for stage, (flops, spent) in timed.items()}
    together = sum(flops for flops, _ in timed.values()) / sum(spent for _, spent in timed.values())
    return CostRate(together / at_once, rates=rates)


def lost(store: Store, runs: list[str]) -> dict[str, Amounts]:
    """Return what runs of a killed process spent, according to the heartbeats of their stages."""
    if not runs:
        return {}
    made: list[Entry] = []
    stages = store.sub("stages")
    for name in stages.children():
        for key in stages.sub(name).children():
            made += attempts(DirLog(store.stage(name, key)).read())
    return {run: amounts(e for e in made if e.run == run) for run in runs}


def keep_for_the_winner(
    budget: SearchBudget, records: Records, base: Recipe, own: Mapping[str, float], test: Mapping[str, float]
) -> None:
    """Reserve what the winner needs to train its seeds and to test all of them.

    Args:
        own: FLOPs of the stages that train the student of the baseline. If there is already a best point, the FLOPs of
            that point are used instead.
        test: FLOPs of the stage that reads the test split.
    """
    best = records.best(base.tune.cost_limit)
    whole = budget.estimate({**(own if best is None else best.own), **test})
    first = budget.estimate(test) if best is not None else whole  # the search has trained the first seed
    more = base.tune.seeds - 1
    turns = math.ceil(more / budget.parallel)
    # If the budget is too small for all seeds, at least half of it remains for the search.
    budget.reserve = {
        unit: min(first[unit] + (SPARE * turns if unit == "wall" else more) * whole[unit], limit / 2)
        for unit, limit in budget.limits.items()
    }


def _keep(folder: Dir, state: dict[str, Any]) -> None:
    """Store the state of the budget, and set the gauges of what is left of each limit."""
    folder.write_json(BUDGET_FILE, state)
    for unit, limit in state["limits"].items():
        charged = sum(cost.get(unit, 0.0) for cost in state["charged"].values())
        spent = state["wall"] if unit == "wall" else charged
        gauges.put("budget_left_ratio", max(0.0, 1 - spent / limit), run=folder.uri.rpartition("/")[2], unit=unit)


@contextlib.contextmanager
def _recording(budget: SearchBudget, reserve: Callable[[], None]) -> Iterator[None]:
    """Within this context, record the elapsed time and reserve what the winner needs every few seconds."""
    end = threading.Event()

    def record() -> None:
        while True:
            with contextlib.suppress(
                Exception
            ):  # if the store is unreachable for a while, a record is lost, but the search continues
                reserve()
                budget.record()
            if end.wait(RECORD_SECONDS):
                return

    reserve()
    thread = threading.Thread(target=record, name="ktray-budget", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(2 * RECORD_SECONDS)
