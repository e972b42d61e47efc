"""The engines: Optuna proposes trials, Ray Tune runs them, ASHA (or the median rule) stops the weak ones.

What ASHA counts in is cost, not epochs: a trial is compared with those that have cost as much. What Optuna learned is
not kept by Tune but rebuilt from the records of the search, so that an interrupted search goes on with any number of
finished trials, and takes in those of former experiments in the same way.
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

HALVING = 3  # of the trials at one cost ASHA lets one of so many go on
REFUSED = 3  # trials one after the other that cannot be paid: then the search is over
FAILED = 10  # trials one after the other that fail: then something is wrong with all of them
STUDY = "ktray"


class _NotPickled:
    """Stays in this process: Tune copies and pickles what it is given, to restore experiments, which ktray does by its
    own records."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return (object, ())


class Proposer(_NotPickled, Searcher):
    """Numbers what the inner search proposes and stops proposing when the search is over.

    Args:
        inner: proposes points of the space.
        again: trials that an interrupted search had begun, in the order in which ``inner`` proposes them again; first
            of them the recipe as given, where it is not finished.
        most: trials in all; None: any number.
        over: whether no further trial is to be begun.
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
    """Trials that ended by themselves and the recipe as given are not stopped; all count."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["ended"]:
            return str(TrialScheduler.CONTINUE)
        action: str = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        return str(TrialScheduler.CONTINUE) if result["baseline"] or result["done"] else action


class Halving(_KeepBaseline, ASHAScheduler):
    """ASHA with cost as its time."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if result["ended"]:  # it has no validation to count
            self.on_trial_remove(tune_controller, trial)
        else:
            super().on_trial_complete(tune_controller, trial, result)

    def remember(self, name: str, cost: float, validation: float) -> None:
        """Count a result of an earlier process of this search."""
        remember_result(self, _TrialRef(name), cost, validation)


class Median(_KeepBaseline, MedianStoppingRule):
    """The median rule with cost as its time."""


class NoStopping(_KeepBaseline, FIFOScheduler):
    """Every trial goes through all its rungs."""


@dataclass(frozen=True)
class _TrialRef:
    trial_id: str


@dataclass
class Watcher(_NotPickled, Callback):
    """Keeps the records as trials end, and tells how far the search is."""

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
            reason = "" if finished else "weaker on validation than others that have cost as much"
            self.records.close(record, "finished" if finished else "stopped", reason)
        self.report(record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.records.trials[int(trial.config["number"])]
        if record.state == OPEN:
            self.records.close(record, "failed", "its process in Ray Tune died")
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
    """Run the search until the budget, the space or `tune.trials` is used up.

    Args:
        answer: runs a rung, see `ktray.jobs.tune.trial`.
        unit: what the first rung of the recipe as given would cost for its student.
        report: gets a trial whenever there is news of it.
        former: trials of former experiments.
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

    for record in records.in_order():  # begun by an earlier process, and not paid any more
        if record.state == OPEN:
            records.close(record, OVER_BUDGET, "interrupted, and then the budget was used up")
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

    # Of an interrupted search: the same draws again would be the same trials.
    seed = part.seed + 7919 * len(records.trials)
    if part.search == "tpe":
        # Knows that keys of one trial depend on each other, and takes those that run for bad ones, not for unknown.
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
    """A study that knows what is known, with what is to be proposed first; and how many trials there are at most."""
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
    """A trial that has ended, as Optuna remembers it; None for one that has not, or that lies outside the space."""
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
        # From what the cheapest trials cost to more than any; whole numbers they need not be.
        grace_period=cast(int, unit / HALVING**4),
        max_t=cast(int, unit * HALVING**12),
        reduction_factor=HALVING,
    )
    for record in records.in_order():
        for point in record.points if record.state != OPEN else ():
            halving.remember(f"former-{record.number}", point.resource, point.validation)
    return halving


def _over(records: Records, budget: SearchBudget) -> bool:
    """Whether the budget is used up: there is nothing left, or no run as cheap as the cheapest first one would fit."""
    ended = [r for r in records.in_order() if r.state != OPEN]
    if records.trials[BASELINE].state not in (OPEN, "finished"):  # there is nothing to compare with
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
