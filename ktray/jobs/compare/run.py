"""``jobs/compare.py``: runs the pipeline for every method and every seed with shared stages, and writes one page.

An interrupted comparison resumes in its folder: it reads the finished runs, and finds the finished stages of the others
in the store.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ktray
from ktray.jobs.compare import calibration, costs, page, rows
from ktray.jobs.compare.equal_budget import budgets
from ktray.jobs.compare.lr_search import search
from ktray.jobs.compare.methods import list_methods, recipe_of, with_steps
from ktray.jobs.compare.mlflow import chart, log
from ktray.jobs.compare.parallel import how_many, share
from ktray.jobs.compare.random_draws import Methods
from ktray.jobs.compare.runner import Runner, open_folder
from ktray.pipeline.checks import require_test_split
from ktray.pipeline.estimate import together
from ktray.pipeline.failure import failure_recorded
from ktray.pipeline.resolve import labels_of
from ktray.pipeline.run_folder import RUNNING
from ktray.pipeline.session import Session, open_session
from ktray.recipe.load import dump, override
from ktray.recipe.schema import Recipe
from ktray.reporting.log import result
from ktray.reporting.report import planned_line
from ktray.reporting.result import SCHEMA, CompareResult, finished, write_result
from ktray.storage.store import local_home

logger = logging.getLogger("ktray")

TRIALS = "trials"  # short runs and trials are logged in an experiment of their own, separate from the methods


def compare(recipe: Recipe, debug: bool = False) -> dict[str, Any]:
    """Run the comparison; returns the content of its ``result.json``.

    Raises:
        KtrayError: the recipe does not allow a method, or a run failed.
    """
    begun = time.time()
    recipe = with_steps(recipe)
    with open_session(recipe, debug) as session, contextlib.ExitStack() as until:
        return _compare(recipe, debug, begun, session, until)


def _compare(
    recipe: Recipe, debug: bool, begun: float, session: Session, until: contextlib.ExitStack
) -> dict[str, Any]:
    store, whole = session.store, session.allocation
    methods = list_methods(recipe)
    require_test_split(labels_of(recipe), "jobs/compare.py compares methods on it")
    seeds = recipe.compare.seeds
    at_once, why = how_many(recipe.compare.parallel, whole, len(methods) * len(seeds), session.memory)
    logger.info(f"cluster   {at_once} runs at once ({why})")
    run_id, folder = open_folder(store, recipe, until)
    logger.info(f"compare   {folder.uri}")
    until.enter_context(failure_recorded(folder, run_id, begun))
    folder.write("recipe.yaml", dump(recipe).encode())
    runner = Runner(store, folder, whole, share(whole, at_once), at_once, debug)
    aside = recipe.model_copy(deep=True)
    aside.mlflow.experiment = f"{recipe.mlflow.experiment}-{TRIALS}"
    # One at a time, because another run at the same time would slow the measured one.
    measure = partial(
        calibration.measure, aside, store=store, plan=runner.share, run=partial(runner.run, at_once=1, trial=True)
    )
    budget = budgets(recipe, methods, runner.share, lambda methods, most: measure(methods))
    measured = costs.totals(runner.results.values())
    searched = search(aside, methods, budget, partial(runner.run, trial=True))
    recipes = {
        (name, seed): recipe_of(
            recipe, method.keys, seed=seed, train__steps=budget[name].steps, train__lr=searched.lr[name]
        )
        for seed in seeds  # the outer loop, so that a comparison that is stopped early has all methods with fewer seeds
        # Later seeds run in reverse order, since all shared stages exist then. So the slowest methods (without a
        # teacher, and with many steps instead) do not run last, when other workers have nothing left to do.
        for name, method in (methods.items() if seed == seeds[0] else reversed(methods.items()))
    }
    done = _run_all(runner, methods, recipes)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for (name, _), outcome in zip(recipes, done, strict=True):
        results[name].append(outcome)
    method_rows = rows.build(store, methods, results)
    for row in method_rows:
        name = row["name"]
        row.update(steps=budget[name].steps, lr=searched.lr[name], share=methods[name].share, keys=methods[name].keys)
        row.update(trials=searched.trials.get(name, []), like=list(methods[name].like))
    any_result = done[0]
    teachers = [r["teacher_metric"] for r in done if "teacher_metric" in r]
    unique = {r["run_id"]: r for r in done}.values()
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": run_id,
        "folder": folder.uri,
        "task": any_result["task"],
        "student": any_result["student"],
        "equal": recipe.compare.equal,
        "seeds": seeds,
        "label_budget": any_result["label_budget"],
        "metric": any_result["metric"]["name"],
        "test_images": any_result["metric"]["test_images"],
        "first": method_rows[0]["name"],
        "chosen_on_validation": max(method_rows, key=lambda row: row["validation"])["name"],
        "ways": method_rows,
        "teacher_metric": max(teachers, key=lambda t: t["val"]) if teachers else None,
        "spent": {
            **costs.totals(runner.results.values()),
            "ways": costs.totals(unique),
            "search": costs.totals(searched.results),
            "calibration": measured,
        },
        "lr_search": list(recipe.compare.lr_search),
        "plan": together(r["plan"] for r in unique if r.get("plan")),
        "mlflow": any_result["mlflow"],
        "versions": any_result["versions"],
        "device": any_result["device"],
        "ktray": ktray.__version__,
        **finished(begun),
        "wall_seconds": round(time.time() - begun, 2),
    }
    with tempfile.TemporaryDirectory(prefix="ktray-") as scratch:
        files = page.write(Path(scratch), content)
        for file in files:
            folder.put(file)
        content["mlflow"] = log(recipe, store, content, folder, [file.name for file in files])
    content = write_result(folder, CompareResult(**content))
    folder.delete(RUNNING)
    result("")
    result(page.table(content))
    if line := planned_line(content):
        result(line)
    result(f"\npage      {folder.file('compare.html')}\nresult    {folder.file('result.json')}")
    result(f"runs      {content['mlflow']['tracking_uri']} (local files of MLflow: {local_home(store)})")
    result(f"chart     {chart(recipe, store, content)}")
    return content


def _run_all(runner: Runner, methods: Methods, recipes: dict[tuple[str, int], Recipe]) -> list[dict[str, Any]]:
    """The results of all recipes, in order. Random draws run last, with as many images as the retrieved transfer sets
    beside them really have."""
    first = {place: one for place, one in recipes.items() if not methods[place[0]].like}
    done = dict(zip(first, runner.run([(name, one) for (name, _), one in first.items()]), strict=True))
    draws = {}
    for (name, seed), one in recipes.items():
        if like := methods[name].like:
            size = done[like[0], seed]["transfer_set"]["kept"]
            draws[name, seed] = override(one, {"transfer.size": size})
    done |= zip(draws, runner.run([(name, one) for (name, _), one in draws.items()]), strict=True)
    return [done[place] for place in recipes]
