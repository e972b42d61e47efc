"""A chart of cost against accuracy in MLflow's own pages: a view of an experiment that opens with the chart.

    ktray chart [EXPERIMENT] [--uri URI]          (or: python -m ktray.jobs.chart ...)

MLflow stores a view that a user shares as a tag of the experiment, and its pages open the view by the tag's name. This
module writes such a tag. The tag's format is not a public interface of MLflow (``tests/jobs/test_chart_page.py`` opens
the page in a browser); a server that does not know the format shows its plain page.
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

from ktray.distributed.explain import exit_code, explain
from ktray.errors import KtrayError
from ktray.tracking.mlflow_server import prepare
from ktray.tracking.tracker import WAY, scrub, tracking_uri

# Shared stages count in every run that needs them; otherwise the first run of a sweep would pay for all.
COSTS = ("cost.without_cache_flops", "cost.without_cache_usd", "cost.without_cache_device_seconds")
SPLITS = ("test.", "val.")
PORT = 5000  # the default of `mlflow ui`


def axes(runs: Sequence[Mapping[str, float]]) -> tuple[list[str], list[str]]:
    """Choose the metrics to draw: two costs, and the accuracies, the one that most runs have first.

    The costs are compute, and money if every run has a price, otherwise device time. The accuracies are on the test
    split, or on validation if no run has read the test split (trials).

    Args:
        runs: the metrics of each run, by name.

    Raises:
        KtrayError: no run has a cost and an accuracy.
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
        raise KtrayError(
            "No run of the experiment has a cost and an accuracy yet", "Run this again when a run has finished."
        )
    return costs, [name for name, _ in counts.most_common()]


def view(costs: Sequence[str], accuracies: Sequence[str], compare: str | None = None) -> dict[str, Any]:
    """Return the state of MLflow's page: a scatter plot of each cost against each accuracy, above MLflow's own charts,
    and the runs sorted by accuracy.

    Args:
        compare: id of a comparison: the page shows only its runs, as the mean of each method. None shows all runs.
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
    conditions = [f"metrics.`{best}` >= 0"] if len(accuracies) == 1 else []  # MLflow's filter language has no "or"
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
        "isAccordionReordered": True,  # otherwise MLflow sorts the sections by name
        "hideEmptyCharts": True,
        "groupBy": grouped if compare else None,
        "useGroupedValuesInCharts": True,
    }


def preset(uri: str, experiment: str, compare: str | None = None) -> str:
    """Save the view in an experiment; returns where to see it: an address, if needed after the command that serves it.

    Raises:
        KtrayError: the experiment does not exist or has no run to draw, or the server is unreachable or refuses.
    """
    try:
        return _preset(uri, experiment, compare)
    except KtrayError:
        raise
    except Exception as error:
        reason = str(scrub(" ".join(str(error).split())))[:300]
        raise KtrayError(
            f"MLflow at {scrub(uri)} did not save the chart: {reason}",
            "Check that the server runs and that you may write to it.",
        ) from error


def _preset(uri: str, experiment: str, compare: str | None) -> str:
    prepare(10.0)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    entry = client.get_experiment_by_name(experiment)
    if entry is None:
        raise KtrayError(
            f"{scrub(uri)} has no experiment '{experiment}'",
            f"Its experiments are: {', '.join(e.name for e in client.search_experiments(max_results=20)) or 'none'}.",
        )
    where = f"tags.compare = '{compare}'" if compare else ""
    runs = client.search_runs([entry.experiment_id], where, max_results=1000)
    costs, accuracies = axes([run.data.metrics for run in runs])
    key = f"ktray-{compare}" if compare else "ktray"
    state = json.dumps(view(costs, accuracies, compare), separators=(",", ":"))
    client.set_experiment_tag(entry.experiment_id, f"mlflow.sharedViewState.{key}", state)
    if "mlflow.experimentKind" not in entry.tags:  # otherwise MLflow opens the pages of a chat application
        client.set_experiment_tag(entry.experiment_id, "mlflow.experimentKind", "custom_model_development")
    return where_to_look(uri, entry.experiment_id, key)


def where_to_look(uri: str, experiment_id: str, key: str) -> str:
    """Return the page's address; if ``uri`` is a database, after the command that serves it on this machine."""
    page = f"/#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={quote(key)}"
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return f"{server}{page}"
    return f"mlflow ui --backend-store-uri {scrub(uri)}, then http://127.0.0.1:{PORT}{page}"


def main(argv: Sequence[str] | None = None, program: str = "python -m ktray.jobs.chart") -> int:
    """Run the command line; returns the exit code. ``program`` is the command for the usage line."""
    parser = argparse.ArgumentParser(prog=program, description="Cost against accuracy in MLflow.")
    parser.add_argument("experiment", nargs="?", default="ktray", help="name of the experiment (default: ktray)")
    parser.add_argument("--uri", help="tracking server or database (default: MLFLOW_TRACKING_URI or ./ktray-store)")
    arguments = parser.parse_args(argv)
    try:
        print(f"chart     {preset(tracking_uri(arguments.uri, Path('ktray-store')), arguments.experiment)}", flush=True)
    except Exception as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
