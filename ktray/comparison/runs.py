"""``jobs/compare.py``: every way with every seed through the pipeline, stages shared, and one page of what they say.

A run that was interrupted goes on where it stopped: each way's stages are in the store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ktray
from ktray.comparison import page
from ktray.comparison.statistics import Row, cheaper, difference, interval, pareto
from ktray.comparison.ways import Ways, budget_steps, default_ways, recipe_of
from ktray.pipeline import local_home
from ktray.pipeline import run as pipeline
from ktray.recipe import Recipe, dump
from ktray.resources import cluster_plan, connect
from ktray.stages import evaluate
from ktray.store import Stage, Store

SCHEMA = 1


def compare(recipe: Recipe, say: Callable[[str], None], debug: bool = False) -> dict[str, Any]:
    """Run the comparison; returns the content of its ``result.json``.

    Raises:
        KtrayError: a way that the recipe does not allow, or whatever a run raises.
    """
    begun = time.time()
    store = Store(recipe.store)
    store.check_writable()
    connect(debug)
    plan = cluster_plan(recipe.cluster.workers, recipe.cluster.use_gpu)
    ways: Ways = recipe.compare.ways or default_ways(recipe)
    steps = budget_steps(recipe, ways, recipe.compare.equal, plan, say)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    # Seeds outside: a comparison that is stopped early has all ways with fewer seeds.
    jobs = [(seed, name) for seed in recipe.compare.seeds for name in ways]
    for number, (seed, name) in enumerate(jobs, 1):
        say(f"\ncompare   {number}/{len(jobs)}: {name}, seed {seed}")
        one = recipe_of(recipe, ways[name], seed=seed, train__steps=steps[name][0])
        results[name].append(pipeline(one, say, debug))
    correct = {name: np.stack([_correct(store, r) for r in found]) for name, found in results.items()}
    rows = [_row(name, results[name], correct[name], steps[name][0]) for name in ways]
    best = max(range(len(rows)), key=lambda i: rows[i].validation)
    front = pareto([(r.flops, r.accuracy) for r in rows])
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_id = f"{stamp}-compare-{recipe.task.name or Path(str(recipe.task.data)).stem}"
    folder = store.run(run_id)
    any_result = next(iter(results.values()))[0]
    found = {
        "schema": SCHEMA,
        "run_id": run_id,
        "folder": folder.uri,
        "task": any_result["task"],
        "student": any_result["student"],
        "equal": recipe.compare.equal,
        "seeds": recipe.compare.seeds,
        "label_budget": any_result["label_budget"],
        "test_images": any_result["metric"]["test_images"],
        "chosen_on_validation": rows[best].name,
        "ways": [
            {
                **vars(row),
                "keys": ways[row.name],
                "pareto": i in front,
                "cheaper": cheaper(rows, i),
                "behind_chosen": None if i == best else difference(correct[rows[best].name], correct[row.name]),
                "runs": [r["run_id"] for r in results[row.name]],
            }
            for i, row in enumerate(rows)
        ],
        "teacher": {name: r[0]["teacher_metric"] for name, r in results.items() if "teacher_metric" in r[0]},
        "spent": _spent(results),
        "mlflow": any_result["mlflow"],
        "versions": any_result["versions"],
        "device": any_result["device"],
        "ktray": ktray.__version__,
        "wall_seconds": round(time.time() - begun, 2),
    }
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        for file in page.write(Path(scratch), found):
            folder.put(file)
    folder.write("recipe.yaml", dump(recipe).encode())
    folder.write_json("result.json", found)
    say("")
    say(page.table(found))
    say(f"\npage      {folder.file('compare.html')}\nresult    {folder.file('result.json')}")
    say(f"runs      {any_result['mlflow']['tracking_uri']} (local files of MLflow: {local_home(store)})")
    return found


def _correct(store: Store, result: dict[str, Any]) -> np.ndarray:
    """(N,) bool: which test images the student got right, in the order of the stage's shards."""
    (key,) = {s["key"] for s in result["stages"] if s["name"] == "evaluate"}
    rows = evaluate.load(Stage(store.stage("evaluate", key).uri))
    found: np.ndarray = rows["student"].argmax(1) == rows["label"]
    return found


def _row(name: str, found: list[dict[str, Any]], correct: np.ndarray, steps: int) -> Row:
    accuracy = correct.mean(1)
    worth = [r["cost"]["without_cache"] for r in found]
    low, high = interval(correct)
    prices = [w["usd"] for w in worth if w["usd"] is not None]
    return Row(
        name=name,
        accuracy=float(accuracy.mean()),
        spread=float(accuracy.std(ddof=1)) if len(found) > 1 else 0.0,
        low=low,
        high=high,
        validation=float(np.mean([r["metric"]["val"] for r in found])),
        flops=float(np.mean([w["flops"] for w in worth])),
        device_seconds=float(np.mean([w["device_seconds"] for w in worth])),
        usd=float(np.mean(prices)) if len(prices) == len(worth) else None,
        steps=steps,
        seeds=len(found),
    )


def _spent(results: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """FLOPs that this call spent, and what the runs would have cost without shared stages."""
    runs = [r for found in results.values() for r in found]
    return {
        "flops": float(sum(r["cost"]["flops"]["total"] for r in runs)),
        "flops_without_cache": float(sum(r["cost"]["without_cache"]["flops"] for r in runs)),
        "device_seconds": float(sum(r["cost"]["device_seconds"]["total"] for r in runs)),
    }
