"""The search engines: Optuna proposes trials, Ray Tune runs them, ASHA (or the median rule) stops the weak ones.

ASHA measures progress in cost, not in epochs: it compares a trial with trials that have cost as much. Tune does not
store what Optuna learned; ktray rebuilds it from the records of the search. So an interrupted search resumes after any
number of finished trials, and trials of earlier experiments are added in the same way.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from ktray.distributed.ray_internals import remember_result
from ktray.jobs.tune.budget import UNITS, SearchBudget
from ktray.jobs.tune.records import BASELINE, OPEN, OVER_BUDGET, Records, TrialRecord
from ktray.jobs.tune.space import Plain, Space, values_of
from ktray.jobs.tune.trial_bridge import Ask, Servers, Trial, TrialBridge
from ktray.recipe.tune import TuneConfig

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

HALVING = 3  # at each level of cost, ASHA continues one of this many trials
REFUSED = 3  # the search ends after this many trials in a row that the budget does not allow
FAILED = 10  # the search ends after this many failed trials in a row, since then something is wrong with all of them
STUDY = "ktray"


class _NotPickled:
    """An object that stays in this process. Tune copies and pickles its arguments to restore experiments; ktray
    restores them from its own records."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return (object, ())


class Proposer(_NotPickled, Searcher):
    """Numbers the proposals of the inner search, and stops proposing when the search is over.

    Args:
        inner: proposes points of the space.
        again: trials that an interrupted search had started, in the order in which ``inner`` proposes them again; the
            baseline is the first if it has not finished.
        most: the largest number of trials; None: any number.
        over: returns whether no further trial may start.
    """

    def __init__(
        self,
        inner: OptunaSearch,
        space: Space,
        records: Records,
        again: list[TrialRecord],
        most: int | None,
        over: Callable[[], bool],
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._inner, self._space, self._records, self._most, self._over = inner, space, records, most, over
        self._again = list(again)
        self._mine: dict[str, int] = {}

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        full = self._most is not None and len(self._records.trials) >= self._most
        if self._over() or (full and not self._again):
            return Searcher.FINISHED
        record = self._again.pop(0) if self._again else None
        if record is None or record.number != BASELINE:
            params: dict[str, Plain] = dict(self._inner.suggest(trial_id) or {})
            if record is None:
                record = self._records.begin(params, self._space.keys(params))
        self._mine[trial_id] = record.number
        return {"number": record.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._mine.get(trial_id, BASELINE) != BASELINE and not result["ended"]:
            self._inner.on_trial_result(trial_id, self._seen(result))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._mine.pop(trial_id, BASELINE)
        if number == BASELINE:
            record = self._records.trials.get(BASELINE)
            if record and (earlier := study_trial(self._space, record, self._inner.metric)):
                study: Any = self._inner._ot_study
                study.add_trial(earlier)
            return
        bad = error or result is None or bool(result.get("ended"))
        self._inner.on_trial_complete(trial_id, None if bad else self._seen(result or {}), error=bad)

    @staticmethod
    def _seen(result: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in result.items() if k in ("validation", "full_cost", "training_iteration")}

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        return None


class _KeepBaseline(_NotPickled):
    """A stopping rule that never stops the baseline or a trial that has ended. All trials count for the others."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["ended"]:
            return str(TrialScheduler.CONTINUE)
        action: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        return str(TrialScheduler.CONTINUE) if result["baseline"] or result["done"] else action


class Halving(_KeepBaseline, ASHAScheduler):
    """ASHA with cost as its time axis."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if result["ended"]:  # the trial has no validation metric that could count
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def remember(self, name: str, cost: float, validation: float) -> None:
        """Add a result of an earlier process of this search."""
        remember_result(self, _TrialRef(name), cost, validation)


class Median(_KeepBaseline, MedianStoppingRule):
    """The median rule with cost as its time axis."""


class NoStopping(_KeepBaseline, FIFOScheduler):
    """No stopping: every trial runs all its rungs."""


@dataclass(frozen=True)
class _TrialRef:
    trial_id: str


@dataclass
class Watcher(_NotPickled, Callback):
    """Updates the records when trials end, and reports the progress of the search."""

    records: Records
    report: Callable[[TrialRecord], None]
    numbers: dict[str, int] = field(default_factory=dict)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.numbers[trial.trial_id] = int(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.report(self.records.trials[int(trial.config["number"])])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.records.trials[int(trial.config["number"])]
        if record.state == OPEN:
            ended = bool((trial.last_result or {}).get("done"))
            finished = ended and record.last is not None and record.last.share == 1
            reason = "" if finished else "weaker on validation than other trials of the same cost"
            self.records.close(record, "finished" if finished else "stopped", reason)
        self.report(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.records.trials[int(trial.config["number"])]
        if record.state == OPEN:
            self.records.close(record, "failed", "the process of the trial in Ray Tune died")
        self.report(record)


def run(
    part: TuneConfig,
    space: Space,
    records: Records,
    budget: SearchBudget,
    answer: Ask,
    at_once: int,
    unit: float,
    report: Callable[[TrialRecord], None],
    former: Sequence[FrozenTrial] = (),
) -> None:
    """Run the search until the budget, the space or ``tune.trials`` is used up.

    Args:
        part: section ``tune`` of the recipe.
        space: the search space.
        records: the trials of the search; new trials are added.
        budget: what the search may spend.
        answer: runs a rung, see `ktray.jobs.tune.trial`.
        at_once: number of trials at once.
        unit: cost of the student in the first rung of the baseline, in the unit ``tune.cost``.
        report: is called with a trial whenever its record changes.
        former: trials of earlier experiments.
    """
    import ray

    _quiet()
    metric: Any = ["validation", "full_cost"] if part.search == "nsga2" else "validation"
    mode: Any = ["max", "min"] if part.search == "nsga2" else "max"
    if BASELINE not in records.trials:
        records.begin({}, {})
    begun = [r for r in records.in_order() if r.state == OPEN]
    storage, most = _storage(part, space, records, begun, metric, former)
    sampler = _sampler(part, records)
    inner = OptunaSearch(space.define, metric=metric, mode=mode, sampler=sampler, storage=storage, study_name=STUDY)
    proposer = Proposer(inner, space, records, begun, most, lambda: _over(records, budget))
    scheduler = _scheduler(part, unit, records)
    node = f"node:{ray.util.get_node_ip_address()}"
    actor: Any = ray.remote(TrialBridge)
    bridge = actor.options(num_cpus=0, resources={node: 0.001}, max_concurrency=1000).remote()
    with contextlib.ExitStack() as until:
        until.callback(ray.kill, bridge)
        folder = until.enter_context(tempfile.TemporaryDirectory(prefix="ktray-tune-"))
        until.enter_context(Servers(bridge, answer, at_once))
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(Trial, bridge=bridge), tune.PlacementGroupFactory([{"CPU": 0.0, node: 0.001}])
            ),
            tune_config=tune.TuneConfig(
                search_alg=proposer,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                callbacks=[Watcher(records, report)],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()

    for record in records.in_order():  # started by an earlier process, and now outside the budget
        if record.state == OPEN:
            records.close(record, OVER_BUDGET, "interrupted; the rest of the budget does not allow it")
            report(record)


def _quiet() -> None:
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": "16",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    import optuna

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def _sampler(part: TuneConfig, records: Records) -> Any:
    import optuna

    # A resumed search needs another seed, since the same draws would give the same trials.
    seed = part.seed + 7919 * len(records.trials)
    if part.search == "tpe":
        # This sampler models dependences between the keys of a trial, and counts running trials as bad, not as unknown.
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=5
        )
    if part.search == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=8)
    return optuna.samplers.RandomSampler(seed=seed)


def _storage(
    part: TuneConfig,
    space: Space,
    records: Records,
    begun: list[TrialRecord],
    metric: Any,
    former: Sequence[FrozenTrial],
) -> tuple[BaseStorage, int | None]:
    """Create a study with all ended trials and with the queue of proposals.

    Returns:
        The storage of the study, and the largest number of trials (None: any number).
    """
    import optuna

    storage = optuna.storages.InMemoryStorage()
    directions: Any = ["maximize", "minimize"] if isinstance(metric, list) else ["maximize"]
    study = optuna.create_study(storage=storage, study_name=STUDY, directions=directions)
    for trial in former:
        study.add_trial(trial)
    for record in records.in_order():
        earlier = study_trial(space, record, metric)
        if earlier is not None:
            study.add_trial(earlier)
    for record in begun:
        if record.number != BASELINE:
            study.enqueue_trial(record.params)
    if part.search != "grid":
        return storage, part.trials
    ended = [r.params for r in records.in_order() if r.number != BASELINE]
    grid = space.grid()
    for point in grid:
        if point not in ended:
            study.enqueue_trial(point)
    return storage, min(len(grid) + 1, part.trials or len(grid) + 1)


def study_trial(space: Space, record: TrialRecord, metric: Any) -> FrozenTrial | None:
    """Return an ended trial in Optuna's form; None if the trial has not ended or is outside the space."""
    import optuna
    from optuna.trial import TrialState

    params = space.locate(values_of(space.base)) if record.number == BASELINE else record.params
    if record.state == OPEN or params is None:
        return None
    state = TrialState.COMPLETE if record.last else TrialState.FAIL
    values: list[float] | None = None
    if record.last:
        values = [record.last.validation]
        if isinstance(metric, list):
            values.append(record.planned if record.planned is not None else record.last.cost)
    return optuna.trial.create_trial(
        state=state, values=values, params=dict(params), distributions=space.distributions(params)
    )


def _scheduler(part: TuneConfig, unit: float, records: Records) -> Any:
    if part.stop == "none" or len(part.rungs) == 1:
        return NoStopping()
    if part.stop == "median":
        return Median(time_attr="cost", metric="validation", mode="max", grace_period=0.0, min_samples_required=3)
    halving = Halving(
        time_attr="cost",
        metric="validation",
        mode="max",
        # The range goes from the cost of the cheapest trials to more than any cost; ASHA does not require integers.
        grace_period=cast(int, unit / HALVING**4),
        max_t=cast(int, unit * HALVING**12),
        reduction_factor=HALVING,
    )
    for record in records.in_order():
        for point in record.points if record.state != OPEN else ():
            halving.remember(f"former-{record.number}", point.resource, point.validation)
    return halving


def _over(records: Records, budget: SearchBudget) -> bool:
    """Return whether the search is over: the budget is used up, or does not allow even a run as cheap as the cheapest
    first rung so far, the baseline did not finish, or too many trials in a row were refused or failed."""
    ended = [r for r in records.in_order() if r.state != OPEN]
    if records.trials[BASELINE].state not in (OPEN, "finished"):  # without a baseline, there is nothing to compare with
        return True
    for most, state in ((REFUSED, OVER_BUDGET), (FAILED, "failed")):
        if len(ended) >= most and all(r.state == state for r in ended[-most:]):
            return True
    left = budget.left()
    if any(room <= 0 for room in left.values()):
        return True
    firsts = [r.points[0] for r in records.in_order() if r.points and r.number != BASELINE]
    if not firsts:
        return False
    least = {"wall": min(p.seconds for p in firsts)}
    least |= {unit: min(p.spent.get(unit, 0.0) for p in firsts) for unit in UNITS}
    return any(least[unit] > room for unit, room in left.items())
