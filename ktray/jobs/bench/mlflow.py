"""The table of a benchmark run in MLflow: the ratio and both rates of each row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ktray.jobs.bench.rows import BenchRow
from ktray.recipe.schema import Recipe
from ktray.tracking.tags import run_tags
from ktray.tracking.tracker import Tracker


def log(recipe: Recipe, home: Path, result: dict[str, Any], rows: Sequence[BenchRow]) -> dict[str, Any]:
    """Log a benchmark run with a folder under ``home``; returns the ``mlflow`` object of its ``result.json``."""
    folder = home / "runs" / result["run_id"]
    tracker = Tracker(recipe.mlflow.uri, recipe.mlflow.experiment, folder / "log.jsonl", folder / "mlflow.json", home)
    device = result["device"]
    tracker.start(
        result["run_id"],
        params={
            "bench.only": ", ".join(recipe.bench.only),
            "cpu": device["cpu"],
            "cores": device["cores"],
            "gpus": ", ".join(gpu["name"] for gpu in device["gpus"]) or "none",
        },
        tags=run_tags(recipe.mlflow, {"job": "bench"}),
    )
    values: dict[str, float] = {}
    for row in rows:
        name = metric_name(row.name)
        values |= {f"{name}/ratio": row.ratio, f"{name}/reached": median(row.reached)}
        values[f"{name}/limit"] = median(row.limit)
    tracker.final({**values, "peak_memory_bytes": result["peak_memory_bytes"]})
    tracker.artifact(folder / "bench.md")
    tracker.finish()
    tracker.tell(tracker.close(60))
    return tracker.info()


def metric_name(text: str) -> str:
    """Remove from a row's name the characters that MLflow does not allow in names of metrics."""
    return re.sub(r"[^\w\-. :]", "", text)
