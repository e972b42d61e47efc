"""The search in MLflow: one run with a nested run for each trial, and the chart of cost against validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ktray.errors import KtrayError
from ktray.jobs.tune.budget import SearchBudget
from ktray.jobs.tune.records import BASELINE, TrialRecord
from ktray.recipe.schema import Recipe
from ktray.storage.store import Dir, Store, local_home
from ktray.tracking.tags import run_tags
from ktray.tracking.tracker import WAY, Tracker, tracking_uri


def open_run(base: Recipe, store: Store, run_id: str, budget: SearchBudget) -> Tracker:
    """Start the run of the search, or resume that of an earlier process. An unreachable server is no error."""
    home = local_home(store)
    folder = home / "runs" / run_id
    sent = base.mlflow
    log, state = folder / "log.jsonl", folder / "mlflow.json"
    tracker = Tracker(sent.uri, sent.experiment, log, state, home, also=sent.also)
    part = base.tune
    tracker.start(
        run_id,
        params={
            **{f"budget.{unit}": value for unit, value in budget.limits.items()},
            **{f"tune.{name}": getattr(part, name) for name in ("search", "stop", "cost", "cost_limit", "seed")},
        },
        tags=run_tags(base.mlflow, {"tune": run_id, "task": str(base.task.name or base.task.data)}),
    )
    return tracker


def trial(tracker: Tracker, base: Recipe, search: str, record: TrialRecord) -> None:
    """Log an ended trial: its choices, its validation metric and cost at each rung, and the reason for its end."""
    name = "baseline" if record.number == BASELINE else f"trial {record.number}"
    tags = {"compare": search, WAY: name, "state": record.state, **({"reason": record.reason} if record.reason else {})}
    run = tracker.stage(name, params=record.params, tags=tags)
    for point in record.points:
        whole = {f"cost.without_cache_{unit}": value for unit, value in point.whole.items() if value is not None}
        run.metrics(point.steps, {f"val.{base.task.metric}": point.validation, **whole})
    run.finish({}, "FAILED" if record.state == "failed" else "FINISHED")


def close(tracker: Tracker, content: dict[str, Any], kept: Dir, files: Sequence[str], rest: float) -> dict[str, Any]:
    """Log the end of the search; returns the ``mlflow`` object of its ``result.json``.

    Args:
        content: the content of ``result.json``.
        kept: the folder of the search.
        files: names of files in the folder that are stored with the run.
        rest: seconds that the server may take; a later job sends what the server has not received by then.
    """
    winner = content["winner"]
    values: dict[str, Any] = {
        f"val.{content['metric']}": winner["validation"],
        f"test.{content['metric']}": winner["test"],
        "given.val": content["given"]["validation"],
        "cost.total_flops": content["sharing"]["flops"],
        "sharing.flops_times": content["sharing"]["flops_times"],
        **{f"importance.{key}": value for key, value in content["importance"].items()},
    }
    tracker.final({name: value for name, value in values.items() if value is not None})
    for name in files:
        tracker.stored(kept, name)
    tracker.flush(min(20.0, rest))
    return tracker.info(min(15.0, rest))


def chart(base: Recipe, store: Store, search: str) -> str:
    """Save a chart of the trials' cost against their validation in MLflow; returns where to see it, or how to retry."""
    from ktray.jobs.chart import preset

    try:
        return preset(tracking_uri(base.mlflow.uri, local_home(store)), base.mlflow.experiment, search)
    except KtrayError as error:  # a missing chart must not fail the search
        return f"MLflow has no chart ({error}); to retry: python -m ktray.jobs.chart {base.mlflow.experiment}"
