"""The winner: it is trained with more seeds, and it is the only model that is tested."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from ktray.distributed.explain import explain
from ktray.jobs.compare.parallel import run_all
from ktray.jobs.tune.budget import BudgetExceeded, SearchBudget
from ktray.jobs.tune.records import Records, TrialPoint
from ktray.jobs.tune.trial import RunMeter, TrialRunner, recipe_of
from ktray.pipeline.run import run as pipeline
from ktray.recipe.schema import Recipe
from ktray.storage.store import Dir, Store
from ktray.tracking.tags import RUN_NAME
from ktray.tracking.tracker import WAY

logger = logging.getLogger("ktray")

TITLE = "winner"
FOLDER = "winner"  # subfolder of the search with the runs of the seeds


def train_winner(
    base: Recipe, records: Records, budget: SearchBudget, runner: TrialRunner, test: Mapping[str, float], at_once: int
) -> dict[str, Any]:
    """Train the best model on validation with ``tune.seeds`` seeds, or as many as the budget allows, and test it.

    The first seed is that of the search, so the store contains everything except its test.

    Args:
        test: FLOPs of the stage that reads the test split.
        at_once: number of seeds that are trained at the same time.

    Returns:
        ``point`` (the winner), ``results`` (``result.json`` of each run), ``missing`` (reason by seed).
    """
    point = records.best(base.tune.cost_limit)
    assert point is not None  # the baseline has one
    seeds = [base.seed + i for i in range(base.tune.seeds)]
    logger.info(
        f"winner    {title(point)}: validation {point.validation:.1%}; {base.tune.seeds} seeds are trained and tested"
    )
    home = records.folder.sub(FOLDER)
    results = {seed: result for seed in seeds if (result := _stored_result(runner.store, home, point, seed))}
    missing: dict[int, str] = {}

    def train_seed(seed: int) -> None:
        recipe = recipe_of(base, records.trials[point.trial].keys, point.share, seed)
        first, name = seed == base.seed, f"{TITLE}/{seed}"
        # The first seed is already trained, and its test has a reserve, so a plan in seconds must not prevent the test.
        refused = budget.promise(name, test if first else {**point.own, **test}, anyway=first)
        if refused:
            missing[seed] = refused
            return
        meter, begun, finished = RunMeter(budget, name, final=True), time.monotonic(), False
        tags = {"tune": runner.search, WAY: TITLE, RUN_NAME: f"{TITLE}, seed {seed}"}
        try:
            with runner.lines_of(f"seed {seed}"):
                results[seed] = pipeline(recipe, runner.debug, runner.share, tags, limit=meter)
            finished = True
            home.write_json(_name(point, seed), {"run": results[seed]["run_id"]})
            logger.info(f"winner    seed {seed}: test {results[seed]['metric']['test']:.1%}")
        except BudgetExceeded as spent:
            missing[seed] = spent.what
        except Exception as error:  # other seeds may still finish
            missing[seed] = explain(error)
        finally:
            budget.settle(name, meter.spent(), meter.run, time.monotonic() - begun if finished else None)

    run_all([partial(train_seed, seed) for seed in seeds if seed not in results], at_once)
    for seed, reason in sorted(missing.items()):
        logger.info(f"winner    seed {seed} is missing: {reason}")
    return {
        "point": point,
        "results": [results[seed] for seed in seeds if seed in results],
        "missing": {str(seed): reason for seed, reason in sorted(missing.items())},
    }


def _name(point: TrialPoint, seed: int) -> str:
    return f"{point.run}-{seed}.json"


def _stored_result(store: Store, home: Dir, point: TrialPoint, seed: int) -> dict[str, Any] | None:
    """Return the result of a seed of this winner from an earlier process of the search, or None."""
    if not home.exists(_name(point, seed)):
        return None
    result: dict[str, Any] = store.run(str(home.read_json(_name(point, seed))["run"])).read_json("result.json")
    return result


def title(point: TrialPoint) -> str:
    """Return ``trial 3``, with the share of its steps if it did not run all of them."""
    name = "baseline" if point.trial == 0 else f"trial {point.trial}"
    return name if point.share == 1 else f"{name} at {point.share:.2g} of its steps"
