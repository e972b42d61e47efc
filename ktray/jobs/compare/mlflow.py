"""The comparison in MLflow: one run in addition to those of the methods, with the page, the figures and the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe.schema import Recipe
from ktray.storage.store import Dir, Store, local_home
from ktray.tracking.tags import run_tags
from ktray.tracking.tracker import Tracker, tracking_uri

PER_METHOD = ("accuracy", "spread", "low", "high", "validation", "flops", "device_seconds", "usd", "teacher_share")


def log(recipe: Recipe, store: Store, content: dict[str, Any], kept: Dir, files: Sequence[str]) -> dict[str, Any]:
    """Log the comparison; returns the ``mlflow`` object of its ``result.json``. An unreachable server is no error.

    Metrics are ``<method>.<number>``, the tag ``compare`` is the comparison's id, and the parameter ``runs.<method>``
    names the runs of a method.

    Args:
        kept: the comparison's folder.
        files: names of files in the folder that are stored with the run.
    """
    home = local_home(store)
    folder = home / "runs" / content["run_id"]
    sent = recipe.mlflow
    log, state = folder / "log.jsonl", folder / "mlflow.json"
    tracker = Tracker(sent.uri, sent.experiment, log, state, home, also=sent.also)
    part = recipe.compare
    tracker.start(
        content["run_id"],
        params={
            "equal": part.equal,
            "seeds": str(part.seeds),
            "lr_search": str(part.lr_search),
            **{f"runs.{method['name']}": ", ".join(method["runs"]) for method in content["ways"]},
            **{f"train.lr.{method['name']}": method["lr"] for method in content["ways"]},
        },
        tags=run_tags(
            recipe.mlflow,
            {"compare": content["run_id"], "task": str(content["task"]), "chosen": content["chosen_on_validation"]},
        ),
    )
    values = {
        f"{method['name']}.{key}": method[key]
        for method in content["ways"]
        for key in PER_METHOD
        if method[key] is not None
    }
    tracker.final({**values, "cost.total_flops": content["spent"]["flops"]})
    for name in files:
        tracker.stored(kept, name)
    tracker.finish()
    tracker.tell(tracker.close(60))
    return tracker.info()


def chart(recipe: Recipe, store: Store, content: dict[str, Any]) -> str:
    """Save a chart of the methods' cost against their accuracy in MLflow; returns where to see it, or how to retry."""
    from ktray.jobs.chart import preset

    try:
        return preset(tracking_uri(recipe.mlflow.uri, local_home(store)), recipe.mlflow.experiment, content["run_id"])
    except KtrayError as error:  # a missing chart must not fail the comparison
        return f"MLflow has no chart ({error}); to retry: python -m ktray.jobs.chart {recipe.mlflow.experiment}"
