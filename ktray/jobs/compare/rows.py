"""The row of each method: accuracy over seeds with its interval, cost, and the comparison with the first method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ktray import recipe as recipes
from ktray.jobs.compare import costs
from ktray.jobs.compare.methods import Methods
from ktray.jobs.compare.statistics import interval, pareto, reach, resample
from ktray.stages.evaluate import stage as evaluate
from ktray.storage.store import Stage, Store
from ktray.tasks.base import task_kind
from ktray.tasks.weighted import WeightedScores


def load_scores(store: Store, results: Sequence[dict[str, Any]]) -> WeightedScores:
    """Load the test predictions of one method, one table for each seed, as scores for the bootstrap."""
    with store.run(results[0]["run_id"]).local("recipe.yaml") as path:
        kind = task_kind(recipes.load(str(path), []).task.kind)
    seeds = []
    for result in results:
        (key,) = {s["key"] for s in result["stages"] if s["name"] == "evaluate"}
        seeds.append(evaluate.load(Stage(store.stage("evaluate", key).uri), reduce=kind.compact))
    return kind.weighted_scores(results[0]["metric"]["name"], seeds)


def build(store: Store, methods: Methods, results: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a JSON-like row for each method, in order.

    ``accuracy``, ``spread`` (standard deviation over seeds, None for one seed), ``low``, ``high`` and ``validation``
    are fractions of the task's metric. ``flops``, ``device_seconds``, ``usd``, ``stages`` (FLOPs by stage) and
    ``teacher_share`` are means over seeds, and include all stages that a student needed. ``lead`` is the first method's
    accuracy minus this method's, with its interval. ``reach`` is the first method's cheapest run that is at least as
    accurate as this method. ``images`` is the number of images in the transfer set, None without a transfer set.
    """
    rows = [_row(store, name, results[name]) for name in methods]
    sample = resample([load_scores(store, results[name]) for name in methods])
    return compare_rows(rows, [method.family for method in methods.values()], sample)


def compare_rows(rows: list[dict[str, Any]], families: Sequence[str], sample: np.ndarray) -> list[dict[str, Any]]:
    """Add to each row its comparison with the other rows.

    Args:
        families: family of each row, see `ktray.jobs.compare.methods.Method`.
        sample: (draws, rows), see `resample`.
    """
    accuracy, cost = [r["accuracy"] for r in rows], [r["flops"] for r in rows]
    front = pareto(list(zip(cost, accuracy, strict=True)))
    own = [i for i, family in enumerate(families) if family == families[0]]
    compared = []
    for i, row in enumerate(rows):
        low, high = interval(sample[:, i])
        lead = None
        if i:
            lead = [accuracy[0] - accuracy[i], *interval(sample[:, 0] - sample[:, i])]
        compared.append(
            {
                **row,
                "low": low,
                "high": high,
                "family": families[i],
                "pareto": i in front,
                "lead": lead,
                "reach": None if i in own else _reached(rows, reach(accuracy, cost, sample, i, own)),
            }
        )
    return compared


def _reached(rows: Sequence[dict[str, Any]], reached: Any) -> dict[str, Any] | None:
    if reached is None:
        return None
    return {"name": rows[reached.index]["name"], "times": reached.times, "low": reached.low, "high": reached.high}


def _row(store: Store, name: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tests = np.array([r["metric"]["test"] for r in results])
    worth = [r["cost"]["without_cache"] for r in results]
    prices = [w["usd"] for w in worth if w["usd"] is not None]
    stages = [costs.by_stage(store, r) for r in results]
    mean = {k: float(np.mean([s.get(k, 0.0) for s in stages])) for k in {k: None for s in stages for k in s}}
    kept = [r["transfer_set"]["kept"] for r in results if "transfer_set" in r]
    return {
        "name": name,
        "objective": results[0]["objective"],
        "source": results[0].get("transfer_set", {}).get("source", "none"),
        # A run of an earlier version has no entry; its student may have had any start.
        "start": results[0].get("start", "unknown"),
        "images": float(np.mean(kept)) if kept else None,
        "accuracy": float(tests.mean()),
        "spread": float(tests.std(ddof=1)) if len(tests) > 1 else None,
        "validation": float(np.mean([r["metric"]["val"] for r in results])),
        "flops": float(np.mean([w["flops"] for w in worth])),
        "device_seconds": float(np.mean([w["device_seconds"] for w in worth])),
        "usd": float(np.mean(prices)) if len(prices) == len(worth) else None,
        "stages": mean,
        "teacher_share": costs.teacher_share(mean),
        "seeds": len(results),
        "runs": [r["run_id"] for r in results],
    }
