"""The comparison in MLflow: one run beside those of its ways, with the table, the pictures and each way's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ktray.pipeline import local_home
from ktray.recipe import Recipe
from ktray.store import Store
from ktray.tracking import Tracker

PER_WAY = ("accuracy", "spread", "low", "high", "validation", "flops", "device_seconds", "usd", "teacher_share")


def log(recipe: Recipe, store: Store, found: dict[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """Log the comparison; returns the ``mlflow`` object of its ``result.json``. A server that is away stops nothing.

    Metrics are ``<way>.<number>``, the tag ``compare`` is the comparison's id, and the parameter ``runs.<way>`` names
    the runs of a way.
    """
    home = local_home(store)
    folder = home / "runs" / found["run_id"]
    tracker = Tracker(recipe.mlflow.uri, recipe.mlflow.experiment, folder / "log.jsonl", folder / "mlflow.json", home)
    part = recipe.compare
    tracker.start(
        found["run_id"],
        params={
            "equal": part.equal,
            "seeds": str(part.seeds),
            "lr_search": str(part.lr_search),
            **{f"runs.{way['name']}": ", ".join(way["runs"]) for way in found["ways"]},
            **{f"train.lr.{way['name']}": way["lr"] for way in found["ways"]},
        },
        tags={"compare": found["run_id"], "task": str(found["task"]), "chosen": found["chosen_on_validation"]},
    )
    values = {f"{way['name']}.{key}": way[key] for way in found["ways"] for key in PER_WAY if way[key] is not None}
    tracker.final({**values, "cost.total_flops": found["spent"]["flops"]})
    for file in files:
        tracker.artifact(file)
    tracker.finish()
    tracker.close(60)
    return tracker.info()
