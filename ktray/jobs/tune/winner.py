"""The winner: trained with more seeds, and alone tested."""

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
FOLDER = "winner"  # in the search's: the runs of its seeds


def train_winner(
    base: Recipe, records: Records, budget: SearchBudget, rungs: TrialRunner, test: Mapping[str, float], at_once: int
) -> dict[str, Any]:
    """Train the best on validation with ``tune.seeds`` seeds and test it; of these as many as the budget has room for.

    The first seed is the search's own, of which all but the test is in the store.

    Args:
        test: FLOPs of the stage that reads the test split.

    Returns:
        ``point``, ``results`` (the runs' ``result.json``), ``missing`` (reason by seed).
    """
    point = records.best(base.tune.cost_limit)
    assert point is not None  # the recipe as given is one
    seeds = [base.seed + i for i in range(base.tune.seeds)]
    logger.info(
        f"winner    {title(point)}: validation {point.validation:.1%}; {base.tune.seeds} seeds are trained and tested"
    )
    home = records.folder.sub(FOLDER)
    results = {seed: result for seed in seeds if (result := _stored_result(rungs.store, home, point, seed))}
    missing: dict[int, str] = {}

    def train_seed(seed: int) -> None:
        recipe = recipe_of(base, records.trials[point.trial].keys, point.share, seed)
        first, name = seed == base.seed, f"{TITLE}/{seed}"
        # The first one is trained, and for its test something was kept back; a plan in seconds must not prevent it.
        refused = budget.promise(name, test if first else {**point.own, **test}, anyway=first)
        if refused:
            missing[seed] = refused
            return
        meter, begun, finished = RunMeter(budget, name, final=True), time.monotonic(), False
        tags = {"tune": rungs.search, WAY: TITLE, RUN_NAME: f"{TITLE}, seed {seed}"}
        try:
            with rungs.lines_of(f"seed {seed}"):
                results[seed] = pipeline(recipe, rungs.debug, rungs.share, tags, limit=meter)
            finished = True
            home.write_json(_name(point, seed), {"run": results[seed]["run_id"]})
            logger.info(f"winner    seed {seed}: test {results[seed]['metric']['test']:.1%}")
        except BudgetExceeded as spent:
            missing[seed] = spent.what
        except Exception as error:  # another seed may still come to its end
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
    """What an earlier process of this search has found with a seed of this very winner."""
    if not home.exists(_name(point, seed)):
        return None
    result: dict[str, Any] = store.run(str(home.read_json(_name(point, seed))["run"])).read_json("result.json")
    return result


def title(point: TrialPoint) -> str:
    """``trial 3``, with the share of its steps where it is not all of them."""
    name = "the recipe as given" if point.trial == 0 else f"trial {point.trial}"
    return name if point.share == 1 else f"{name} at {point.share:.2g} of its steps"
