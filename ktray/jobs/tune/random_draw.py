"""A random draw beside the winner: its recipe with as many random images of the gallery in place of the retrieved ones.

A random subset is a strong opponent when a student learns from a teacher (arXiv 2403.07854). The run reads validation
only, with the seed of the search, so it is compared with the point of the search that won.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from ktray.distributed.explain import explain
from ktray.jobs.compare.random_draws import RANDOM, RETRIEVED, RETRIEVING
from ktray.jobs.tune.budget import BudgetExceeded, SearchBudget
from ktray.jobs.tune.records import Records, TrialPoint
from ktray.jobs.tune.trial import RunMeter, TrialRunner, recipe_of
from ktray.pipeline.run import run as pipeline
from ktray.recipe.schema import Recipe
from ktray.tracking.tags import RUN_NAME
from ktray.tracking.tracker import WAY

logger = logging.getLogger("ktray")

TITLE = "random draw"
FILE = "random-draw.json"


def random_draw(
    base: Recipe,
    records: Records,
    budget: SearchBudget,
    runner: TrialRunner,
    point: TrialPoint,
    results: Sequence[dict[str, Any]],
) -> dict[str, Any] | None:
    """Run the random draw beside the winner, if its transfer set was retrieved.

    Args:
        point: the winner.
        results: ``result.json`` of the runs of the winner.

    Returns:
        ``run``, ``images``, ``validation`` and ``missing``, why there is no run; None if nothing was retrieved.
    """
    retrieved = [r["transfer_set"] for r in results if r.get("transfer_set", {}).get("source") == RETRIEVED]
    if not retrieved:
        return None
    if records.folder.exists(FILE):
        done: dict[str, Any] = records.folder.read_json(FILE)
        if done["run"] is not None:
            return done
    images = int(retrieved[0]["kept"])
    own = {key: value for key, value in records.trials[point.trial].keys.items() if key not in RETRIEVING}
    recipe = recipe_of(base, {**own, "transfer.source": RANDOM, "transfer.size": images}, point.share)
    recipe.mlflow.experiment = f"{recipe.mlflow.experiment}-trials"
    row: dict[str, Any] = {"run": None, "images": images, "validation": None, "missing": None}
    row["missing"] = budget.promise(TITLE, point.own) or None
    if row["missing"] is None:
        meter, begun, finished = RunMeter(budget, TITLE, final=True), time.monotonic(), False
        tags = {"tune": runner.search, WAY: TITLE, RUN_NAME: TITLE}
        try:
            with runner.lines_of(TITLE):
                result = pipeline(recipe, runner.debug, runner.share, tags, trial=True, limit=meter)
            finished = True
            row.update(run=result["run_id"], validation=float(result["metric"]["val"]))
        except BudgetExceeded as spent:
            row["missing"] = spent.what
        except Exception as error:  # the search has its result without this row
            row["missing"] = explain(error)
        finally:
            budget.settle(TITLE, meter.spent(), meter.run, time.monotonic() - begun if finished else None)
    records.folder.write_json(FILE, row)
    logger.info(f"winner    {sentence(row, point.validation)}")
    return row


def sentence(row: dict[str, Any], validation: float) -> str:
    """Compare the winner's validation metric, a fraction, with that of the random draw."""
    if row["validation"] is None:
        return f"there is no random draw of {row['images']:,} images to compare with: {row['missing']}"
    lead = 100 * (validation - row["validation"])
    return (
        f"the retrieved transfer set has {lead:+.1f} points on validation compared with {row['images']:,} random "
        f"images of the gallery ({row['validation']:.1%})"
    )
