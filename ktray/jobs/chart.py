"""Cost against accuracy in MLflow's own pages: a view of an experiment that opens with the chart drawn.

    ktray chart [EXPERIMENT] [--uri URI]          (or: python -m ktray.jobs.chart ...)

MLflow keeps a view that a user shares as a tag of the experiment, and its pages open it by the tag's name; this writes
such a tag. Its form is no public interface (``tests/test_chart_page.py`` looks at the page with a browser); a server
that does not know it shows its plain page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ktray.distributed.explain import explain
from ktray.errors import KtrayError
from ktray.tracking.mlflow_server import prepare
from ktray.tracking.tracker import WAY, scrub, tracking_uri

# Shared stages count in every run that needs them: else the first run of a sweep pays for all.
COSTS = ("cost.without_cache_flops", "cost.without_cache_usd", "cost.without_cache_device_seconds")
SPLITS = ("test.", "val.")
PORT = 5000  # what `mlflow ui` takes where nothing is said


def axes(runs: Sequence[Mapping[str, float]]) -> tuple[list[str], list[str]]:
    """Metrics to draw, from those of the runs: two costs, and the accuracies, that of most runs first.

    Compute, and money where every run has a price, device time otherwise. Accuracies are those on the test split, on
    validation where no run has read it (trials).

    Raises:
        KtrayError: no run has both.
    """
    for split in SPLITS:
        counts = Counter(name for run in runs for name in run if name.startswith(split))
        with_accuracy = [run for run in runs if any(name in counts for name in run)]
        if with_accuracy:
            break
    flops, usd, seconds = COSTS
    priced = with_accuracy and all(run.get(usd, 0.0) > 0 for run in with_accuracy)
    costs = [c for c in (flops, usd if priced else seconds) if any(c in run for run in with_accuracy)]
    if not costs:
        raise KtrayError("No run of the experiment has a cost and an accuracy yet", "Wait until one is finished.")
    return costs, [name for name, _ in counts.most_common()]


def view(costs: Sequence[str], accuracies: Sequence[str], compare: str | None = None) -> dict[str, Any]:
    """The state of MLflow's page: a scatter for each pair, above its own charts, and the runs sorted by accuracy.

    Args:
        compare: id of a comparison, whose runs alone are shown, as the mean of each way; None: all runs.
    """
    best = accuracies[0]
    section = {
        "uuid": "ktray",
        "name": "Cost against accuracy",
        "columns": len(costs),
        "cardHeight": 480,
        "display": True,
        "isReordered": False,
        "deleted": False,
    }
    charts = [
        {
            "uuid": f"ktray-{cost}-{accuracy}",
            "type": "SCATTER",
            "metricSectionId": section["uuid"],
            "xaxis": {"key": cost, "type": "METRIC"},
            "yaxis": {"key": accuracy, "type": "METRIC"},
            "runsCountToCompare": 100,
            "deleted": False,
            "isGenerated": False,
        }
        for accuracy in accuracies
        for cost in costs
    ]
    conditions = [f"metrics.`{best}` >= 0"] if len(accuracies) == 1 else []  # the language has no "or"
    if compare:
        conditions.append(f"tags.compare = '{compare}'")
    grouped = {"aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": WAY}]}
    return {
        "searchFilter": " and ".join(conditions),
        "orderByKey": f"metrics.`{best}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": ["attributes.`User`", *(f"metrics.`{name}`" for name in (*accuracies, *costs))],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [section],
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "hideEmptyCharts": True,
        "groupBy": grouped if compare else None,
        "useGroupedValuesInCharts": True,
    }


def preset(uri: str, experiment: str, compare: str | None = None) -> str:
    """Put the view on an experiment; says where it is to be seen: an address, or a command that serves it and one.

    Raises:
        KtrayError: there is no such experiment, or no run to draw; or the server is away, or refuses.
    """
    try:
        return _preset(uri, experiment, compare)
    except KtrayError:
        raise
    except Exception as error:
        reason = str(scrub(" ".join(str(error).split())))[:300]
        raise KtrayError(
            f"MLflow at {scrub(uri)} does not do it: {reason}", "See that the server is up and lets you write."
        ) from error


def _preset(uri: str, experiment: str, compare: str | None) -> str:
    prepare(10.0)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    entry = client.get_experiment_by_name(experiment)
    if entry is None:
        raise KtrayError(
            f"{scrub(uri)} has no experiment '{experiment}'",
            f"There are: {', '.join(e.name for e in client.search_experiments(max_results=20)) or 'none'}.",
        )
    where = f"tags.compare = '{compare}'" if compare else ""
    runs = client.search_runs([entry.experiment_id], where, max_results=1000)
    costs, accuracies = axes([run.data.metrics for run in runs])
    key = f"ktray-{compare}" if compare else "ktray"
    state = json.dumps(view(costs, accuracies, compare), separators=(",", ":"))
    client.set_experiment_tag(entry.experiment_id, f"mlflow.sharedViewState.{key}", state)
    if "mlflow.experimentKind" not in entry.tags:  # else the pages open as those of a chat application
        client.set_experiment_tag(entry.experiment_id, "mlflow.experimentKind", "custom_model_development")
    return where_to_look(uri, entry.experiment_id, key)


def where_to_look(uri: str, experiment_id: str, key: str) -> str:
    """The page's address; where ``uri`` is a database, after the command that serves it on this machine."""
    page = f"/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={quote(key)}"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return f"{server}{page}"
    return f"mlflow ui --backend-store-uri {scrub(uri)}, then http://127.0.0.1:{PORT}{page}"


def main(argv: Sequence[str] | None = None, program: str = "python -m ktray.jobs.chart") -> int:
    """The command line; returns the exit code. ``program`` is how it was called, for the usage line."""
    parser = argparse.ArgumentParser(prog=program, description="Cost against accuracy in MLflow.")
    parser.add_argument("experiment", nargs="?", default="ktray", help="its name (default: ktray)")
    parser.add_argument("--uri", help="tracking server or database (default: MLFLOW_TRACKING_URI, else ./ktray-store)")
    arguments = parser.parse_args(argv)
    try:
        print(f"chart     {preset(tracking_uri(arguments.uri, Path('ktray-store')), arguments.experiment)}", flush=True)
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
